"""Changes of a quantised model's weights and of what is computed between them that leave its function as it is.

    R1  the input of in_proj is rotated: in the stream's own basis where the stream allows it (Vim), else before in_proj
    R2  the inputs of out_proj, and of the MLP's layers, are rotated
    R3  states are rotated over channels before their product with C, and the result back
    R4  states and C are rotated over the state axis          R5  dt is rotated between x_proj and dt_proj
    R6  the input of x_proj is rotated
    S1  the norm's output is divided by s, in_proj's columns multiplied
    S2  the input of out_proj is divided by s: in the gate, in out_norm, or before out_proj
    S3  states are divided by s per channel, the product with C multiplied
    S4  B is divided by s per state, C multiplied              S5  dt is divided by s between x_proj and dt_proj
    S7  the input of the convolution is divided by s, its weights multiplied
    klt the bases of R1 and R5 are Karhunen-Loeve's, then Hadamard's
    mean  dt is shifted by the middle of its range, and what dt_proj makes of that is added after it

Names are those of MambaQuant (arXiv 2501.13484). Everything is folded in float64. Without statistics (to make room for
a file's values) s is 1 and K the identity.
"""

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..backbones.contract import PlainBackbone
from ..backbones.localmamba import LocalVim
from ..backbones.vim import Vim
from ..layers.blocks import Block
from ..layers.mamba import MambaMixer
from ..layers.mlp import Mlp
from ..layers.norm import RMSNorm
from ..layers.ss2d import SS2D
from ..scans.multi_route import Sum
from .hadamard import basis, rotate
from .layers import QuantisedConv, QuantisedLinear, QuantisedScan, ScaledGate, StatesTimesC, Turned
from .quantisers import Quantiser

__all__ = ["ClassRows", "center", "fold", "fold_norms", "has_own_basis", "smoothing"]

SIGNS = 0  # the seed of R1's random signs


@dataclass(frozen=True)
class ClassRows:
    """Rows of a model's class tokens among so many tokens: what `Quantiser` takes as `apart`."""

    place: str
    count: int

    def __call__(self, length: int) -> list[int]:
        return PlainBackbone.class_rows(self.place, length - self.count)


def smoothing(act: Tensor, weight: Tensor, least: float = 1e-2, most: float = float("inf")) -> Tensor:
    """s = sqrt(act / weight) of largest magnitudes, kept within bounds: by what activations are divided (SmoothQuant,
    arXiv 2211.10438, with alpha 0.5).

    Args:
        act: largest magnitude of each channel of activations.
        weight: that of each column of what reads them.
        least, most: of s.
    """
    return (act.double().sqrt() / weight.double().clamp(min=1e-5).sqrt()).clamp(least, most)


def has_own_basis(model: nn.Module) -> bool:
    """Whether the stream can run in any basis: RMS norms before every mixer, and nothing else that knows channels."""
    if not isinstance(model, (Vim, LocalVim)) or getattr(model, "rope", False):
        return False
    if isinstance(model, LocalVim) and not model.has_class_token:
        return False  # rotary embeddings turn pairs of channels
    return all(isinstance(block.norm1, RMSNorm) and block.mlp is None for block in model.blocks)


def _mixers(model: nn.Module) -> Iterator[tuple[Block | None, MambaMixer | SS2D]]:
    """Each mixer with its block, where what its norm gives is read by the mixer alone."""
    owners = {id(m.mixer): m for m in model.modules() if isinstance(m, Block)}
    for module in model.modules():
        if isinstance(module, (MambaMixer, SS2D)) and isinstance(module.in_proj, QuantisedLinear):
            block = owners.get(id(module))
            plain = block is not None and type(block).branch is Block.branch and not block.post_norm
            yield block if plain else None, module


def _scans(mixer: nn.Module) -> list[QuantisedScan]:
    return [m for m in mixer.modules() if isinstance(m, QuantisedScan)]


def _value(layer: nn.Module, name: str = "weight") -> Tensor:
    """The weight that is changed."""
    return layer.weights[name].value.data


def _change(tensor: Tensor, made: Callable[[Tensor], Tensor]) -> None:
    """Changes a weight in place, computed in float64."""
    tensor.copy_(made(tensor.double()))


def _scale(act: nn.Module, weight: Tensor, **limits) -> Tensor:
    """s for what passes `act`, (C,), where columns of `weight` (C,) read it; ones without statistics."""
    found = act.largest if isinstance(act, Quantiser) else None
    return torch.ones_like(weight).double() if found is None else smoothing(found.amax(0), weight, **limits)


