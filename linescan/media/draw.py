"""Drawing what was found over the image: classes as colours, instances as boxes, and a legend below."""

import colorsys
import unicodedata
from contextlib import suppress
from functools import lru_cache
from typing import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["default_palette", "draw_boxes", "draw_changes", "draw_comparison", "draw_labels", "draw_masks",
           "draw_objects", "draw_planes"]  # fmt: skip

Colour = tuple[int, int, int]

PAPER, INK = (250, 250, 248), (24, 24, 28)
BEST, REST = (42, 157, 143), (214, 218, 225)  # squares beside the likeliest class, and beside others
GOOD, BAD = (38, 166, 91), (214, 48, 49)  # points on objects, and beside them
WIDEST = 1600  # comparisons
SMALLEST = 384  # images whose longer side is below are enlarged, or no word would fit
NARROWEST = 640  # planes of a volume side by side


def default_palette(classes: int) -> list[Colour]:
    """Colours (red, green, blue) that are easy to tell apart: hues by the golden ratio, in five shades."""
    shades = (0.62, 0.96), (0.9, 0.74), (0.4, 0.9), (0.75, 0.55), (0.95, 0.98)
    hsv = [((0.6 + i * 0.618034) % 1, *shades[i % 5]) for i in range(classes)]
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(*colour)) for colour in hsv]


def draw_masks(
    image: Image.Image | np.ndarray,
    mask: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Colour] | None = None,
    *,
    opacity: float = 0.5,
    legend_rows: int | None = None,
) -> Image.Image:
    """The image tinted by the class of each pixel, with a legend: the classes in it and their shares, largest first.

    Args:
        image: a PIL image, or (H, W, 3) bytes, RGB.
        mask: (H, W) class of each pixel; values that are no class (255, for one) stay as they are.
        classes: the names.
        palette: a colour per class; default: `default_palette`.
        opacity: of the tint, 0 to 1. Borders between classes are drawn in full.
        legend_rows: how many rows the legend has, whatever it holds, as frames of a video need it; default: as many as
            it takes. 0: no legend.

    Returns:
        An RGB image. One whose longer side is below 384 pixels is enlarged by a whole factor.

    Raises:
        ValueError: image and mask differ in size, or the palette has too few colours, or values that are no bytes.
    """
    canvas, factor = _canvas(image)
    palette = _palette(palette, classes)
    mask = np.asarray(mask)
    _check_size("mask", mask.shape, canvas, factor)
    pixels = _tint(np.asarray(canvas), mask.repeat(factor, 0).repeat(factor, 1), palette, opacity)
    return _with_legend(Image.fromarray(pixels), _shares(mask, classes, palette), legend_rows)


