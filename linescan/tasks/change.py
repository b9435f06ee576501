"""Changes: two images of a place in, what has changed out (`ChangeDetector`); and how models are trained and scored."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..engine.atomic import atomic, expect_no_input, write_all
from ..engine.cards import ModelCard, preprocess_of
from ..engine.change_losses import lovasz_softmax, sek_loss, similarity_loss
from ..engine.change_scores import confusion, semantic_scores, two_class_scores
from ..engine.change_sets import COLOURS, ChangePair, ChangeSet, find_changes, open_changes
from ..engine.image_sets import roots
from ..engine.mask_sets import IGNORED, classes_of
from ..engine.scores import Evaluator, Totals
from ..errors import InputError
from ..media.align import shift_between
from ..media.draw import default_palette, draw_changes
from ..media.find import Source
from ..media.images import ImageLike
from ..media.labels import SECOND, class_names
from ..media.large import PairedPixels, Pixels, blank, open_pixels, write_mask
from ..media.page import page, table
from ..media.preprocess import Preprocess
from ..zoo import fetch, find
from .base import Task, build_model
from .open import expect_task, restore_for
from .recipes import ChangeRecipe
from .report import WORST, csv_bytes, previews
from .segment import Segmenter, cross_entropy
from .tool import Progress, Writer, silent
from .windows import Size, WindowTool, reduced_for_drawing, thin, windows

__all__ = ["Change", "ChangeDetector", "ChangeMaps", "ChangeScores", "ChangeTask"]

TWO = "unchanged", "changed"
"""Classes of a model of changes alone."""


# -- training ---------------------------------------------------------------------------------------------------------


class ChangeScores(Evaluator):
    """Scores of both dates' pixels in one table (`linescan.engine.change_scores`).

    Args:
        data: whole pairs.
        classes: names; none for changes alone.
    """

    batch = 1  # images differ in size
    data: ChangeSet

    def __init__(self, data: ChangeSet, classes: Sequence[str]):
        self.data, self.semantic, self.classes = data, bool(classes), classes or TWO
        self.names = ("oa", "f_scd", "miou", "sek") if self.semantic else ("oa", "f1", "iou", "miou")
        self.primary = "sek" if self.semantic else "iou"

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        changed, *found = model(batch["before"], batch["after"]).decide()
        count = len(self.classes)
        if self.semantic:
            both = sum(confusion(x, labels, count) for x, labels in zip(found, batch["labels"].unbind(1)))
        else:
            both = confusion(changed, batch["change"], count)
        two = two_class_scores(confusion(changed, batch["change"], 2))
        totals.add(table=both)
        totals.keep(index=batch["index"], iou=torch.tensor([two["iou"]]))

    def scores(self, totals: Totals) -> dict[str, float]:
        return (semantic_scores if self.semantic else two_class_scores)(totals["table"])

    def describe(self, scores: dict[str, float]) -> str:
        if not self.semantic:
            return f"IoU of changes {scores['iou']:.4f}, F1 {scores['f1']:.4f}, accuracy {scores['oa']:.4f}"
        return "SeK {sek:.4f}, F_SCD {f_scd:.4f}, mIoU {miou:.4f}, accuracy {oa:.4f}".format(**scores)

    def report(self, totals: Totals, folder: Path, title: str) -> tuple[dict, list[Path]]:
        """report.html (classes found and there, pairs whose changes are found worst), confusion.csv and pairs.csv."""
        pixels, scores = totals["table"].long().tolist(), self.scores(totals)
        index, iou = totals["index"].tolist(), totals["iou"].tolist()
        order = sorted(range(len(index)), key=lambda i: (iou[i] != iou[i], iou[i]))  # without a change: last
        head = ["found \\ there", *self.classes]
        cells = [[name, *row] for name, row in zip(self.classes, pixels)]
        listed = [(self.data.names[index[i]], f"{iou[i]:.4f}") for i in order]
        worst = previews(self.data, ((index[i], iou[i]) for i in order[:WORST]))
        sections = [
            ("Pixels", "Rows are what was found, columns what is there; of both dates.", table(head, cells)),
            ("Worst pairs", "By the IoU of what has changed.", worst),
        ]
        contents = {
            "report.html": page(title, f"{len(index)} pairs. {self.describe(scores)}.", sections),
            "confusion.csv": csv_bytes(head, cells),
            "pairs.csv": csv_bytes(["pair", "iou"], listed),
        }
        return {"classes": list(self.classes), "confusion": pixels}, write_all(folder, contents)


class ChangeTask(Task):
    """Pairs -> the losses of Mamba-FCS (arXiv 2508.08232), each of which has its weight in the recipe.

    Raises:
        InputError: a model that finds no changes, or data that do not fit it.
        CheckpointError: the encoder's weights do not fit.
    """

    losses = ("loss", "change", "semantic", "lovasz", "sek", "similarity")
    unit = "pairs"
    listed = "change"
    recipe: ChangeRecipe

    def __init__(self, recipe: ChangeRecipe):
        super().__init__(recipe)
        expect_task(recipe.model, self.listed)
        train, held_out = open_changes(recipe.data, recipe.val, recipe.holdout)
        args = {**find(recipe.model).args, **recipe.model_args}
        alone = len(train[0].labels) == 1 or args.get("num_classes") == 0
        self.classes = [] if alone else _classes_of(recipe)
        self.args = recipe.model_args | {"num_classes": len(self.classes)}
        self.model = build_model(replace(recipe, model_args=self.args))
        self.preprocess = preprocess_of(self.model, img_size=recipe.crop)
        count = len(self.classes)
        self.data = ChangeSet(train, count, self.preprocess, recipe.crop, recipe.augment)
        self.evaluator = ChangeScores(ChangeSet(held_out, count, self.preprocess), self.classes)

    def load_weights(self) -> None:
        """As `Task`, and the encoder's."""
        super().load_weights()
        if path := self.recipe.encoder_checkpoint:
            self.model.encoder.load_pretrained(fetch(find("vmamba_base_s2l15")) if path == "imagenet" else path)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        recipe, change = self.recipe, batch["change"]
        y = model(batch["before"], batch["after"])
        y = type(y)(*(x if x is None else x.float() for x in y))
        parts = {"change": cross_entropy(y.change, change), "lovasz": lovasz_softmax(y.change, change)}
        parts |= dict.fromkeys(("semantic", "sek", "similarity"), parts["change"].detach() * 0)
        if self.classes:
            dates = y.before, y.after
            labels = [torch.where(x == 0, IGNORED, x) for x in batch["labels"].unbind(1)]
            parts["semantic"] = sum(cross_entropy(x, own) for x, own in zip(dates, labels))
            parts["lovasz"] = parts["lovasz"] + sum(lovasz_softmax(x, own) for x, own in zip(dates, labels))
            parts["similarity"] = similarity_loss(*dates, change == 0)
            if recipe.sek_weight and self.step >= recipe.sek_from:
                parts["sek"] = sek_loss(*dates, labels, change == 1)
        weights = {
            "change": 1.0,
            "semantic": recipe.semantic_weight,
            "lovasz": recipe.lovasz_weight,
            "sek": recipe.sek_weight,
            "similarity": recipe.similarity_weight,
        }
        return {"loss": sum(weights[name] * parts[name] for name in weights), **parts, "output": y.change}

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, self.classes, self.preprocess)

    @classmethod
    def judge(cls, recipe: ChangeRecipe, model: nn.Module, card: ModelCard) -> Evaluator:
        pairs = _held_out(recipe.data)
        if len(pairs[0].labels) == 1 and model.num_classes:
            raise InputError(f"{recipe.data} has labels of changes alone, and {card.model} names classes")
        classes = card.classes if model.num_classes else []
        return ChangeScores(ChangeSet(pairs, len(classes), card.preprocess), classes)