def _columns(weight: Tensor) -> Tensor:
    return weight.abs().amax(tuple(range(weight.ndim - 1)))


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """For R1 in the stream's own basis: weights of the norms, and layer scales, go into the mixers' projections."""
    if not has_own_basis(model):
        return
    for block in model.blocks:
        mixer = block.mixer
        _change(_value(mixer.in_proj), lambda w: w * block.norm1.weight.double())
        block.norm1.weight.data.fill_(1.0)
        if mixer.gamma is not None:
            _change(_value(mixer.out_proj), lambda w: w * mixer.gamma.double()[:, None])
            mixer.gamma = None


@torch.no_grad()
def fold(model: nn.Module, transforms: Iterable[str]) -> None:
    """Makes the transforms, smoothing before rotations; "mean" is made by `center`, after another look at dt.

    Args:
        model: of quantised modules; their quantisers have the statistics of a calibration.
        transforms: of `recipes.TRANSFORMS`.
    """
    wanted = set(transforms)
    klt, own = "klt" in wanted, has_own_basis(model)
    pairs = list(_mixers(model))
    for name, change in {"S1": _smooth_norm, "S7": _smooth_conv, "S5": _smooth_dt, "S4": _smooth_states,
                         "S3": _smooth_products, "S2": _smooth_out}.items():  # fmt: skip
        if name in wanted and not (name == "S1" and own and "R1" in wanted):
            for block, mixer in pairs:
                change(block, mixer)
    if "R1" in wanted and own:
        _rotate_stream(model, klt)
    elif "R1" in wanted:
        for _, mixer in pairs:
            _turn(mixer.in_proj)
    for _, mixer in pairs:
        if "R2" in wanted and isinstance(mixer.out_proj, QuantisedLinear):
            _turn(mixer.out_proj)
        for scan in _scans(mixer):
            if "R3" in wanted:
                scan.along.recurrence.turned_channels = True
            if "R4" in wanted:
                _rotate_states(scan)
            if "R5" in wanted:
                _rotate_dt(scan, klt)
            if "R6" in wanted:
                _change(_value(scan, "x_proj"), rotate)
                scan.turned = True
    if "R2" in wanted:
        for mlp in model.modules():
            if isinstance(mlp, Mlp):
                for layer in (mlp.fc1, mlp.fc2):
                    if isinstance(layer, QuantisedLinear):
                        _turn(layer)


def _turn(layer: QuantisedLinear) -> None:
    _change(_value(layer), rotate)
    layer.turned = True


def _rotate_stream(model: Vim | LocalVim, klt: bool) -> None:
    """The stream in another basis R, from the embedding to the last norm; R's K is that of the last mixer's input."""
    dim = model.embed_dim
    spread = model.blocks[-1].mixer.in_proj.acts["x"].spread if klt else None
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(SIGNS)) * 2 - 1
    R = basis(dim, None if spread is None else spread[0], signs)
    _change(model.patch_embed.weight.data, lambda w: torch.einsum("ochw,op->pchw", w, R))
    for table in (model.patch_embed.bias, model.pos_embed, model.cls_token, model.cls_pos_embed):
        if table is not None:
            _change(table.data, lambda x: x @ R)
    for block in model.blocks:
        _change(_value(block.mixer.in_proj), lambda w: w @ R)
        _change(_value(block.mixer.out_proj), lambda w: R.T @ w)
    turned = Turned(dim).to(model.pos_embed)
    turned.basis.copy_(R)
    model.norm = nn.Sequential(turned, model.norm)


def _rotate_states(scan: QuantisedScan) -> None:
    rank, n = scan.split[:2]
    C = _value(scan, "x_proj")[:, rank + n :]
    _change(C, lambda w: rotate(w.mT).mT)
    scan.along.recurrence.turned_states = True


def _rotate_dt(scan: QuantisedScan, klt: bool) -> None:
    rank = scan.split[0]
    into, out = _value(scan, "x_proj")[:, :rank], _value(scan, "dt_proj")
    spread = scan.acts["dt"].spread if klt and isinstance(scan.acts["dt"], Quantiser) else None
    if spread is not None and len(spread) != len(out):
        spread = spread.mean(0, keepdim=True)
    Q = basis(rank, spread)
    _change(into, lambda w: Q.mT @ w)
    _change(out, lambda w: w @ Q)


def _smooth_norm(block: Block | None, mixer: nn.Module) -> None:
    if block is None or getattr(block.norm1, "weight", None) is None:
        return
    weight = _value(mixer.in_proj)
    s = _scale(mixer.in_proj.acts["x"], _columns(weight))
    for own in (block.norm1.weight, getattr(block.norm1, "bias", None)):
        if own is not None:
            _change(own.data, lambda x: x / s)
    _change(weight, lambda w: w * s)