def draw_planes(
    planes: Sequence[tuple[str, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[Colour] | None = None,
    *,
    legend_rows: int | None = None,
) -> Image.Image:
    """Planes of a volume side by side, tinted by the class of each pixel, with names above and a legend below.

    Args:
        planes: of each the name, the image (H, W) of bytes, and the mask (H, W), as for `draw_masks`.
        classes, palette, legend_rows: as for `draw_masks`.

    Returns:
        An RGB image; below `NARROWEST` pixels of width, planes are enlarged by a whole factor.
    """
    palette, gap = _palette(palette, classes), 8
    factor = -(-NARROWEST // sum(mask.shape[1] for _, _, mask in planes))
    height = factor * max(len(mask) for _, _, mask in planes)
    width = gap + sum(factor * mask.shape[1] + gap for _, _, mask in planes)
    size = max(round(width / 50), 11)
    sheet, left = Image.new("RGB", (width, round(1.8 * size) + height), PAPER), gap
    pen = ImageDraw.Draw(sheet)
    font, names = _typeset([name for name, _, _ in planes], size)
    for name, (_, image, mask) in zip(names, planes):
        grey = Image.fromarray(image).convert("RGB")
        grey = grey.resize((factor * grey.width, factor * grey.height), Image.Resampling.BICUBIC)
        tinted = _tint(np.asarray(grey), mask.repeat(factor, 0).repeat(factor, 1), palette, 0.4)
        pen.text((left, round(0.9 * size)), name, INK, font, anchor="lm")
        sheet.paste(Image.fromarray(tinted), (left, sheet.height - height + (height - grey.height) // 2))
        left += grey.width + gap
    shown = np.concatenate([mask.ravel() for _, _, mask in planes])
    return _with_legend(sheet, _shares(shown, classes, palette), legend_rows)


def draw_boxes(
    image: Image.Image | np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float] | None,
    classes: Sequence[str],
    masks: Iterable[np.ndarray] | None = None,
    palette: Sequence[Colour] | None = None,
    *,
    legend_rows: int | None = None,
) -> Image.Image:
    """The image with a box, a name and a score for each instance, and a legend: how many there are of each class.

    Args:
        image: a PIL image, or (H, W, 3) bytes, RGB.
        boxes: (N, 4) left, top, right, bottom in pixels.
        labels: (N,) index of the class of each.
        scores: (N,) from 0 to 1; None, where there are none (annotations).
        classes: the names.
        masks: for each instance (H, W) bool; taken one by one, so that they can be a generator.
        palette: a colour per class; default: `default_palette`.
        legend_rows: as for `draw_masks`.

    Returns:
        An RGB image. One whose longer side is below 384 pixels is enlarged by a whole factor.

    Raises:
        ValueError: image and masks differ in size, or the palette has too few colours, or values that are no bytes.
    """
    canvas, factor = _canvas(image)
    palette = _palette(palette, classes)
    boxes, labels = np.asarray(boxes, float).reshape(-1, 4) * factor, [int(label) for label in labels]
    if masks is not None:
        pixels = np.array(canvas)
        for label, mask in zip(labels, masks):
            _check_size("mask", np.shape(mask), canvas, factor)
            _tint_instance(pixels, np.asarray(mask, bool), palette[label], factor)
        canvas = Image.fromarray(pixels)
    pen, line = ImageDraw.Draw(canvas), max(round(max(canvas.size) / 450), 1)
    font, names = _typeset(classes, _text_size(canvas))
    order = range(len(boxes)) if scores is None else np.argsort(np.asarray(scores, float), kind="stable")
    for i in order:  # the best ones last: on top
        colour = palette[labels[i]]
        left, top, right, bottom = boxes[i]
        pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=line)
        name = names[labels[i]] + ("" if scores is None else f" {scores[i]:.2f}")
        _tag(pen, canvas.size, (left, top), name, colour, font)
    counts = np.bincount(labels, minlength=len(classes)) if labels else np.zeros(len(classes), int)
    shown = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    return _with_legend(canvas, [(palette[i], f"{classes[i]} · {counts[i]}") for i in shown], legend_rows)


def draw_objects(
    image: Image.Image | np.ndarray,
    masks: Iterable[np.ndarray],
    points: np.ndarray = (),
    negatives: np.ndarray = (),
    boxes: np.ndarray = (),
) -> Image.Image:
    """The image with objects of no class, each in a colour of its own, and what they were shown by.

    Args:
        image: a PIL image, or (H, W, 3) bytes, RGB.
        masks: of each object (H, W) bool, taken one by one; later ones are on top.
        points: (N, 2) x, y of points on objects: green.
        negatives: (N, 2) of points beside them: red.
        boxes: (N, 4) left, top, right, bottom: white.

    Returns:
        An RGB image. One whose longer side is below 384 pixels is enlarged by a whole factor.

    Raises:
        ValueError: image and masks differ in size.
    """
    canvas, factor = _canvas(image)
    pixels = np.array(canvas)
    for i, mask in enumerate(masks):
        _check_size("mask", np.shape(mask), canvas, factor)
        _tint_instance(pixels, np.asarray(mask, bool), default_palette(i + 1)[i], factor)
    canvas = Image.fromarray(pixels)
    pen, line = ImageDraw.Draw(canvas), max(round(max(canvas.size) / 450), 1)
    for left, top, right, bottom in np.asarray(boxes, float).reshape(-1, 4) * factor:
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=PAPER, width=line)
    for places, colour in ((points, GOOD), (negatives, BAD)):
        for x, y in (np.asarray(places, float).reshape(-1, 2) + 0.5) * factor:
            pen.circle((x, y), 4 * line, fill=colour, outline=PAPER, width=line)
    return canvas


def draw_labels(
    image: Image.Image | np.ndarray, labels: Sequence[tuple[str, float]], *, legend_rows: int | None = None
) -> Image.Image:
    """The image, and below it names with their probabilities, the first one marked.

    Args:
        image: a PIL image, or (H, W, 3) bytes, RGB.
        labels: name and probability, 0 to 1, best first.
        legend_rows: as for `draw_masks`.

    Returns:
        An RGB image. One whose longer side is below 384 pixels is enlarged by a whole factor.
    """
    entries = [(REST if i else BEST, f"{name} · {_percent(share)}") for i, (name, share) in enumerate(labels)]
    return _with_legend(_canvas(image)[0], entries, legend_rows)


def draw_comparison(
    before: Image.Image, after: Image.Image, names: tuple[str, str] = ("before", "after")
) -> Image.Image:
    """Two states of an image side by side, and below them the three details that differ most, magnified.

    Args:
        before, after: RGB images; `before` is shown in the size of `after`, if need be by bicubic interpolation.
        names: what each is called.

    Returns:
        An RGB image, at most `WIDEST` pixels wide.
    """
    if before.size != after.size:
        before = before.resize(after.size, Image.Resampling.BICUBIC)
    pair, gap = (before, after), 8
    scale = min((WIDEST - 3 * gap) / 2 / after.width, WIDEST / after.height)
    scale = scale if scale < 1 else max(int(min(scale, SMALLEST / max(after.size))), 1)
    width, height = (max(round(side * scale), 1) for side in after.size)
    size = max(round(width / 40), 11)
    line = round(size * 1.8)
    side = (width - 2 * gap) // 3  # of a magnified detail, for which a narrow image has no room
    boxes = _details(*pair, max(min(round(side / 4), *after.size), 1)) if side > 0 else []
    sheet = Image.new("RGB", (2 * width + 3 * gap, line + height + gap + (side + gap if side > 0 else 0)), PAPER)
    pen = ImageDraw.Draw(sheet)
    font, words = _typeset(names, size)
    for i, (image, word) in enumerate(zip(pair, words)):
        left = gap + i * (width + gap)
        pen.text((left, line // 2), word, INK, font, anchor="lm")
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST),
                    (left, line))  # fmt: skip
        for j, (box, colour) in enumerate(zip(boxes, default_palette(len(boxes)))):
            corner = left + j * (side + gap), line + height + gap
            sheet.paste(image.crop(box).resize((side, side), Image.Resampling.NEAREST), corner)
            pen.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), outline=colour, width=3)
            x, y, right, bottom = (round(edge * scale) for edge in box)
            frame = left + x, line + y, max(left + right - 1, left + x), max(line + bottom - 1, line + y)
            pen.rectangle(frame, outline=colour, width=2)
    return sheet


