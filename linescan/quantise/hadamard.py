"""Orthogonal bases that spread the variance of channels: Hadamard matrices of many orders, and Karhunen-Loeve's.

A rotation acts on the last axis: x R. After the Karhunen-Loeve basis K of x, then a Hadamard matrix H of entries
+-1/sqrt(n), every channel of x K H has the same variance, the mean of the eigenvalues (MambaQuant, Xu et al., ICLR
2025, arXiv 2501.13484, section 4.1).

Orders are m 2^k, where m is 1 or one of `ORDERS`; their matrices are Paley's of both kinds and Williamson's, with the
signs of Sloane's tables (neilsloane.com/hadamard), which QuaRot and MambaQuant share.
"""

from functools import cache
from math import sqrt

import torch
from torch import Tensor

__all__ = ["ORDERS", "basis", "factors", "hadamard", "klt", "rotate", "rotate_back"]

ORDERS = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)
"""Orders of the matrices that are no power of two, in the order in which a divisor is looked for."""

# The first rows of Williamson's four symmetric circulant blocks, their first half.
_WILLIAMSON = {
    52: ("+-+--++", "+---+++", "++-+--+", "+----+-"),
    156: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    172: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}


def _circulant(row: Tensor) -> Tensor:
    return torch.stack([row.roll(i) for i in range(len(row))])


def _residues(q: int) -> Tensor:
    """Legendre's symbol of 0, ..., q - 1."""
    squares = {i * i % q for i in range(1, q)}
    return torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)


def _paley(q: int) -> Tensor:
    """Order q + 1, for a prime q = 3 mod 4."""
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[1:, 0] = -1
    core[1:, 1:] = _circulant(_residues(q)) + torch.eye(q, dtype=torch.float64)
    return core


def _paley_doubled(q: int) -> Tensor:
    """Order 2 q + 2, for a prime q = 1 mod 4."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _circulant(_residues(q))
    one = torch.eye(q + 1, dtype=torch.float64)
    plus, minus = conference + one, conference - one
    return torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, -plus], 1)])


def _williamson(halves: tuple[str, ...]) -> Tensor:
    blocks = []
    for half in halves:
        row = torch.tensor([1.0 if sign == "+" else -1.0 for sign in half], dtype=torch.float64)
        blocks.append(_circulant(torch.cat([row, row[1:].flip(0)])))
    a, b, c, d = blocks
    rows = ((a, -b, -c, -d), (b, a, d, -c), (c, -d, a, b), (d, c, -b, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


@cache
def _core(m: int) -> Tensor:
    """The matrix of order m, one of `ORDERS`, or a power of two; entries +-1, float64."""
    if m in (12, 20, 60, 108, 140):
        return _paley(m - 1)
    if m in (28, 36):
        return _paley_doubled(m // 2 - 1)
    if m in _WILLIAMSON:
        return _williamson(_WILLIAMSON[m])
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.ones(1, 1, dtype=torch.float64) if m == 1 else torch.kron(two, _core(m // 2))


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@cache
def factors(n: int) -> tuple[int, int, int]:
    """(blocks, m, 2^k) with blocks m 2^k = n: what `rotate` is made of at n channels.

    `blocks` is 1 where there is a matrix of order n; otherwise the channels are rotated in blocks, as few as possible:
    6 = 3 x 2, for one.
    """
    for blocks in range(1, n + 1):
        order = n // blocks
        if n % blocks == 0:
            m = next((m for m in ORDERS if order % m == 0), 1)
            if _is_power_of_two(order // m):
                return blocks, m, order // m
    raise ValueError(f"{n} channels")


_LARGEST = 64  # of a Sylvester matrix that is multiplied as it is; larger ones are products of two


def _parts(n: int) -> tuple[list[int], float]:
    blocks, m, power = factors(n)
    split = [power] if power <= _LARGEST else [power // _LARGEST, _LARGEST]
    return [blocks, m, *split], 1 / sqrt(n // blocks)


def _apply(x: Tensor, back: bool) -> Tensor:
    sides, scale = _parts(x.shape[-1])
    y = x.unflatten(-1, sides)
    for axis, side in enumerate(sides[1:], 1 - len(sides)):
        if side > 1:
            matrix = _core(side).to(y)
            y = torch.movedim(torch.movedim(y, axis, -1) @ (matrix.T if back else matrix), -1, axis)
    return y.flatten(-len(sides)) * scale


def rotate(x: Tensor) -> Tensor:
    """x H, over the last axis of any number of channels; H is orthogonal, of entries +-1/sqrt(n) where `factors` has
    one block."""
    return _apply(x, False)


def rotate_back(x: Tensor) -> Tensor:
    """x H^T: undoes `rotate`."""
    return _apply(x, True)


def hadamard(n: int, signs: Tensor | None = None) -> Tensor:
    """H (n, n), float64, in whose rows the unit vectors are rotated; with `signs` (n,) of +-1, diag(signs) H."""
    one = torch.eye(n, dtype=torch.float64)
    return rotate(one if signs is None else one * signs.double()[:, None])


def klt(covariance: Tensor) -> Tensor:
    """The Karhunen-Loeve basis K (..., n, n), float64, of a covariance: x K has uncorrelated channels, of ascending
    variance. Of a covariance that is zero the identity."""
    covariance = covariance.double()
    one = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device)
    known = covariance.abs().amax((-2, -1), keepdim=True) > 0
    return torch.where(known, torch.linalg.eigh(covariance).eigenvectors, one)


def basis(n: int, covariance: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """An orthogonal basis (..., n, n), float64: H, or with a covariance K H."""
    rotation = hadamard(n, signs)
    return rotation if covariance is None else klt(covariance) @ rotation
