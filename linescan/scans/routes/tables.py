"""Tables of token indices, as recurrences read them: made once for a grid and device, cached, constants in a graph."""

from functools import lru_cache
from math import prod
from typing import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .class_tokens import merge_order
from .curves import Grid
from .orders import PADDING, Route, RouteLike, as_grid
from .spec import parse

__all__ = ["inverse", "inverse_table", "pad_slots", "stored_cells", "table"]


def table(
    spec: RouteLike | Sequence[RouteLike], grid: Sequence[int] | str, device: torch.device | str | None = None
) -> Tensor:
    """The table of one or several routes: int32 (K, S), entry [k, t] the token of step t, -1 for a padding step.

    S is the longest route's number of steps; shorter routes are padded on the right (a causal recurrence gives the same
    with it). The same call returns the same tensor, so do not write to it. Inside torch.compile and torch.export it is
    a constant of the graph, and the grid's sides are specialised.

    Args:
        spec: as `parse` takes it.
        grid: (H, W) or (T, H, W).
        device: where the table lives; None: torch's default device.

    Raises:
        ValueError: a name is unknown, the grid is impossible, or routes differ in how class tokens are stored.
    """
    return _cached("table", spec, grid, device)


def inverse_table(
    spec: RouteLike | Sequence[RouteLike], grid: Sequence[int] | str, device: torch.device | str | None = None
) -> Tensor:
    """The inverse of `table`, cached as it is: int32 (K, L), entry [k, i] the step at which route k visits token i."""
    return _cached("inverse", spec, grid, device)


def _cached(what: str, spec, grid, device) -> Tensor:
    if torch.compiler.is_dynamo_compiling():  # what goes into a graph is made from plain Python values
        spec = _text(spec)
        if not isinstance(grid, str):
            grid = tuple([torch.fx.experimental.symbolic_shapes.guard_scalar(n) for n in grid])
    return _constant(what, spec, grid, device)


def _text(spec) -> str:
    if isinstance(spec, str):
        return spec
    return spec.spec if isinstance(spec, Route) else ", ".join([_text(part) for part in spec])


# torch.compile puts the call into its graph and then runs it, as torch.export does, in the modes that trace the graph.
@torch.compiler.allow_in_graph
def _constant(what: str, spec, grid, device) -> Tensor:
    """The cached tensor; to anything that traces, it is a constant as `torch.tensor(...)` would be."""
    make = {"table": _table, "inverse": _inverse_table}[what]
    key = parse(spec), as_grid(grid), _device(device)
    if not _get_current_dispatch_mode_stack():
        return make(*key)
    with _disable_current_modes():  # never keep a fake tensor
        constant = make(*key)
    return torch.ops.aten.lift_fresh(constant)


def _device(device) -> torch.device:
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@lru_cache(maxsize=1024)
def _table(routes: tuple[Route, ...], grid: Grid, device: torch.device) -> Tensor:
    if len({route.stored for route in routes}) > 1:
        raise ValueError(f"routes of one table store the same class tokens, got {', '.join(map(str, routes))}")
    orders = [route.order(grid) for route in routes]
    steps = max(map(len, orders))
    rows = [np.pad(order, (0, steps - len(order)), constant_values=PADDING) for order in orders]
    with torch.inference_mode(False):  # what inference makes cannot be saved for a backward later
        return torch.from_numpy(np.stack(rows)).to(device)


@lru_cache(maxsize=1024)
def _inverse_table(routes: tuple[Route, ...], grid: Grid, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return inverse(_table(routes, grid, torch.device("cpu")), routes[0].length(grid)).to(device)


def inverse(table: Tensor, length: int) -> Tensor:
    """The step that writes each token: table (..., S) -> int32 (..., length), -1 for a token that no step writes.

    Padding steps and visits with a dropped output, -(i + 2), write nothing.
    """
    steps = torch.arange(table.shape[-1], dtype=torch.int32, device=table.device).expand(table.shape)
    slots = torch.where(table < 0, length, table).long()  # one more slot takes what is dropped
    written = torch.full((*table.shape[:-1], length + 1), PADDING, dtype=torch.int32, device=table.device)
    return written.scatter(-1, slots, steps)[..., :length]


def pad_slots(table: Tensor, length: int) -> tuple[Tensor, int]:
    """Gives every padding step a token of its own: table (..., S) -> (table without -1, number of slots to append).

    For systems whose padding is more than a zero input (LocalVim's convolution bias makes it non-zero): append that
    many zero tokens to the `length` stored ones, and drop them from the output. Each route numbers its padding steps
    from `length` in order of time.

    Args:
        table: every route visits each of the `length` tokens exactly once, as all of `table` do.
        length: number of stored tokens.

    Raises:
        ValueError: the table is too short for that.
    """
    slots = table.shape[-1] - length
    if slots < 0:
        raise ValueError(f"pad_slots: {table.shape[-1]} steps cannot visit {length} tokens")
    padding = table == PADDING
    number = padding.cumsum(-1, dtype=torch.int32) + (length - 1)
    return torch.where(padding, number, table), slots


def stored_cells(route: Route, grid: Grid) -> np.ndarray:
    """Which cell of the grid each stored token is; class tokens count on from the last cell."""
    return np.array(merge_order(prod(grid), route.stored))