def _smooth_conv(block: Block | None, mixer: nn.Module) -> None:
    layer, name = (mixer, "conv_weight") if isinstance(mixer, MambaMixer) else (mixer.conv, "weight")
    if not isinstance(layer, (QuantisedScan, QuantisedConv)):
        return
    weight = _value(layer, name)
    channel = 1 if isinstance(mixer, MambaMixer) else 0
    shape = [-1 if i == channel else 1 for i in range(weight.ndim)]
    s = _scale(layer.acts["conv"], weight.abs().amax([i for i in range(weight.ndim) if i != channel]))
    _change(weight, lambda w: w * s.view(shape))
    _change(_value(mixer.in_proj)[: len(s)], lambda w: w / s[:, None])


def _smooth_dt(block: Block | None, mixer: nn.Module) -> None:
    for scan in _scans(mixer):
        rank = scan.split[0]
        into, out = _value(scan, "x_proj")[:, :rank], _value(scan, "dt_proj")
        s = _scale(scan.acts["dt"], _columns(out))
        _change(into, lambda w: w / s[:, None])
        _change(out, lambda w: w * s)
        if scan.acts["dt"].spread is not None:
            scan.acts["dt"].spread = scan.acts["dt"].spread / (s[:, None] * s)


def _state_sizes(scan: QuantisedScan) -> Tensor | None:
    """Largest magnitudes of states, (D, N), over routes."""
    largest = scan.along.recurrence.states.largest
    return None if largest is None else largest.amax(0).unflatten(-1, (-1, scan.split[1]))


def _smooth_states(block: Block | None, mixer: nn.Module) -> None:
    for scan in _scans(mixer):
        rank, n = scan.split[:2]
        sizes = _state_sizes(scan)
        if sizes is None:
            continue
        s = smoothing(sizes.amax(0), scan.along.recurrence.C.largest.amax(0), most=100.0)
        weight = _value(scan, "x_proj")
        _change(weight[:, rank : rank + n], lambda w: w / s[:, None])
        _change(weight[:, rank + n :], lambda w: w * s[:, None])


def _smooth_products(block: Block | None, mixer: nn.Module) -> None:
    for scan in _scans(mixer):
        sizes = _state_sizes(scan)
        if sizes is not None:
            scan.along.recurrence.smooth.copy_(smoothing(sizes.amax(1), torch.ones(len(sizes))))


def _smooth_out(block: Block | None, mixer: nn.Module) -> None:
    """In the gate's half of in_proj, or in out_norm, where they are the last before out_proj; else before out_proj."""
    if not isinstance(mixer.out_proj, QuantisedLinear):
        return
    weight = _value(mixer.out_proj)
    s = _scale(mixer.out_proj.acts["x"], _columns(weight))
    if isinstance(mixer, MambaMixer) and isinstance(mixer.along.recurrence, StatesTimesC):
        gate = mixer.along.recurrence.gate if type(mixer.along.merge) is Sum else None
    elif isinstance(mixer, SS2D) and mixer.gate is not None:
        gate = mixer.gate = ScaledGate(mixer.gate, len(s)).to(weight)
    else:
        gate = None
    _change(weight, lambda w: w * s)
    if gate is not None:
        gate.s.copy_(s)
        _change(_value(mixer.in_proj)[-len(s) :], lambda w: w / s[:, None])
    elif isinstance(mixer, SS2D) and isinstance(mixer.out_norm, nn.LayerNorm) and type(mixer.out_act) is nn.Identity:
        for own in (mixer.out_norm.weight, mixer.out_norm.bias):
            _change(own.data, lambda x: x / s)
    else:
        mixer.out_proj.register_buffer("smooth", s.to(weight.dtype))


@torch.no_grad()
def center(model: nn.Module) -> None:
    """Shifts dt by the middle of its range in every channel, and the steps back."""
    for scan in model.modules():
        if isinstance(scan, QuantisedScan) and isinstance(scan.acts["dt"], Quantiser):
            act, weight = scan.acts["dt"], _value(scan, "dt_proj").double()
            if act.least is None:
                continue
            middle = (act.least.double() + act.most.double()) / 2
            if len(middle) != len(weight):
                middle = middle.mean(0, keepdim=True)
            scan.dt_middle.copy_(middle[:, None])
            scan.dt_offset.copy_(scan.dt_middle.double() @ weight.mT)