def _held_out(data: str) -> list[ChangePair]:
    """What is scored of a folder: its part that is held out, where it says which, else all of it."""
    root, held_out = roots(data, None)
    if held_out or (root / "train.txt").is_file() or (root / "train_list.txt").is_file():
        return open_changes(data, None, 0.1)[1]
    return find_changes(root)


def _classes_of(recipe: ChangeRecipe) -> list[str]:
    if recipe.classes is None:
        return list(classes_of(recipe.data, SECOND))
    if "," not in recipe.classes and (names := class_names(recipe.classes)):
        return names
    names = [name.strip() for name in recipe.classes.split(",") if name.strip()]
    if not 2 <= len(names) <= IGNORED:
        raise InputError(f"--classes is names with commas between, `unchanged` first, or SECOND or Landsat-SCD, not "
                         f"{recipe.classes!r}")  # fmt: skip
    return names


# -- the user's side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Change:
    """What has changed in an image.

    Attributes:
        codes: (H, W), number of the class before times the number of classes, plus that of the class after.
        classes: names; "unchanged" is the first.
        semantic: whether the model tells classes apart; otherwise what has changed is "changed".
        shift: by how many pixels (down, right) the second image seems to lie beside the first; None if it does not.
    """

    codes: np.ndarray
    classes: Sequence[str]
    semantic: bool = True
    shift: tuple[int, int] | None = None

    @cached_property
    def before(self) -> np.ndarray:
        """(H, W) uint8: the class before the change of each pixel that has changed, else 0."""
        return self._map(lambda codes: codes // len(self.classes))

    @cached_property
    def after(self) -> np.ndarray:
        """(H, W) uint8: the class after it."""
        return self._map(lambda codes: codes % len(self.classes))

    @cached_property
    def changed(self) -> np.ndarray:
        """(H, W) uint8: 1 for each pixel that has changed."""
        return self._map(lambda codes: codes > 0)

    def _map(self, of) -> np.ndarray:
        values = blank(self.codes.shape, np.uint8)
        for top in range(0, len(values), ROWS):
            values[top : top + ROWS] = of(self.codes[top : top + ROWS])
        return values

    @cached_property
    def counts(self) -> np.ndarray:
        """(classes, classes), pixels by class before and after; those that have not changed are of class 0 in both."""
        n = len(self.classes)
        parts = (self.codes[top : top + ROWS] for top in range(0, len(self.codes), ROWS))
        return sum(np.bincount(part.ravel(), minlength=n**2) for part in parts).reshape(n, n)

    @property
    def share(self) -> float:
        """Of the pixels that have changed."""
        return float(1 - self.counts[0, 0] / self.codes.size)

    @property
    def transitions(self) -> list[tuple[str, str, float]]:
        """(class before, class after, share of the pixels), the most frequent first."""
        order = np.argsort(-self.counts, axis=None, kind="stable")
        places = ((*map(int, np.unravel_index(i, self.counts.shape)),) for i in order)
        return [
            (self.classes[a], self.classes[b], float(self.counts[a, b] / self.codes.size))
            for a, b in places
            if self.counts[a, b] and (a or b)
        ]


ROWS = 1024  # of a map at a time


class _Network:
    """A change model as `Segmenter` drives it: images of six channels to logits, and these to codes."""

    window = stride = None
    resizes = align_corners = False
    images = 2

    def __init__(self, module: nn.Module, preprocess: Preprocess, classes: Sequence[str]):
        self.module, self.preprocess, self.semantic = module, preprocess, bool(module.num_classes)
        self.classes = list(classes) if self.semantic else list(TWO)
        known = COLOURS.get(len(self.classes))
        named = self.classes in (class_names("SECOND"), class_names("Landsat-SCD"))
        self.palette = list(known) if named else [(255, 255, 255), *default_palette(len(self.classes))[1:]]
        self.channels = 2 + 2 * module.num_classes

    def encode(self, images: np.ndarray) -> np.ndarray:
        return images

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return image

    def logits(self, images: Tensor) -> Tensor:
        """Bytes (B, 6, H, W) -> (B, 2 + 2 * classes, H, W)."""
        answers = self.module(*(self.preprocess.normalised(x) for x in images.chunk(2, 1)))
        return torch.cat([x for x in answers if x is not None], 1)

    def decide(self, logits: Tensor) -> Tensor:
        """(2 + 2 * classes, H, W) -> codes (H, W)."""
        changed, count = logits[:2].max(0).indices, len(self.classes)
        if not self.semantic:
            return changed * (count + 1)
        before, after = (x.max(0).indices for x in logits[2:].chunk(2))
        return changed * (before * count + after)


class ChangeDetector(Segmenter):
    """Says what has changed between two images of a place, from what to what.

        detect = ChangeDetector(checkpoint="runs/second/best.safetensors")
        change = detect("2017.png", "2021.png")
        print(change.share, change.transitions[:3])             # change.changed, change.before, change.after are maps

    Both images have one size, and show the same ground in the same place. A pair that seems to be shifted is answered,
    and its `Change.shift` says by how much. Without `window`, pairs whose longer side is above 4096 pixels are reduced
    by a whole factor.

    Args:
        model: a name of `linescan list --task change`; not needed where the checkpoint names it.
        checkpoint: its weights (.pth, .safetensors). Without it, the published ones.
        device, dtype, batch: as for `Tool`.
        window, stride, memory: as for `Segmenter`.
        args: further arguments of the model.

    Raises:
        InputError, CheckpointError: no such model, one that finds no changes, or no weights for it.
    """

    kinds = ("image",)

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        window: int | Size | None = None,
        stride: int | Size | None = None,
        memory: int = 2**30,
        **args,
    ):
        window, stride = windows(window, stride)
        module, card = restore_for("change", model, checkpoint, **args)
        network = _Network(module, card.preprocess, card.classes)
        WindowTool.__init__(self, card.model, network, device, dtype, batch, window, stride)
        self.memory = memory

    def __call__(self, before: Any, after: ImageLike | None = None) -> Any:
        """The change between two images; or, of a list of pairs, that of each.

        Raises:
            InputError: a pair that cannot be read or answered.
        """
        if after is not None:
            return super().__call__([(before, after)])[0]
        return super().__call__(list(before))

    def open(self, given: Pixels | tuple[ImageLike, ImageLike]) -> Pixels:
        """The pixels of both images. Raises InputError: they are no two, or of different sizes."""
        if isinstance(given, Pixels):
            return given
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise InputError(f"{self.model_name} reads two images of a place, before and after")
        return PairedPixels([open_pixels(image) for image in given])

    def answer(self, opened: Sequence[Pixels], progress: Progress = silent) -> list[Change]:
        codes = super().answer(opened, progress)
        return [Change(one, self.classes, self.model.semantic, _shift(pair)) for one, pair in zip(codes, opened)]

    @property
    def values(self) -> int:
        """How many codes there are."""
        return len(self.classes) ** 2

    def draw(self, opened: Pixels, answer: Change, frame: bool = False) -> Image.Image:
        """Both images, and below them both with what has changed (`linescan.media.draw.draw_changes`)."""
        both, factor = reduced_for_drawing(opened)
        at = tuple(thin(side, factor) for side in opened.size)
        maps = tuple(np.asarray(x[at]) for x in (answer.before, answer.after))
        names = [f"{a} to {b}" if answer.semantic else b for a, b, _ in answer.transitions]
        legend = [(self.palette[answer.classes.index(b)], name, share)
                  for (_, b, share), name in zip(answer.transitions, names)]  # fmt: skip
        return draw_changes((both[..., :3], both[..., 3:]), maps, self.palette, legend)