def draw_changes(
    images: tuple[np.ndarray, np.ndarray],
    maps: tuple[np.ndarray, np.ndarray],
    palette: Sequence[Colour],
    legend: Sequence[tuple[Colour, str, float]],
    names: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """Two images of a place side by side, and below them the same, tinted where something has changed; and a legend.

    Args:
        images: (H, W, 3) bytes, RGB, of one size.
        maps: (H, W), the class of each pixel before and after; 0 where nothing has changed.
        palette: a colour per class.
        legend: colour, words and share of each kind of change.
        names: what each image is called.

    Returns:
        An RGB image, at most `WIDEST` pixels wide.
    """
    gap, tinted = 8, []
    classes = [""] * len(palette)
    for image, values in zip(images, maps):
        values = np.where(values == 0, len(palette), values)  # no class
        tinted.append(draw_masks(image, values, classes, palette, opacity=0.6, legend_rows=0))
    plain = [_canvas(image)[0] for image in images]
    scale = min((WIDEST - 3 * gap) / 2 / plain[0].width, WIDEST / plain[0].height, 1)
    width, height = (max(round(side * scale), 1) for side in plain[0].size)
    size = max(round(width / 40), 11)
    line = round(size * 1.8)
    sheet = Image.new("RGB", (2 * width + 3 * gap, line + 2 * (height + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    font, words = _typeset(names, size)
    for i, word in enumerate(words):
        left = gap + i * (width + gap)
        pen.text((left, line // 2), word, INK, font, anchor="lm")
        for image, top in ((plain[i], line), (tinted[i], line + height + gap)):
            sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    entries = [(colour, f"{said} · {_percent(share)}") for colour, said, share in legend]
    return _with_legend(sheet, entries or [(PAPER, "nothing has changed")], None)


def _details(before: Image.Image, after: Image.Image, side: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of the squares that differ most, at most three, the most different first."""
    gap = np.abs(np.asarray(after, np.int16) - np.asarray(before, np.int16)).sum(-1)
    rows, columns = (length // side for length in gap.shape)
    means = gap[: rows * side, : columns * side].reshape(rows, side, columns, side).mean((1, 3))
    places = np.argsort(-means, axis=None, kind="stable")[:3]
    corners = [(int(x) * side, int(y) * side) for y, x in zip(*np.unravel_index(places, means.shape))]
    return [(x, y, x + side, y + side) for x, y in corners]


# -- parts ------------------------------------------------------------------------------------------------------------


def _canvas(image: Image.Image | np.ndarray) -> tuple[Image.Image, int]:
    """An RGB copy to draw on, and the factor it is enlarged by."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    image = image.convert("RGB")
    factor = -(-SMALLEST // max(image.size)) if max(image.size) < SMALLEST else 1
    size = image.width * factor, image.height * factor
    return image.resize(size, Image.Resampling.BICUBIC) if factor > 1 else image.copy(), factor


def _palette(palette: Sequence[Colour] | None, classes: Sequence[str]) -> list[Colour]:
    palette = default_palette(len(classes)) if palette is None else [tuple(map(int, colour)) for colour in palette]
    if any(len(colour) != 3 or min(colour) < 0 or max(colour) > 255 for colour in palette):
        raise ValueError("a palette holds colours (red, green, blue) of 0 to 255 each")
    if len(palette) < len(classes):
        raise ValueError(f"a palette of {len(palette)} colours for {len(classes)} classes")
    return palette


def _check_size(what: str, shape: tuple, canvas: Image.Image, factor: int) -> None:
    size = canvas.height // factor, canvas.width // factor
    if tuple(shape) != size:
        raise ValueError(f"a {what} of shape {tuple(shape)} for an image of {size[0]}x{size[1]} (height x width)")


def _borders(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose right or lower neighbour is of another kind."""
    border = np.zeros(mask.shape, bool)
    border[:, :-1] |= mask[:, 1:] != mask[:, :-1]
    border[:-1] |= mask[1:] != mask[:-1]
    return border


def _tint(pixels: np.ndarray, mask: np.ndarray, palette: Sequence[Colour], opacity: float) -> np.ndarray:
    known = mask < len(palette)
    colours = np.array(palette, np.float32)[np.where(known, mask, 0)]
    weight = np.where(_borders(mask), 1, opacity) * known
    return (pixels + weight[..., None].astype(np.float32) * (colours - pixels)).round().astype(np.uint8)


def _tint_instance(pixels: np.ndarray, mask: np.ndarray, colour: Colour, factor: int) -> None:
    """In place, and only where the mask is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = np.pad(mask[box].repeat(factor, 0).repeat(factor, 1), 1)
    border = (inside & (_borders(inside) | _borders(inside[::-1, ::-1])[::-1, ::-1]))[1:-1, 1:-1]
    inside = inside[1:-1, 1:-1]
    part = pixels[tuple(slice(factor * s.start, factor * s.stop) for s in box)]
    weight = np.where(border, 0.95, 0.42 * inside).astype(np.float32)[..., None]
    part += (weight * (np.array(colour, np.float32) - part)).round().astype(np.int16).astype(np.uint8)


def _shares(mask: np.ndarray, classes: Sequence[str], palette: Sequence[Colour]) -> list[tuple[Colour, str]]:
    """Of a legend: the classes in a mask and their shares of it, the largest first."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)]
    shown = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    return [(palette[i], f"{classes[i]} · {_percent(counts[i] / mask.size)}") for i in shown]


def _percent(share: float) -> str:
    return "<1 %" if share < 0.01 else f"{100 * share:.0f} %"


# Fonts that systems tend to have, for what Pillow's own cannot write: all beyond ASCII.
_BROAD = "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"


@lru_cache
def _fonts(size: int, broad: bool) -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Pillow's own font, and before it, where `broad`, those of the system."""
    found: list[ImageFont.FreeTypeFont | ImageFont.ImageFont] = []
    for name in _BROAD if broad else ():
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return [*found, ImageFont.load_default(size)]


def _typeset(texts: Sequence[str], size: int) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """A font for some texts, and the texts as it can write them: if need be, letters without their accents."""
    plain = all(map(_is_plain, texts))
    fonts = _fonts(size, broad=not plain)
    return fonts[0], list(texts) if plain or len(fonts) > 1 else list(map(_unaccented, texts))


def _is_plain(text: str) -> bool:
    return text.replace("·", "").isascii()


def _unaccented(text: str) -> str:
    letters = ((letter, unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()) for letter in text)
    return "".join(letter if _is_plain(letter) else bare or "?" for letter, bare in letters)


def _text_size(canvas: Image.Image) -> int:
    return max(round(max(canvas.size) / 50), 11)


def _tag(pen: ImageDraw.ImageDraw, size: tuple, corner: tuple, text: str, colour: Colour, font) -> None:
    """A word on its colour above `corner`; inside the image, where there is no room."""
    ascent, descent = font.getmetrics()
    width, height = pen.textlength(text, font) + font.size * 0.5, ascent + descent
    x = min(max(corner[0], 0), max(size[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else max(corner[1], 0)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 140
    pen.text((x + font.size * 0.25, y), text, PAPER if dark else INK, font)


def _with_legend(canvas: Image.Image, entries: list[tuple[Colour, str]], rows: int | None) -> Image.Image:
    """The image, and below it rows of coloured squares with words; what does not fit is counted."""
    if rows == 0 or (rows is None and not entries):
        return canvas
    size = _text_size(canvas)
    gap, height = round(size * 0.6), round(size * 1.7)
    font, texts = _typeset([text for _, text in entries], size)
    pen = ImageDraw.Draw(canvas)
    lines: list[list] = [[]]
    x = gap
    for (colour, _), text in zip(entries, texts):
        width = size + gap / 2 + pen.textlength(text, font)
        if lines[-1] and x + width + gap > canvas.width:
            lines.append([])
            x = gap
        lines[-1].append((x, colour, text))
        x += width + 2 * gap
    left = 0
    if rows and len(lines) > rows:
        left = sum(map(len, lines[rows:]))
        lines = lines[:rows]
    rows = rows or len(lines)
    sheet = Image.new("RGB", (canvas.width, canvas.height + rows * height + gap), PAPER)
    sheet.paste(canvas)
    pen = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        y = canvas.height + gap // 2 + row * height + height // 2
        for x, colour, text in line:
            pen.rectangle((x, y - size // 2, x + size, y + size // 2), fill=colour, outline=INK)
            pen.text((x + size + gap / 2, y), text, INK, font, anchor="lm")
    if left:
        text = f"+ {left}"
        width = pen.textlength(text, font) + 2 * gap
        pen.rectangle((canvas.width - width, y - height // 2 + 1, canvas.width, y + height // 2 - 1), fill=PAPER)
        pen.text((canvas.width - gap, y), text, INK, font, anchor="rm")
    return sheet
