"""What route tables mean: which token each step reads and writes, and whether a table is a right one.

A table is an integer tensor (K, S), or (B, K, S) where every sample has its own. Entry [k, t] is the token that route k
visits at step t, or a negative number:

- ``-1``: a padding token. All token inputs are zero there; the step is taken, its output is dropped.
- ``-(i + 2)``: token i is read once more; the output of this visit is dropped.

A token that no step of a route writes has output zero on that route. A route writes a token at most once.

Tables are checked once per tensor object and number of tokens, and what was found is kept for as long as the object
lives. Tables that `linescan.scans.routes` makes are right by construction and come with what is known of them.
"""

import weakref
from math import prod
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .._compat import unwatched

__all__ = [
    "Visits",
    "check_table",
    "declare",
    "first_routes",
    "is_permutation",
    "is_recording",
    "known",
    "read",
    "visited",
    "write",
]


class Visits(NamedTuple):
    """What is known of a table.

    Attributes:
        length: L, the number of tokens that it was checked for.
        permutation: every route reads and writes every token exactly once, in S = L steps; None where that would have
            to come from the device.
        padding: some step may be a padding token.
        made: made by `linescan.scans.routes` for L tokens, and for no other number.
    """

    length: int
    permutation: bool | None
    padding: bool
    made: bool = False


_known: dict[int, tuple[weakref.ref, int, Visits]] = {}  # by id of the table: the table, its version, what is known


def _version(table: Tensor) -> int:
    return 0 if table.is_inference() else table._version


def _remember(table: Tensor, visits: Visits) -> None:
    key = id(table)
    _known[key] = weakref.ref(table, lambda _: _known.pop(key, None)), _version(table), visits


def known(table: Tensor | None) -> Visits | None:
    """What is known of this very tensor object, if it was checked and not written to since."""
    if torch.compiler.is_compiling():
        return None
    entry = _known.get(id(table))
    if entry is None or entry[0]() is not table or entry[1] != _version(table):
        return None
    return entry[2]


def declare(table: Tensor, length: int, permutation: bool | None = None, padding: bool = True) -> Tensor:
    """Declares a table that was just made to be a right one for `length` tokens, so that nothing checks it again."""
    if not torch.compiler.is_dynamo_compiling():
        _remember(table, Visits(length, permutation, padding, made=True))
    return table


def first_routes(table: Tensor, n: int) -> Tensor:
    """The first n routes of a table, (n, S) or (B, n, S), with what is known of all of them."""
    if table.shape[-2] <= n:
        return table
    part, visits = table[..., :n, :], known(table)
    if visits is not None:
        _remember(part, visits)
    return part


def check_table(name: str, table: Tensor, length: int) -> None:
    """Checks the entries of a table for `length` tokens, unless that is done already.

    On a GPU a table of unknown origin is read back, which waits for the device: once per table. While a CUDA graph is
    recorded nothing can be read back, and the table is taken as it is.

    Raises:
        ValueError: an entry is no token, a route writes a token twice, or the table was made for another grid.
    """
    visits = known(table)
    if visits is not None and visits.length == length:
        return
    if visits is not None and visits.made:
        raise ValueError(f"{name}: the route table was made for {visits.length} tokens, the inputs have {length}")
    if table.is_meta or is_recording(table):
        return
    _remember(table, _inspect(name, table, length))


def is_recording(table: Tensor) -> bool:
    """True while a CUDA graph is recorded."""
    return table.is_cuda and torch.cuda.is_current_stream_capturing()


def _inspect(name: str, table: Tensor, length: int) -> Visits:
    with unwatched():
        entries = table.cpu().numpy().astype(np.int64)
    entries = entries.reshape(prod(entries.shape[:-1]), entries.shape[-1])
    outside = (entries >= length) | (entries < -1 - length)
    if outside.any():
        raise ValueError(
            f"{name}: entry {entries[outside][0]} of the route table is none of the {length} tokens: entries are 0 to "
            f"L - 1, -1 for padding, and -2 to -(L + 1) to read tokens 0 to L - 1 without writing them"
        )
    written = entries >= 0
    places = (np.arange(len(entries))[:, None] * length + entries)[written]
    counts = np.bincount(places)
    if counts.max(initial=0) > 1:
        token = int(counts.argmax()) % length
        raise ValueError(
            f"{name}: the route table visits token {token} twice on one route; a route writes a token once, and an "
            f"entry -(i + 2), here {-token - 2}, reads token i again without writing it"
        )
    permutation = entries.shape[-1] == length and bool(written.all())
    return Visits(length, permutation, bool((entries == -1).any()))


