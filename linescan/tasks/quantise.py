"""Quantising a classifier: images calibrate it, and a report shows what rounding does to each layer."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..engine.atomic import atomic, expect_file, write_all
from ..engine.cards import save_model
from ..engine.image_sets import Digits, Files, ImageSet
from ..engine.samples import reader
from ..errors import InputError, one_line
from ..media.look import BAD, GOOD, GREY, INK, PAPER, plain
from ..quantise import LayerError, Recipe, arithmetic, quantise
from ..quantise.convert import passes
from .open import restore_for
from .report import csv_bytes

__all__ = ["Quantised", "draw", "quantise_checkpoint"]


@dataclass
class Quantised:
    """What came of a quantisation.

    Attributes:
        model: its name.
        recipe: how it was quantised.
        layers: what rounding does to each layer by itself.
        images: how many calibrated it.
        same: the share of these whose likeliest class stayed; None without images.
        change: mean absolute change of the probability of their likeliest class.
        bytes_before, bytes_after: of the weights.
        arithmetic: how it computes, in words.
        broken: one line for each image that cannot be read.
        files: what was written.
    """

    model: str
    recipe: Recipe
    layers: list[LayerError]
    images: int
    same: float | None
    change: float | None
    bytes_before: int
    bytes_after: int
    arithmetic: str
    broken: list[str]
    files: list[Path]

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        found = {name: value for name, value in vars(self).items() if name not in ("recipe", "layers", "files")}
        layers = [{**asdict(layer), "decibels": layer.decibels} for layer in self.layers]
        how = {"method": self.recipe.method, "bits": self.recipe.bits}
        return {**found, **how, "layers": layers, "files": [str(path) for path in self.files]}


def quantise_checkpoint(
    model: str | None,
    checkpoint: str | Path | None,
    recipe: Recipe,
    data: str | None,
    to: str | Path,
    *,
    images: int = 64,
    batch: int = 8,
    progress: Callable[..., Any] = lambda *args, **kwargs: None,
    expect: Callable[[int], Any] = lambda total: None,
    **args,
) -> Quantised:
    """Quantises a classifier and writes it with its report.

    Args:
        model, checkpoint, args: as `restore` takes them.
        recipe: how.
        data: what to calibrate on: "digits" (those to train on), or a folder of images (or videos) of any kind.
        to: the file, .safetensors; the report is beside it as .csv and, with matplotlib, .png.
        images: how many of them, at equal distances.
        batch: images in one forward pass.
        progress: called after each step, with `description=`.
        expect: called once with the number of steps.

    Raises:
        InputError, CheckpointError: the model, the file or the data cannot be used.
        OSError: a file cannot be written.
    """
    to = Path(to)
    if to.suffix != ".safetensors":
        raise InputError(f"a quantised model is written to a .safetensors file, not {to}")
    expect_file(to)
    if recipe.calibrated and data is None:
        raise InputError(f"{recipe.method} needs --calibrate with images like those the model is for")
    network, card = restore_for("classification", model, checkpoint, **args)
    if card.quantised:
        raise InputError(f"{checkpoint} is quantised already")
    frames, size = getattr(network, "num_frames", 0), _bytes(network)
    found = _open(data, bool(frames)) if data is not None else None
    chosen = _spread(len(found), images) if found else []
    expect(len(chosen) + (passes(recipe) + 2) * -(-len(chosen) // batch))

    read, inputs, broken = reader(card.preprocess, frames), [], []
    for i in chosen:
        try:
            inputs.append(read(found, i))
        except InputError as error:
            broken.append(one_line(error, 400))
        progress(1, description="reading")
    if found and not inputs:
        raise InputError(f"none of the files in {data} can be read ({broken[0]})")
    batches = [_together(inputs[at : at + batch], frames) for at in range(0, len(inputs), batch)]

    network.eval()
    before = _answers(network, batches, progress, "before")
    layers = quantise(network, recipe, batches, progress)
    after = _answers(network, batches, progress, "after")
    how = arithmetic(network)
    quantised = {"method": recipe.method, "bits": recipe.bits, "arithmetic": how}
    to.parent.mkdir(parents=True, exist_ok=True)
    save_model(to, network, replace(card, quantised=quantised))
    result = Quantised(
        card.model, recipe, layers, len(inputs), None, None, size, _bytes(network), how, broken, [to]
    )  # fmt: skip
    if layers:
        best = before.argmax(1)
        result.same = (after.argmax(1) == best).float().mean().item()
        result.change = (after - before).gather(1, best[:, None]).abs().mean().item()
        result.files += _report(result, to)
    return result


def _open(data: str, videos: bool) -> ImageSet:
    return Digits(held_out=False) if data == "digits" else Files(data, videos=videos)


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers below `count` at equal distances, at most so many."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


def _together(samples: list[Tensor], frames: int) -> Tensor:
    """A batch; of videos, the first view of each."""
    return torch.stack([sample[0] if frames else sample for sample in samples])


@torch.inference_mode()
def _answers(network: torch.nn.Module, batches: list[Tensor], progress: Callable, description: str) -> Tensor:
    """Probabilities (images, classes)."""
    found = []
    for one in batches:
        found.append(network(one).float().softmax(-1))
        progress(1, description=description)
    return torch.cat(found) if found else torch.empty(0, 1)


def _bytes(network: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


# -- the report --------------------------------------------------------------------------------------------------------


def _report(result: Quantised, to: Path) -> list[Path]:
    """Writes the .csv and, with matplotlib, the .png beside the model's file."""
    head = ["layer", "kind", "int8", "weight_error", "largest_input", "output_error", "output_snr_db"]
    rows = (
        [e.layer, e.kind, int(e.integer), f"{e.weight:.3e}", f"{e.largest:.4g}", f"{e.output:.3e}", f"{e.decibels:.2f}"]
        for e in result.layers
    )
    paths = write_all(to.parent, {f"{to.stem}.csv": csv_bytes(head, rows)})
    if find_spec("matplotlib"):
        picture = to.with_suffix(".png")
        with atomic(picture) as file:
            draw(result, file)
        paths.append(picture)
    return paths


NAMES = {"mixer": "mixer, with all inside"}
COLOURS = {"linear": GOOD, "conv": "#e9c46a", "scan": BAD, "mixer": BAD}


def draw(result: Quantised, file: BinaryIO) -> None:
    """A PNG file: the signal over the noise that rounding makes in the output of each layer, in the model's order."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = result.layers
    figure = Figure(figsize=(9, 1.6 + 0.19 * len(layers)), dpi=110, facecolor=PAPER, layout="constrained")
    axis = figure.subplots()
    places = range(len(layers))
    axis.barh(places, [e.decibels for e in layers], color=[COLOURS[e.kind] for e in layers], height=0.75)
    axis.set_yticks(places, [e.layer for e in layers])
    axis.invert_yaxis()
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_axisbelow(True)
    plain(axis, "x")
    axis.tick_params(axis="y", labelsize=6.5, colors=INK)
    axis.set_xlabel("signal over rounding noise in the output of the layer by itself, dB (more is better)", color=GREY)
    title = f"{result.model}, {result.recipe.method} {result.recipe.bits}"
    axis.set_title(title, loc="left", color=INK, weight="bold")
    kinds = [kind for kind in COLOURS if any(e.kind == kind for e in layers)]
    patches = [Patch(color=COLOURS[kind], label=NAMES.get(kind, kind)) for kind in kinds]
    figure.legend(
        handles=patches, frameon=False, fontsize=8, labelcolor=INK, loc="outside lower right", ncols=len(kinds)
    )
    figure.savefig(file, format="png")
