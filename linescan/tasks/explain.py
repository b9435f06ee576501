"""Explanations: where a classifier finds its answer in an image, for models of linescan and of timm.

- **Class activation map** (Grad-CAM, Selvaraju et al., arXiv 1610.02391): the last features, weighted by how much the
  class's logit changes with each channel on average; what lowers the logit is left out.
- **Effective receptive field** (as VMamba's paper, arXiv 2401.10166, shows it, after Ding et al., arXiv 2203.06717):
  how much each pixel changes the last features at one place, over all channels.
- **Implicit attention** (Ali et al., arXiv 2403.01590): a recurrence is linear in its values, so its output for one
  token is a weighted sum of all tokens' values. The weights, in absolute terms and over all channels and routes, are
  read off as the gradient of the output with respect to the values, everything else held fixed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..backbones.contract import Backbone
from ..engine.atomic import atomic
from ..errors import InputError
from ..media.find import Source
from ..media.heat import draw_heat
from ..scans.recurrence import recurrences
from .classify import Classifier
from .tool import Progress, Writer, silent

__all__ = ["Explainer", "Explanation", "Heat", "activation_map", "attention_of", "receptive_field"]

VALUES = ("u", "v", "x")  # what a recurrence is linear in, by the names of its token inputs
LOCAL = {"causal_conv1d"}  # reach no further than a few tokens


@dataclass
class Explanation:
    """Where one image has its answer.

    Attributes:
        label, probability: of the class that is explained.
        image: what the model sees, RGB.
        activation: (h, w), 0 and above.
        field: (H, W), for the place asked for, 0 and above.
        attention: (h, w), from the token at that place; None of a model without recurrences.
        place: of the token, as shares of the width and the height.
    """

    label: str
    probability: float
    image: Image.Image
    activation: np.ndarray
    field: np.ndarray
    attention: np.ndarray | None
    place: tuple[float, float]

    def pictures(self) -> dict[str, Image.Image]:
        """Each of the maps over the image."""
        maps = {"activation": draw_heat(self.activation, self.image)}
        maps["field"] = draw_heat(np.log10(1 + 1e3 * self.field), self.image, 0.8, self.place)
        if self.attention is not None:
            maps["attention"] = draw_heat(self.attention, self.image, mark=self.place)
        return maps


class Explainer(Classifier):
    """Says where images have their answers.

        explain = Explainer("vmamba_tiny_s1l8")
        explain("cat.jpg").pictures()["activation"].save("cat-activation.png")

    Args:
        model, checkpoint, args: as for `Classifier`.
        label: the class to explain, by its name or number; by default the likeliest.
        place: of the token whose receptive field and attention are wanted, as shares of the image's width and height.
        layer: the recurrence whose attention is wanted, in the order in which they run; -1 is the last.

    Raises:
        InputError: a model of videos, or no such class or place.
    """

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        label: str | int | None = None,
        place: tuple[float, float] = (0.5, 0.5),
        layer: int = -1,
        **args: Any,
    ):
        super().__init__(model, checkpoint, **args)
        if self.clips:
            raise InputError(f"{self.card.model} reads videos; explanations are for models of images")
        if self.card.quantised:
            raise InputError("a quantised model has no gradients to explain it by; explain the one it was made from")
        if not all(0 <= share <= 1 for share in place):
            raise InputError(f"a place is two shares of the width and the height, 0 to 1, not {place}")
        self.place, self.layer, self.label = place, layer, None if label is None else self._index(label)

    def _index(self, label: str | int) -> int:
        if label in self.classes:
            return self.classes.index(str(label))
        if str(label).isdecimal() and int(label) < len(self.classes):
            return int(label)
        raise InputError(f"{self.card.model} has no class {label!r}; there are {len(self.classes)}, by name or number")

    def answer(self, opened: Sequence[Any], progress: Progress = silent) -> list[Explanation]:
        with torch.inference_mode(False), torch.enable_grad():
            return [self._explain(seen.tensor.clone().to(self.device)[None]) for seen in opened]

    def _explain(self, x: Tensor) -> Explanation:
        scores = self.forward([x[0]])[0]
        index = int(scores.argmax()) if self.label is None else self.label
        return Explanation(
            self.classes[index], float(scores[index]), self._seen(x[0]),
            activation_map(self.module, x, index), receptive_field(self.module, x, self.place),
            attention_of(self.module, x, self.place, self.layer), self.place,
        )  # fmt: skip

    def _seen(self, x: Tensor) -> Image.Image:
        """The image that the model reads, as a person would see it."""
        pixels = (self.card.preprocess.seen(x.detach().cpu()) * 255).round().byte().movedim(0, -1).numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")

    def __call__(self, images: Any) -> Any:
        """The `Explanation` of an image; a list of them for a list of images."""
        return super(Classifier, self).__call__(images)


# -- the three maps ---------------------------------------------------------------------------------------------------


def activation_map(model: nn.Module, x: Tensor, label: int) -> np.ndarray:
    """Grad-CAM of one image (1, C, H, W), (h, w): of the last features on whose places the logit depends.

    Where a class token alone is pooled, these are the features before the last block.

    Raises:
        InputError: the model does not say where its features are.
    """
    *later, first = reversed(_features(model))
    for info, before in [*((info, False) for info in (*later, first)), (first, True)]:
        logits, stream = _run_with_features(model, x, info["module"], before)
        [gradient] = torch.autograd.grad(logits[0, label], stream, allow_unused=True)
        if gradient is None:
            continue
        slopes, features = (_as_map(model, v.float(), info["num_chs"], x) for v in (gradient, stream.detach()))
        if slopes.abs().max() > 0:
            weights = slopes.mean((0, 1))
            return (features * weights).sum(-1).relu().cpu().numpy()
    raise InputError("the answer does not depend on features that have places")


def receptive_field(model: nn.Module, x: Tensor, place: tuple[float, float]) -> np.ndarray:
    """How much each pixel of one image (1, C, H, W) changes the last features at `place`, (H, W)."""
    pixels = x.detach().requires_grad_()
    info = _features(model)[-1]
    _, stream = _run_with_features(model, pixels, info["module"])
    with torch.enable_grad():
        features = _as_map(model, stream, info["num_chs"], x)
    row, column = _at(features.shape[:2], place)
    [gradient] = torch.autograd.grad(features[row, column].float().sum(), pixels)
    return gradient[0].abs().sum(0).cpu().numpy()


def attention_of(model: nn.Module, x: Tensor, place: tuple[float, float], layer: int = -1) -> np.ndarray | None:
    """The weights of all tokens in the output of a recurrence for the one at `place`, (h, w); None without recurrences.

    Raises:
        InputError: there are fewer layers.
    """
    record = _Record()
    with torch.no_grad(), record:
        model(x)
    if not record.calls:
        return None
    if not -len(record.calls) <= layer < len(record.calls):
        raise InputError(f"there are {len(record.calls)} recurrences in the model; the layer is {layer}")
    name, operator, args = record.calls[layer]
    names, tokens = recurrences()[name].parameters, recurrences()[name].layout.tokens
    at = names.index(next(value for value in VALUES if value in tokens))
    args = [a.clone() if isinstance(a, Tensor) else a for a in args]
    values = args[at] = args[at].detach().requires_grad_()
    with torch.enable_grad():
        output = operator(*args)
        output = output[0] if isinstance(output, tuple) else output
    merged = bool(args[len(names) + 1])  # (B, L, ...) instead of (B, K, L, ...)
    length = values.shape[2]
    positions = _positions(model, length, x)
    token = int(positions[_at(positions.shape, place)])
    chosen = output.select(1 if merged else 2, token)
    [gradient] = torch.autograd.grad(chosen.float().sum(), values)
    weights = gradient[0].abs().transpose(0, 1).flatten(1).sum(1)
    return weights[positions].cpu().numpy()


class _Record(TorchDispatchMode):
    """Keeps the calls of recurrences: (name, operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = func.namespace == "linescan" and func._opname in recurrences() and func._opname not in LOCAL
        if known and set(VALUES) & set(recurrences()[func._opname].layout.tokens):
            self.calls.append((func._opname, func, args))
        return func(*args, **(kwargs or {}))


# -- features of all kinds --------------------------------------------------------------------------------------------


def _features(model: nn.Module) -> list[dict]:
    """Where the model's maps are, as timm's `feature_info` has it."""
    info = getattr(model, "feature_info", None)
    info = info.info if hasattr(info, "info") else info
    if not info:
        raise InputError(f"this {type(model).__name__} does not say where its features are")
    return list(info)


def _run_with_features(model: nn.Module, x: Tensor, module: str, before: bool = False) -> tuple[Tensor, Tensor]:
    """The model's output for x, and with gradients what comes out of one of its modules, or `before` goes into it."""
    kept: list[Any] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda module, inputs, output: kept.append(inputs if before else output)
    )
    try:
        with torch.enable_grad():
            output = model(x)
    finally:
        handle.remove()
    return output, kept[-1][0] if isinstance(kept[-1], (tuple, list)) else kept[-1]