def is_permutation(table: Tensor, length: int) -> bool:
    """Whether every route reads and writes every token exactly once. While a CUDA graph is recorded nothing may come
    from the device, and of a table that was not seen before the answer is no."""
    check_table("a kernel", table, length)
    visits = known(table)
    if visits is not None and visits.permutation is None and not is_recording(table):
        visits = _inspect("a kernel", table, length)._replace(made=visits.made)
        _remember(table, visits)
    return visits is not None and bool(visits.permutation)


def visited(tokens: Sequence[Tensor], route: Tensor | None) -> tuple[int, int, int]:
    """(B, K, L) of a call, from its token inputs (each with K or 1 on the route axis) and its route table."""
    batch, length = tokens[0].shape[0], tokens[0].shape[2]
    routes = max([x.shape[1] for x in tokens])
    if route is not None:
        routes = max(routes, route.shape[-2])
    return batch, routes, length


def _steps(route: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The token read at each step (B, K, S), any token at padding; and the table itself as (B, K, S) int64."""
    table = route.long()
    if table.ndim == 2:
        table = table.expand(batch, *table.shape)
    return torch.where(table < 0, (-2 - table).clamp_min(0), table), table


def read(x: Tensor, route: Tensor | None) -> Tensor:
    """Gathers tokens into time order: x (B, K or 1, L, ...), route (K, S) or (B, K, S) -> (B, K, S, ...)."""
    if route is None:
        return x
    batch, routes, length = x.shape[:3]
    if length == 0:  # nothing but padding
        return x.new_zeros(batch, *route.shape[-2:], *x.shape[3:])
    token, table = _steps(route, batch)
    row = torch.arange(batch, device=x.device)[:, None, None] * routes
    if routes > 1:
        row = row + torch.arange(routes, device=x.device)[:, None]
    flat = x.reshape(batch * routes * length, *x.shape[3:])
    out = flat.index_select(0, (row * length + token).flatten()).reshape(*table.shape, *x.shape[3:])
    visits = known(route)
    if visits is None or visits.padding:
        out = out.masked_fill((table == -1).reshape(*table.shape, *[1] * (x.ndim - 3)), 0)
    return out


def write(y: Tensor, route: Tensor | None, length: int, merge: bool = False) -> Tensor:
    """Puts time-ordered outputs back: y (B, K, S, ...) -> (B, K, L, ...); the inverse of `read` for permutations.

    With `merge` the sum over routes, (B, L, ...).
    """
    if route is None:
        return y.sum(1) if merge else y
    batch, routes, steps = y.shape[:3]
    if steps == 0 or length == 0:
        return y.new_zeros(batch, *[] if merge else [routes], length, *y.shape[3:])
    table = _steps(route, batch)[1]
    if merge and steps < length:  # routes through parts of the tokens: K whole maps would be mostly zeros
        first = torch.arange(batch, device=y.device)[:, None, None] * length
        target = torch.where(table < 0, batch * length, first + table).flatten()
        out = y.new_zeros(batch * length + 1, *y.shape[3:]).index_add(0, target, y.flatten(0, 2))
        return out[:-1].reshape(batch, length, *y.shape[3:])
    row = torch.arange(batch * routes, device=y.device).reshape(batch, routes, 1)
    slots = batch * routes * length  # one more takes what is dropped
    target = torch.where(table < 0, slots, row * length + table).flatten()
    step = target.new_full((slots + 1,), -1).scatter(0, target, torch.arange(target.shape[0], device=y.device))[:-1]
    out = y.flatten(0, 2).index_select(0, step.clamp_min(0))  # gathering is faster than copying to an index
    visits = known(route)
    if visits is None or not visits.permutation:
        out = out.masked_fill((step < 0).reshape(-1, *[1] * (y.ndim - 3)), 0)
    out = out.reshape(batch, routes, length, *y.shape[3:])
    return out.sum(1) if merge else out