def _shift(pair: Pixels) -> tuple[int, int] | None:
    factor = -(-max(pair.size) // LARGEST_COMPARED)
    both = pair.reduced(factor)
    shift = shift_between(both[..., :3], both[..., 3:])
    return (shift[0] * factor, shift[1] * factor) if shift and shift != (0, 0) else None


LARGEST_COMPARED = 768  # pixels of the longer side of images that are laid on each other


class ChangeMaps(Writer):
    """Maps as PNG files, and names and colours of the classes.

        OUT/change/NAME.png      1 where something has changed (white), else 0 (black)
        OUT/before/NAME.png      the class before of each pixel that has changed, with a palette; else 0
        OUT/after/NAME.png       the class after it
        OUT/classes.json         [{"id": 0, "name": ..., "color": [red, green, blue]}, ...]

    Args:
        out: the folder.
        classes, palette: names and colours.
    """

    def __init__(self, out: Path, classes: Sequence[str], palette: Sequence[tuple[int, int, int]]):
        self.out, self.palette = out, palette
        out.mkdir(parents=True, exist_ok=True)
        described = [{"id": i, "name": n, "color": c} for i, (n, c) in enumerate(zip(classes, palette))]
        with atomic(out / "classes.json") as file:
            file.write(json.dumps(described, indent=1).encode())

    def expect(self, source: Source, opened: Any) -> None:
        """Raises InputError: a map would replace an input, as where BEFORE is a folder `before` inside OUT."""
        for folder in ("change", "before", "after"):
            expect_no_input(self._place(folder, source))

    def _place(self, folder: str, source: Source) -> Path:
        return self.out / folder / f"{source.name}.png"

    def save(self, source: Source, answer: Change, frame: int | None = None) -> list[Path]:
        """Writes the maps of a pair."""
        maps = {"change": (answer.changed, ((0, 0, 0), (255, 255, 255)))}
        if answer.semantic:
            maps |= {"before": (answer.before, self.palette), "after": (answer.after, self.palette)}
        paths = []
        for folder, (values, palette) in maps.items():
            path = self._place(folder, source)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as file:
                write_mask(file, values, palette)
            paths.append(path)
        return paths

    def describe(self, answer: Change) -> str:
        """How much has changed, the most frequent transitions, and whether the images seem to be shifted."""
        said = [f"{100 * answer.share:.1f} % changed"]
        if answer.semantic:
            said += [f"{a} to {b} {100 * share:.1f} %" for a, b, share in answer.transitions[:3]]
        if answer.shift:
            down, right = answer.shift
            sides = "down" if down > 0 else "up", "right" if right > 0 else "left"
            said.append(f"misaligned: the second image seems to lie {abs(down)} pixels {sides[0]} and {abs(right)} "
                        f"{sides[1]} of the first")  # fmt: skip
        return ", ".join(said)

    def as_json(self, answer: Change) -> dict:
        """`changed`, the share of the pixels; `transitions`, the most frequent first; `shift`."""
        named = [{"from": a, "to": b, "share": share} for a, b, share in answer.transitions]
        facts = {"changed": answer.share, "transitions": named if answer.semantic else None, "shift": answer.shift}
        return {key: value for key, value in facts.items() if value is not None or key == "shift"}