def _as_map(model: nn.Module, features: Tensor, channels: int, x: Tensor) -> Tensor:
    """Features of one image, maps or tokens, as (h, w, C)."""
    if features.ndim == 4:
        first = features.shape[1] == channels and features.shape[-1] != channels
        last_too = features.shape[1] == features.shape[-1] == channels and not isinstance(model, Backbone)
        return features[0].movedim(0, -1) if first or last_too else features[0]
    positions = _positions(model, features.shape[1], x)
    return features[0][positions]


def _positions(model: nn.Module, length: int, x: Tensor) -> Tensor:
    """The number of the token at each place, (h, w), of `length` tokens; class tokens have none."""
    if isinstance(model, Backbone):
        with torch.no_grad():
            stream, grid, _ = model.embed(x)
        if len(grid) == 2 and stream.ndim == 3 and stream.shape[1] == length:
            numbers = torch.arange(length, device=x.device).float()[None, :, None].expand(1, -1, stream.shape[2])
            return model.to_map(numbers, grid)[0, ..., 0].long()
    height, width = x.shape[-2:]
    before = getattr(model, "num_prefix_tokens", 0)
    for more in dict.fromkeys((before, 0, *range(8))):
        rows = round(((length - more) * height / width) ** 0.5)
        if rows and (length - more) % rows == 0:
            columns = (length - more) // rows
            if abs(rows / columns - height / width) <= 0.5 * max(height / width, 1) / min(rows, columns):
                return torch.arange(more, length, device=x.device).view(rows, columns)
    raise InputError(f"{length} tokens have no places in an image of {height}x{width} pixels")


