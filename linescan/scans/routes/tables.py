"""Tables of token indices, as recurrences read them: made once for a grid and device, cached, constants in a graph."""

from collections import OrderedDict
from functools import reduce
from math import prod
from threading import Lock
from typing import Callable, Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import dispatch_modes_active, is_watched, unwatched
from ..visits import declare, known
from .class_tokens import merge_order
from .curves import Grid
from .orders import PADDING, Route, RouteLike, Shuffle, as_grid
from .spec import parse

__all__ = ["cache_limit", "inverse", "inverse_table", "pad_slots", "redrawn", "stored_cells", "table"]


MOST_ENTRIES = 2**28  # of one table: a gibibyte


class _Cache:
    """Tensors by key, the least recently used ones dropped where all together exceed a number of bytes."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = Lock()

    def find(self, key: Hashable) -> Tensor | None:
        with self.lock:
            found = self.entries.get(key)
            if found is not None:
                self.entries.move_to_end(key)
            return found

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        found = self.find(key)
        if found is not None:
            return found
        made = make()
        with self.lock:
            found = self.entries.setdefault(key, made)  # another thread may have been faster
            if found is made:
                self.bytes += made.nbytes
                self.shrink()
        return found

    def shrink(self) -> None:
        while self.bytes > self.limit:
            self.bytes -= self.entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()
            self.bytes = 0


_cache = _Cache(64 * 2**20)


def cache_limit(size: int | None = None) -> int:
    """The most bytes that cached tables may take together, on all devices; 64 MiB unless set.

    Args:
        size: a new limit. Tables beyond it are dropped, the least recently used first, and made again when asked for;
            one that is larger than the limit is not kept at all.

    Returns:
        The limit before.

    Raises:
        ValueError: a negative size.
    """
    before = _cache.limit
    if size is not None:
        if size < 0:
            raise ValueError(f"cache_limit: the size is a number of bytes from 0, got {size}")
        with _cache.lock:
            _cache.limit = size
            _cache.shrink()
    return before


def table(
    spec: RouteLike | Sequence[RouteLike], grid: Sequence[int] | str, device: torch.device | str | None = None
) -> Tensor:
    """The table of one or several routes: int32 (K, S), entry [k, t] the token of step t, -1 for a padding step.

    S is the longest route's number of steps; shorter routes are padded on the right (a causal recurrence gives the same
    with it). Tables are cached (`cache_limit`) and shared, so do not write to one. Inside torch.compile and
    torch.export a table is a constant of the graph; where the grid's sides are not known, it is what the operator
    `linescan::route_table` gives, and the graph serves every grid.

    Args:
        spec: as `parse` takes it.
        grid: (H, W) or (T, H, W).
        device: where the table lives; None: torch's default device.

    Raises:
        ValueError: a name is unknown, the grid is impossible, a route takes far more steps than the grid has cells, or
            routes differ in how class tokens are stored.
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
            grid = tuple(grid)
    return _constant(what, spec, grid, device)


def _text(spec) -> str:
    if isinstance(spec, str):
        return spec
    return spec.spec if isinstance(spec, Route) else ", ".join([_text(part) for part in spec])


# torch.compile puts the call into its graph and then runs it, as torch.export does, in the modes that trace the graph.
@torch.compiler.allow_in_graph
def _constant(what: str, spec, grid, device) -> Tensor:
    """The cached tensor; to anything that traces, it is a constant as `torch.tensor(...)` would be."""
    if type(spec) is tuple and isinstance(grid, tuple) and not is_watched():  # perhaps a key already, as mixers have it
        found = _cache.find((what, spec, grid, device))
        if found is not None:
            return found
    device = _device(device)
    if isinstance(grid, Sequence) and any(isinstance(n, torch.SymInt) for n in grid):
        if not torch.onnx.is_in_onnx_export():  # whose graphs have standard operators alone
            return _of_any_grid(what, _text(spec), list(grid), device)
    if not is_watched():
        return _made(what, parse(spec), as_grid(grid), device)
    with unwatched():  # never keep a fake tensor
        constant = _made(what, parse(spec), as_grid(grid), device)
    return torch.ops.aten.lift_fresh(constant) if dispatch_modes_active() else constant


