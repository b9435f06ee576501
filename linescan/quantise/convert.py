"""A float model to a quantised one: layers take part, transforms are folded, images calibrate, weights are rounded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layers.mamba import MambaMixer
from ..layers.s6 import S6Scan
from .layers import (
    QuantisedConv,
    QuantisedLinear,
    QuantisedMamba,
    QuantisedModule,
    QuantisedScan,
    StatesTimesC,
    become,
    integer_product,
)
from .quantisers import Quantiser, Weight, fit_grid
from .recipes import Recipe
from .transforms import ClassRows, center, fold, fold_norms

__all__ = [
    "LayerError",
    "arithmetic",
    "convert",
    "freeze",
    "layer_errors",
    "passes",
    "quantise",
    "restructure",
    "transform",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TABLES = ("A_log", "D", "dt_bias")  # of a scan, which quamba rounds too


def _set_mode(model: nn.Module, mode: str) -> None:
    """The mode of all quantisers, see `Quantiser`; of weights "on" or "off"."""
    for module in model.modules():
        if isinstance(module, Quantiser):
            module.mode = mode
        elif isinstance(module, Weight):
            module.mode = "on" if mode == "on" else "off"


class _Maker:
    """Makes the quantisers and the weights that a recipe asks for."""

    def __init__(self, recipe: Recipe, apart: ClassRows | None):
        self.recipe, self.plan, self.apart = recipe, recipe.plan, apart

    def act(self, observer: str | None = None, **changes) -> Quantiser:
        plan = self.plan
        facts = {"scales": plan.scales, "observer": observer or plan.observer, "smallest": plan.smallest}
        return Quantiser(self.recipe.act_bits, plan.symmetric, **{**facts, **changes})

    def product(self) -> Quantiser:
        """Of the states, and of C."""
        if self.plan.products == "token":
            return Quantiser(8, scales="token")
        return self.act()

    def weight(self, value: Tensor, axes: int, group: bool = False) -> Weight:
        """`axes` leading ones have scales of their own, one fewer where a whole weight has one."""
        plan = self.plan
        size = plan.group if group and self.recipe.weight_bits == 4 else 0
        return Weight(value, self.recipe.weight_bits, axes if plan.by_row else axes - 1, plan.symmetric, size)


@torch.no_grad()
def convert(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Gives the model's layers the points of a recipe, in place; nothing is rounded yet, and all quantisers are off.

    Linear layers, convolutions and selective scans take part, but for what is named "patch" (the embedding).

    Raises:
        InputError: the model has no such layer, or is quantised already.
    """
    if any(isinstance(module, QuantisedModule) for module in model.modules()):
        raise InputError("this model is quantised already")
    place = getattr(model, "class_token", None)
    make = _Maker(recipe, ClassRows(place, model.cls_token.shape[1]) if recipe.plan.apart and place else None)
    scans = recipe.plan.scans
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if "patch" in name:
            continue
        if type(module) is nn.Linear:
            _convert_linear(module, name, make)
        elif scans and isinstance(module, CONVOLUTIONS) and "weight" in module._parameters:
            become(module, QuantisedConv, {"weight": make.weight(module.weight, 1)}, {"conv": make.act()})
        elif scans and isinstance(module, S6Scan):
            _convert_scan(module, make)
    if not any(isinstance(module, QuantisedModule) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no Linear layer to quantise")
    _set_mode(model, "off")
    return model.eval()


def _convert_linear(layer: nn.Linear, name: str, make: _Maker) -> None:
    last = name.rpartition(".")[2]
    apart = {"apart": make.apart} if make.apart and last == "out_proj" else {}
    acts = {"x": make.act(**apart), "y": nn.Identity()}
    if make.plan.scans == "inputs" and last == "in_proj":
        acts["y"] = make.act()
    become(layer, QuantisedLinear, {"weight": make.weight(layer.weight, 1, group=True)}, acts)


def _convert_scan(scan: S6Scan, make: _Maker) -> None:
    plan, off = make.plan, nn.Identity
    mamba = isinstance(scan, MambaMixer)
    names = ["x_proj", "dt_proj", *(["conv_weight"] if mamba else [])]
    weights = {name: make.weight(getattr(scan, name), 2) for name in names}
    states, inputs = plan.scans == "states", plan.scans == "inputs"
    acts = {
        "u": make.act(plan.scan_observer) if inputs else off(),
        "x": make.act() if states else off(),
        "dbc": make.act() if inputs else off(),
        "dt": make.act() if states else off(),
        "delta": make.act() if inputs else off(),
    }
    if mamba:
        acts["conv"] = make.act() if states else off()
    become(scan, QuantisedMamba if mamba else QuantisedScan, weights, acts)
    sets, dim, rank = scan.weights["dt_proj"].shape
    scan.register_buffer("dt_middle", scan.D.new_zeros(sets, 1, rank))
    scan.register_buffer("dt_offset", scan.D.new_zeros(sets, 1, dim))
    if states:
        scan.along.recurrence = StatesTimesC(dim, make.product(), make.product()).to(scan.D)


def restructure(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A float model as one that has a quantised file's tensors, in place; their values are yet to be loaded."""
    freeze(transform(model, recipe), recipe)
    return finish(model)


@torch.no_grad()
def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Settles all scales and makes integers of all weights; the weights as they were stay, until `finish`."""
    for module in model.modules():
        if isinstance(module, Quantiser):
            module.settle()
        elif isinstance(module, Weight):
            module.freeze()
        if isinstance(module, QuantisedScan) and recipe.plan.scans == "inputs":
            for name in TABLES:
                table = getattr(module, name)
                table.copy_(fit_grid(table.amin(), table.amax(), 8, True)(table))
    _set_mode(model, "on")


def finish(model: nn.Module) -> nn.Module:
    """Leaves only the integers, and returns the model."""
    for module in model.modules():
        if isinstance(module, Weight):
            module.drop()
    return model


Progress = Callable[..., object]


def silent(*args, **kwargs) -> None:
    """Progress that is not shown."""


def _look(model: nn.Module, batches: Iterable[Tensor], progress: Progress, description: str) -> None:
    for batch in batches:
        model(batch)
        progress(1, description=description)


@torch.no_grad()
def transform(
    model: nn.Module, recipe: Recipe, batches: Sequence[Tensor] = (), progress: Progress = silent
) -> nn.Module:
    """Converts a model and makes the recipe's transforms, by statistics of `batches`: its function is as it was."""
    transforms = recipe.plan.transforms
    convert(model, recipe)
    if "R1" in transforms:
        fold_norms(model)
    if transforms:
        _set_mode(model, "statistics")
        for act in _bases(model):
            act.covariance = "klt" in transforms
        _look(model, batches, progress, "statistics")
        _set_mode(model, "off")
        fold(model, transforms)
        _start(model)
    if "mean" in transforms:
        for scan in model.modules():
            if isinstance(scan, QuantisedScan) and isinstance(scan.acts["dt"], Quantiser):
                scan.acts["dt"].mode = "statistics"
        _look(model, batches, progress, "the middle of dt")
        _set_mode(model, "off")
        center(model)
        _start(model)
    return model


@torch.no_grad()
def quantise(
    model: nn.Module, recipe: Recipe, batches: Sequence[Tensor] = (), progress: Progress = silent
) -> list["LayerError"]:
    """Quantises a model in place.

    Args:
        model: of the float weights.
        recipe: how.
        batches: inputs of the model to calibrate on, read `passes` times. Methods that need none take them for the
            report.
        progress: called after each batch of each pass, with `description=`.

    Returns:
        What rounding does to each layer by itself; empty without batches.

    Raises:
        InputError: no images for a method that needs some, or a model that cannot be quantised.
    """
    if recipe.calibrated and not len(batches):
        raise InputError(f"{recipe.method} is calibrated on images")
    transform(model, recipe, batches, progress)
    if recipe.plan.scales == "static":
        _set_mode(model, "observe")
        _look(model, batches, progress, "scales")
    freeze(model, recipe)
    errors = layer_errors(model, batches, progress) if len(batches) else []
    finish(model)
    return errors


def passes(recipe: Recipe) -> int:
    """How often `quantise` reads its batches."""
    plan = recipe.plan
    return bool(plan.transforms) + ("mean" in plan.transforms) + (plan.scales == "static") + 1


def _start(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Quantiser):
            module.start()


def _bases(model: nn.Module) -> Iterator[Quantiser]:
    """Those whose covariance R1 and R5 read."""
    linears = [m.in_proj for m in model.modules() if isinstance(getattr(m, "in_proj", None), QuantisedLinear)]
    if linears:
        yield linears[-1].acts["x"]
    for scan in model.modules():
        if isinstance(scan, QuantisedScan) and isinstance(scan.acts["dt"], Quantiser):
            yield scan.acts["dt"]


# -- what rounding does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerError:
    """What rounding does to a layer, whose inputs are as they would be without it.

    Attributes:
        layer: its name.
        kind: "linear", "conv", "scan" or "mixer".
        integer: whether its products are made in int8 here.
        weight: error of its weights, root mean square relative to the weights'.
        largest: largest magnitude of its inputs.
        output: error of its outputs, relative to the outputs.
    """

    layer: str
    kind: str
    integer: bool
    weight: float
    largest: float
    output: float

    @property
    def decibels(self) -> float:
        """Signal over noise of the outputs."""
        return -20 * float(torch.tensor(max(self.output, 1e-12)).log10())


KINDS = {QuantisedLinear: "linear", QuantisedConv: "conv", QuantisedMamba: "mixer", QuantisedScan: "scan"}


@torch.no_grad()
def layer_errors(model: nn.Module, batches: Iterable[Tensor], progress: Progress = silent) -> list[LayerError]:
    """Measures each layer of a model after `freeze` and before `finish`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedModule)}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in layers}  # of errors and outputs, squared; inputs

    def compare(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, options: dict, output: Any) -> None:
            with _rounding(module):
                rounded = type(module).forward(module, *args, **options)
            if isinstance(output, tuple):  # with the state
                rounded, output = rounded[0], output[0]
            found = sums[name]
            found[0] += (rounded - output).double().square().sum()
            found[1] += output.double().square().sum()
            found[2] = max(found[2], args[0].abs().max())

        return hook

    _set_mode(model, "off")
    handles = [m.register_forward_hook(compare(name), with_kwargs=True) for name, m in layers.items()]
    try:
        for batch in batches:
            model(batch)
            progress(1, description="errors of layers")
    finally:
        for handle in handles:
            handle.remove()
        _set_mode(model, "on")
    found = []
    for name, module in layers.items():
        error, signal, largest = sums[name].tolist()
        relative = [(w() - w.value).norm() / w.value.norm().clamp(min=1e-12) for w in module.weights.values()]
        kind = next(word for cls, word in KINDS.items() if isinstance(module, cls))
        weight = float(torch.stack(relative).square().mean().sqrt())
        found.append(LayerError(name, kind, _is_integer(module), weight, largest, (error / max(signal, 1e-30)) ** 0.5))
    return found


@contextmanager
def _rounding(module: nn.Module) -> Iterator[None]:
    """Inside, this module rounds, and nothing watches those in it."""
    hooks = {m: m._forward_hooks.copy() for m in module.modules()}
    for m in hooks:
        m._forward_hooks.clear()
    _set_mode(module, "on")
    try:
        yield
    finally:
        _set_mode(module, "off")
        for m, own in hooks.items():
            m._forward_hooks.update(own)


def _is_integer(module: nn.Module) -> bool:
    """Whether a layer's products are made in int8, where it is."""
    if not isinstance(module, QuantisedLinear):
        return False
    weight = module.weights["weight"]
    probe = torch.zeros(1, weight.shape[-1], device=weight.codes.device)
    return integer_product(probe, module.acts["x"], weight) is not None


def arithmetic(model: nn.Module) -> str:
    """In which arithmetic a quantised model runs where it is, in a few words."""
    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    integer = sum(map(_is_integer, layers))
    simulated = ["the other linear layers"] if 0 < integer < len(layers) else [] if integer else ["linear layers"]
    if any(isinstance(m, QuantisedScan) for m in model.modules()):
        simulated.append("scans")
    if any(isinstance(m, (QuantisedConv, QuantisedMamba)) for m in model.modules()):
        simulated.append("convolutions")
    words = [f"{integer} of {len(layers)} linear layers in int8"] if integer else []
    return "; ".join(words + ([f"{', '.join(simulated)} simulated in float32"] if simulated else []))