def _at(size: Sequence[int], place: tuple[float, float]) -> tuple[int, int]:
    """Row and column of a place that is given as shares of the width and the height."""
    across, down = place
    return min(int(down * size[0]), size[0] - 1), min(int(across * size[1]), size[1] - 1)


class Heat(Writer):
    """Pictures of the maps: OUT/NAME-activation.png, NAME-field.png, NAME-attention.png; and, over all images, the mean
    of the receptive fields: OUT/receptive-field.png.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self.fields: dict[tuple[int, ...], list[np.ndarray]] = {}

    def save(self, source: Source, answer: Explanation, frame: int | None = None) -> list[Path]:
        """Writes the pictures of an image, or of a frame."""
        name = source.name if frame is None else f"{source.name}/{frame:06}"
        field = answer.field / max(float(answer.field.max()), 1e-30)
        total = self.fields.setdefault(field.shape, [np.zeros_like(field), np.zeros(())])
        total[0] += field
        total[1] += 1
        return [self._write(f"{name}-{kind}.png", picture) for kind, picture in answer.pictures().items()]

    def _write(self, name: str, picture: Image.Image) -> Path:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            picture.save(file, "PNG")
        return path

    def describe(self, answer: Explanation) -> str:
        """The class that is explained."""
        return f"{answer.label} {100 * answer.probability:.1f} %"

    def as_json(self, answer: Explanation) -> dict:
        """The class that is explained."""
        return {"label": answer.label, "probability": answer.probability}

    def close(self) -> None:
        """Writes the mean of the receptive fields."""
        for total, count in self.fields.values():
            grey = Image.new("RGB", total.shape[::-1])
            self._write("receptive-field.png", draw_heat(np.log10(1 + 1e3 * total / count), grey, 1.0))
