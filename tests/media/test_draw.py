"""Overlays: the colours are where they belong, and nothing is drawn outside of the sheet."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from linescan.media import draw
from linescan.media.draw import SMALLEST, default_palette, draw_boxes, draw_comparison, draw_masks

from ..conftest import ENVIRONMENT

CLASSES, PALETTE = ["left", "right"], [(255, 0, 0), (0, 0, 255)]


def grey(height=400, width=500):
    return np.full((height, width, 3), 100, np.uint8)


def test_masks_tint_and_borders_are_full():
    mask = np.zeros((400, 500), np.uint8)
    mask[:, 250:] = 1
    mask[:50] = 255
    drawn = np.asarray(draw_masks(grey(), mask, CLASSES, PALETTE, opacity=0.4, legend_rows=0))
    assert drawn.shape == (400, 500, 3)
    assert drawn[200, 100].tolist() == [162, 60, 60] and drawn[200, 400].tolist() == [60, 60, 162]
    assert drawn[20, 100].tolist() == [100, 100, 100], "no class, no colour"
    assert drawn[200, 249].tolist() == [255, 0, 0]


def test_the_legend_names_what_is_there():
    mask = np.zeros((400, 500), np.uint8)
    one = draw_masks(grey(), mask, CLASSES, PALETTE)
    mask[:10] = 1
    both = draw_masks(grey(), mask, CLASSES, PALETTE)
    legends = [np.asarray(image)[400:] for image in (one, both)]
    assert legends[0].shape == legends[1].shape and len(legends[0]) > 10
    assert (legends[0] == PALETTE[0]).all(2).any() and not (legends[0] == PALETTE[1]).all(2).any()
    assert (legends[1] == PALETTE[1]).all(2).any()
    assert draw_masks(grey(), np.full((400, 500), 255), CLASSES).size == (500, 400), "nothing to name"


def test_a_legend_of_so_many_rows_is_always_as_high():
    many = [f"class {i}" for i in range(120)]
    masks = [np.zeros((400, 500), np.uint8), (np.arange(400 * 500) % 120).reshape(400, 500)]
    sizes = {draw_masks(grey(), mask, many, legend_rows=2).size for mask in masks}
    assert len(sizes) == 1
    assert draw_masks(grey(), masks[1], many).height > sizes.pop()[1]


def test_boxes_masks_and_words():
    masks = np.zeros((2, 400, 500), bool)
    masks[0, 100:200, 50:150] = True
    boxes = [(50, 100, 150, 200), (300, 2, 499, 80)]
    drawn = np.asarray(draw_boxes(grey(), boxes, [0, 1], [0.9, 0.5], CLASSES, iter(masks), PALETTE))
    assert drawn[100, 100].tolist() == [255, 0, 0] and drawn[80, 400].tolist() == [0, 0, 255], "edges of boxes"
    assert drawn[150, 100].tolist() == [165, 58, 58], "the mask is tinted"
    assert drawn[40, 400].tolist() == [100, 100, 100], "an empty mask is not"
    above = drawn[80:99, 50:150]
    assert (above == PALETTE[0]).all(2).any(), "the name stands above its box"
    assert (drawn[2:20, 310:420] == PALETTE[1]).all(2).any(), "inside, where there is no room above"
    plain = draw_boxes(grey(), boxes, [0, 1], None, CLASSES, palette=PALETTE)
    assert plain.size == (500, len(drawn))


def test_small_images_are_enlarged_and_nothing_is_an_image_too():
    image = Image.fromarray(grey(20, 30))
    factor = -(-SMALLEST // 30)
    drawn = draw_boxes(image, [(0, 0, 30, 20)], [1], [1.0], CLASSES, [np.ones((20, 30), bool)])
    assert drawn.width == 30 * factor and drawn.height > 20 * factor
    assert draw_boxes(image, np.zeros((0, 4)), [], [], CLASSES).size == (30 * factor, 20 * factor)
    assert image.size == (30, 20) and np.asarray(image).max() == 100, "the original is left alone"


def test_wrong_sizes_and_palettes():
    with pytest.raises(ValueError, match=r"\(40, 50\) for an image of 400x500"):
        draw_masks(grey(), np.zeros((40, 50), int), CLASSES)
    with pytest.raises(ValueError, match="palette of 1 colours for 2"):
        draw_masks(grey(), np.zeros((400, 500), int), CLASSES, PALETTE[:1])
    with pytest.raises(ValueError, match="for an image"):
        draw_boxes(grey(), [(0, 0, 9, 9)], [0], None, CLASSES, np.zeros((1, 9, 9), bool))


@pytest.mark.parametrize("colour", [(0, 0, 256), (-1, 0, 0), (0, 0), (0, 0, 0, 0)])
def test_colours_are_bytes(colour):
    with pytest.raises(ValueError, match="0 to 255"):
        draw_masks(grey(), np.zeros((400, 500), int), CLASSES, [colour, colour])


@pytest.mark.parametrize("system", [True, False])
def test_every_name_is_written(system, monkeypatch):
    """In letters of their own: no two names look the same, and none like a box for a letter that is missing."""
    if not system:
        monkeypatch.setattr(draw, "_BROAD", ())
    draw._fonts.cache_clear()

    def legend(name):
        return np.asarray(draw_masks(grey(), np.zeros((400, 500), int), [name, "b"], PALETTE))[400:].tobytes()

    missing = legend("\uffff")
    words = ["Straße", "Öl", "Ol", "ñandú", "car"] if system else ["Öl", "ñandú", "car"]
    assert len({missing, *map(legend, words)}) == len(words) + 1
    if not system:
        assert legend("Öl") == legend("Ol")
    draw_boxes(grey(), [(10, 10, 90, 90)], [0], [0.5], ["Straße", "b"])
    draw._fonts.cache_clear()


def test_drawing_needs_no_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None\nfrom linescan.media.draw import draw_boxes\n" \
        "import numpy as np; draw_boxes(np.zeros((9, 9, 3), np.uint8), [(1, 1, 5, 5)], [0], [0.5], ['a'])"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_colours_differ():
    palette = np.array(default_palette(24), int)
    distances = abs(palette[:, None] - palette).sum(2) + 999 * np.eye(24, dtype=int)
    assert distances.min() > 30 and palette.min() >= 0 and palette.max() <= 255


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2, 400), (300, 1), (17, 700), (90, 60)])
def test_images_of_any_shape_are_compared(size):
    before, after = Image.new("RGB", size, (200, 0, 0)), Image.new("RGB", (2 * size[0], 2 * size[1]), (0, 0, 200))
    drawn = np.asarray(draw_comparison(before, after))
    red, blue = ((drawn == colour).all(2).sum() for colour in ((200, 0, 0), (0, 0, 200)))
    assert min(red, blue) > 0.9 * after.width * after.height