def _made(what: str, routes: tuple[Route, ...], grid: Grid, device: torch.device) -> Tensor:
    make = {"table": _make_table, "inverse": _make_inverse}[what]
    return _cache.get((what, routes, grid, device), lambda: make(routes, grid, device))


@torch.library.custom_op("linescan::route_table", mutates_args=())
def _of_any_grid(what: str, spec: str, grid: Sequence[int], device: torch.device) -> Tensor:
    """A table in a graph whose grid is not known: a copy, since a graph may write to what it has used."""
    cached = _made(what, parse(spec), as_grid(grid), device)
    copy, visits = cached.clone(), known(cached)
    return copy if visits is None else declare(copy, visits.length, visits.permutation, visits.padding)


@_of_any_grid.register_fake
def _(what: str, spec: str, grid: Sequence[int], device: torch.device) -> Tensor:
    routes, cells = parse(spec), tuple(grid)
    steps = [route._steps(cells) for route in routes]
    length = prod(cells) + len(routes[0].stored) if what == "inverse" else reduce(torch.sym_max, steps)
    return torch.empty(len(routes), length, dtype=torch.int32, device=device)


def _device(device) -> torch.device:
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _rows(routes: tuple[Route, ...], grid: Grid) -> np.ndarray:
    if len({route.stored for route in routes}) > 1:
        raise ValueError(f"routes of one table store the same class tokens, got {', '.join(map(str, routes))}")
    steps = max([route._steps(grid) for route in routes])
    if len(routes) * steps > MOST_ENTRIES and len(routes) > 1:
        raise ValueError(
            f"a table of {len(routes)} routes with {steps:,} steps has more than {MOST_ENTRIES:,} entries; make several"
        )
    orders = [route.order(grid) for route in routes]
    return np.stack([np.pad(order, (0, steps - len(order)), constant_values=PADDING) for order in orders])


def _make_table(routes: tuple[Route, ...], grid: Grid, device: torch.device) -> Tensor:
    rows = _rows(routes, grid)
    padding = bool((rows == PADDING).any())
    with torch.inference_mode(False):  # what inference makes cannot be saved for a backward later
        made = torch.from_numpy(rows).to(device)
    return declare(made, routes[0].length(grid), permutation=not padding, padding=padding)


def _make_inverse(routes: tuple[Route, ...], grid: Grid, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return inverse(torch.from_numpy(_rows(routes, grid)), routes[0].length(grid)).to(device)


def inverse(table: Tensor, length: int) -> Tensor:
    """The step that writes each token: table (..., S) -> int32 (..., length), -1 for a token that no step writes.

    Padding steps and visits with a dropped output, -(i + 2), write nothing.
    """
    steps = torch.arange(table.shape[-1], dtype=torch.int32, device=table.device).expand(table.shape)
    slots = torch.where(table < 0, length, table).long()  # one more slot takes what is dropped
    written = torch.full((*table.shape[:-1], length + 1), PADDING, dtype=torch.int32, device=table.device)
    return written.scatter(-1, slots, steps)[..., :length]


def redrawn(routes: Sequence[Route], grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """As `table`, but every `shuffle` is an order of its own in each call, whatever its seed.

    The orders are drawn by `torch.randperm` from torch's default generator on the CPU, route by route. Only routes that
    are a shuffle themselves are drawn, not those made from one (`-shuffle`).

    Raises:
        ValueError: as `table`.
    """
    made = table(routes, grid, device)
    cells, steps = prod(grid), made.shape[-1]

    def draw() -> Tensor:
        drawn = torch.randperm(cells, dtype=torch.int32).to(made.device)
        return F.pad(drawn, (0, steps - cells), value=PADDING)

    rows = [draw() if isinstance(route, Shuffle) else row for route, row in zip(routes, made)]
    before = known(made)
    fresh = torch.stack(rows)
    return fresh if before is None else declare(fresh, before.length, before.permutation, before.padding)


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
    padded = torch.where(padding, number, table)
    before = known(table)
    return padded if before is None else declare(padded, length + slots, padding=False), slots


def stored_cells(route: Route, grid: Grid) -> np.ndarray:
    """Which cell of the grid each stored token is; class tokens count on from the last cell."""
    return np.array(merge_order(prod(grid), route.stored))
