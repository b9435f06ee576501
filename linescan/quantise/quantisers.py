"""From numbers to integers and back: ranges observed in calibration, scales, and weights that are kept as integers.

The asymmetric grid is MambaQuant's (arXiv 2501.13484), the symmetric one Quamba's (arXiv 2410.13229); both round half
to even.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import known

__all__ = ["Grid", "Integers", "MinMax", "MovingPercentile", "Percentile", "Quantiser", "Weight", "fit_grid"]

SMALLEST, LARGEST = 1e-5, 1e4  # of a scale


class Grid(NamedTuple):
    """Integers q stand for (q - zero) scale; `scale` and `zero` broadcast against what is quantised."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def codes(self, x: Tensor) -> Tensor:
        """The nearest integers, as floats."""
        return (x / self.scale).round_().add_(self.zero).clamp_(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """What integers stand for."""
        return (codes - self.zero) * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """x, as the integers have it."""
        return self.values(self.codes(x))


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the largest integer: -2^(bits-1) and 2^(bits-1) - 1, or 0 and 2^bits - 1."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def fit_grid(least: Tensor, most: Tensor, bits: int, symmetric: bool, smallest: float = SMALLEST) -> Grid:
    """The grid over a range: scale (most - least) / (2^bits - 1), or of the larger magnitude / (2^(bits-1) - 1).

    Args:
        least, most: of what is quantised.
        bits: of the integers, 2 to 8.
        symmetric: zero stands for zero; else the range is covered as it is.
        smallest: of scales.
    """
    low, high = limits(bits, symmetric)
    if symmetric:
        scale = (torch.maximum(least.abs(), most.abs()) / high).clamp(smallest, LARGEST)
        return Grid(scale, torch.zeros_like(scale), low, high)
    scale = ((most - least) / high).clamp(smallest, LARGEST)
    return Grid(scale, (-least / scale).clamp(-LARGEST, LARGEST).round(), low, high)


# -- observers ---------------------------------------------------------------------------------------------------------


class MinMax:
    """The smallest and the largest number of all batches, and zero."""

    def __init__(self):
        self.least = self.most = None

    def update(self, x: Tensor) -> None:
        """One batch."""
        least, most = x.amin().clamp(max=0), x.amax().clamp(min=0)
        self.least = least if self.least is None else torch.minimum(self.least, least)
        self.most = most if self.most is None else torch.maximum(self.most, most)

    def range(self) -> tuple[Tensor, Tensor] | None:
        """Least and most; None before the first batch."""
        return None if self.least is None else (self.least, self.most)


class Percentile:
    """What bounds a share of the negative and of the positive numbers, by a histogram, linear inside a bin.

    A bin is the first batch's largest magnitude over 1,024 wide; the middle one is around zero and belongs to both
    sides. The histogram grows with larger numbers (MambaQuant).

    Args:
        share: of the numbers on one side.
    """

    BINS = 1024  # on each side, of the first batch

    def __init__(self, share: float = 0.999999):
        self.share, self.width, self.counts = share, None, None

    def update(self, x: Tensor) -> None:
        """One batch."""
        x = x.detach().float().flatten()
        if self.width is None:
            self.width = (x.abs().amax() / self.BINS).clamp(min=10 * torch.finfo(torch.float32).eps)
        x = x / self.width
        before = 0 if self.counts is None else len(self.counts) // 2
        reach = max(int(torch.ceil(x.abs().amax() - 0.5)), before)
        counts = torch.histc(x, 2 * reach + 1, -reach - 0.5, reach + 0.5)
        if self.counts is not None:
            counts[reach - before : reach + before + 1] += self.counts
        self.counts = counts

    def range(self) -> tuple[Tensor, Tensor] | None:
        """Least and most; None before the first batch."""
        if self.counts is None:
            return None
        middle = len(self.counts) // 2
        return -self._bound(self.counts[: middle + 1].flip(0)), self._bound(self.counts[middle:])

    def _bound(self, counts: Tensor) -> Tensor:
        """Where the share of a side ends; its first bin is the middle one."""
        total = counts.cumsum(0)
        wanted = self.share * total[-1]
        i = int((total >= wanted).int().argmax())
        inside = total[i] - total[max(i - 1, 0)] + 10 * torch.finfo(torch.float32).eps
        beyond = ((total[i] - wanted) / inside).clamp(0, 1)
        return (i + 0.5 - beyond).clamp(min=0) * self.width


class MovingPercentile:
    """A quantile of the magnitudes, moved by a hundredth towards each further batch's; symmetric (Quamba).

    Args:
        share: of the magnitudes.
        signed: observe both ends by themselves, at `share` and 1 - `share`.
    """

    RATE = 0.01
    MOST = 2**24  # numbers whose quantile torch computes

    def __init__(self, share: float = 0.9995, signed: bool = False):
        self.share, self.signed = share, signed
        self.least = self.most = None

    def update(self, x: Tensor) -> None:
        """One batch."""
        x = x.detach().float().flatten()
        x = x[:: -(-len(x) // self.MOST)]
        most = (x if self.signed else x.abs()).quantile(self.share)
        least = x.quantile(1 - self.share) if self.signed else -most
        self.least = least if self.least is None else self.least + self.RATE * (least - self.least)
        self.most = most if self.most is None else self.most + self.RATE * (most - self.most)

    def range(self) -> tuple[Tensor, Tensor] | None:
        """Least and most; None before the first batch."""
        return None if self.least is None else (self.least, self.most)


OBSERVERS = {"minmax": MinMax, "percentile": Percentile, "moving": MovingPercentile}


# -- modules -----------------------------------------------------------------------------------------------------------


class Quantiser(nn.Module):
    """Activations as integers have them; `mode` says what a call does.

    "off" returns x. "statistics" returns x and keeps the least and the most of every channel and, with `covariance`,
    the covariance of channels in the first batch. "observe" returns x and sees its range. "on" quantises.

    Args:
        bits: of the integers.
        symmetric: see `fit_grid`.
        scales: "static" (one, from calibration), or found anew for each "sample" or "token" (the last axis).
        observer: of static scales, a key of `OBSERVERS`.
        smallest: of scales.
        apart: a function from the number of tokens to rows that have a static scale of their own (class tokens).
    """

    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        bits: int,
        symmetric: bool = False,
        scales: str = "static",
        observer: str = "minmax",
        smallest: float = SMALLEST,
        apart=None,
    ):
        super().__init__()
        self.bits, self.symmetric, self.smallest, self.apart = bits, symmetric, smallest, apart
        self.scales = known("scales", scales, ("static", "sample", "token"))
        self.observer = known("observer", observer, tuple(OBSERVERS))
        self.mode, self.covariance = "on", False
        if scales == "static":
            self.register_buffer("scale", torch.ones(2 if apart else 1))
            self.register_buffer("zero", torch.zeros(2 if apart else 1))
        self.start()

    def start(self) -> None:
        """Forgets what was observed, and the statistics."""
        self.least = self.most = self.spread = None
        self.seen = [OBSERVERS[self.observer]() for _ in range(2 if self.apart else 1)]

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {self.scales}"

    def settle(self) -> None:
        """Sets the static scales from what was observed; unseen ones stay."""
        if self.scales != "static":
            return
        for i, observer in enumerate(self.seen):
            if found := observer.range():
                least, most = found
                grid = fit_grid(least, most, self.bits, self.symmetric, self.smallest)
                self.scale[i], self.zero[i] = grid.scale, grid.zero
        self.start()

    def grid(self, x: Tensor) -> Grid:
        """The grid for x (..., C); tokens that stand apart are told in x (B, L, C)."""
        if self.scales == "static":
            rows = self.rows(x)
            part = torch.tensor([[i in rows] for i in range(x.shape[1])] if rows else [0], device=x.device).long()
            return Grid(self.scale.to(x)[part], self.zero.to(x)[part], *limits(self.bits, self.symmetric))
        axes = -1 if self.scales == "token" else tuple(range(1, x.ndim))
        least, most = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        return fit_grid(least, most, self.bits, self.symmetric, self.smallest)

    def rows(self, x: Tensor) -> list[int]:
        """The rows of tokens (B, L, C) that have a scale of their own."""
        return self.apart(x.shape[1]) if self.apart and x.ndim == 3 else []

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "on":
            return self.grid(x)(x)
        if self.mode == "statistics":
            self.gather(x)
        elif self.mode == "observe":
            rows = self.rows(x)
            if rows:
                self.seen[1].update(x[:, rows])
            self.seen[0].update(x[:, [i for i in range(x.shape[1]) if i not in rows]] if rows else x)
        return x

    def gather(self, x: Tensor) -> None:
        """The statistics of a batch (..., C); those of (B, K, L, C) are of each route by itself."""
        routes = (x if x.ndim == 4 else x.flatten(0, -2)[:, None, None]).transpose(0, 1).flatten(1, 2)
        least, most = routes.amin(1), routes.amax(1)
        if self.least is not None:
            least, most = torch.minimum(self.least, least), torch.maximum(self.most, most)
        self.least, self.most = least, most
        if self.covariance and self.spread is None:
            centred = routes.double() - routes.double().mean(1, keepdim=True)
            self.spread = centred.mT @ centred / max(centred.shape[1] - 1, 1)

    @property
    def largest(self) -> Tensor | None:
        """The largest magnitude of every channel, (routes or 1, C); None before any statistics."""
        return None if self.least is None else torch.maximum(-self.least, self.most).clamp(min=0)


class Integers(NamedTuple):
    """A weight as a matrix of integers: codes (out, in) int8, and for each row `scale` and `zero` (out, 1)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Weight(nn.Module):
    """A weight that is kept as integers, with a scale for every part.

    It starts as the parameter `value`, which transforms change. `freeze` makes integers of it: int8, or for 4 bits two
    in each uint8.

    Args:
        value: the weight.
        bits: of the integers.
        axes: how many of the leading axes have scales of their own: 0 for one scale.
        symmetric: see `fit_grid`.
        group: numbers on the last axis that share a scale, 0 for all.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, value: Tensor, bits: int, axes: int, symmetric: bool, group: int = 0):
        super().__init__()
        self.bits, self.axes, self.symmetric = bits, axes, symmetric
        self.shape = value.shape
        self.group = group if group and value.shape[-1] % group == 0 else 0
        self.value = nn.Parameter(value.detach().clone(), requires_grad=False)
        self.mode = "off"

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}"

    def _parts(self, x: Tensor) -> Tensor:
        """(parts, numbers), one scale each."""
        if self.group:
            return x.reshape(-1, self.group)
        return x.reshape(*self.shape[: self.axes], -1).reshape(-1, self.shape[self.axes :].numel())

    def freeze(self) -> None:
        """Makes integers of the value, which stays until `drop`."""
        parts = self._parts(self.value.detach())
        least, most = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
        if self.symmetric:  # Quamba bounds the magnitude, MambaQuant the scale
            most = torch.maximum(-least, most).clamp(min=SMALLEST)
        smallest = 0.0 if self.symmetric else SMALLEST
        grid = fit_grid(least.clamp(max=0), most.clamp(min=0), self.bits, self.symmetric, smallest)
        middle = 0 if self.symmetric else 2 ** (self.bits - 1)
        codes = (grid.codes(parts) - middle).to(torch.int8)
        if self.bits <= 4:
            flat = codes.flatten()
            flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)]) & 15
            codes = (flat[::2] | flat[1::2] << 4).to(torch.uint8)
        for name, tensor in (("codes", codes.view(self.shape) if self.bits > 4 else codes), ("scale", grid.scale),
                             ("zero", grid.zero - middle)):  # fmt: skip
            self.register_buffer(name, tensor.contiguous())
        self.mode = "on"

    def drop(self) -> None:
        """Leaves only the integers."""
        self.value = None

    def integers(self) -> Integers:
        """The codes as int8 in parts (parts, numbers), with the scale and the zero of each."""
        codes = self.codes
        if self.bits <= 4:
            low, high = codes << 4, codes & 0xF0
            pairs = torch.stack([low, high], -1).flatten()[: self.shape.numel()]
            codes = pairs.view(torch.int8) >> 4
        return Integers(self._parts(codes), self.scale, self.zero)

    def forward(self) -> Tensor:
        """The weight as its integers have it; before `freeze`, or in mode "off", as it is."""
        if self.mode == "off":
            return self.value
        codes, scale, zero = self.integers()
        return ((codes - zero) * scale).reshape(self.shape)
