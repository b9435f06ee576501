"""Routes: the orders in which a recurrence visits the tokens of an image, a video or a cloud of points.

A route is a small immutable object that gives a table of token indices for any grid, and a short text, its *spec*:

    row  col  snake  diagonal  zigzag  spiral  hilbert  zorder      curves over (H, W), or over (T, H, W)
    -R                                  R backwards
    T:R  rot90:R  rot180:R  rot270:R    R over the map transposed, turned counter-clockwise, or mirrored;
    flipud:R  fliplr:R  antiT:R         several are applied from left to right: rot90:T:hilbert
    w7  w4x2  window(7, inside=R, between=R)    window after window, padded at the bottom and the right
    spatial_first(R)  temporal_first(R)         videos: R in every frame in turn; all frames at every place of R
    twh  twh:R  twh(R)                  videos: axes in this order, slowest first; R over all of them; over the last two
    cls(R, at=middle, stored=head)      class tokens: each head, middle, tail or an index; several are head+tail

    table("row, -row, col, -col", (14, 14))     # (4, 196): the four routes of VMamba and of Mamba-ND
    table(["w2", "-w2"], (7, 7))                # LocalMamba, with 15 padding steps each
    table(parse("hilbert")[0].turn("T").reverse(), (14, 14))

Tables are int32 (K, S) as `linescan.scans.recurrence` reads them: entry [k, t] is the token that route k visits at
step t, -1 is a padding step. They are made once for a grid and device, and are constants under torch.compile and
torch.export.
"""

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from math import prod
from operator import index
from typing import Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .curves import CURVES, Grid, hilbert_keys, zorder_keys

__all__ = [
    "Route",
    "RouteLike",
    "parse",
    "window",
    "spatial_first",
    "temporal_first",
    "table",
    "inverse_table",
    "inverse",
    "pad_slots",
    "insert_tokens",
    "point_table",
]

PADDING = -1

# The symmetries of a rectangle: transpose first, then reverse the rows, then the columns.
_TURNS = {
    "T": (True, False, False),
    "rot90": (True, True, False),
    "rot180": (False, True, True),
    "rot270": (True, False, True),
    "flipud": (False, True, False),
    "fliplr": (False, False, True),
    "antiT": (True, True, True),
}
_TURN_NAMES = {turn: name for name, turn in _TURNS.items()}
_ALIASES = {
    "raster": "row",
    "column": "col",
    "serpentine": "snake",
    "boustrophedon": "snake",
    "morton": "zorder",
}
_AXES = ["".join(p) for p in permutations("thw")]
_PLACES = ("head", "middle", "tail")

RouteLike = Union[str, "Route"]


# -- routes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Route:
    """An order to visit the cells of a grid. Hashable; `str(route)` is a spec from which `parse` makes an equal route.

    Routes come from specs (`parse`), from the functions of this module, and from each other by the methods below.
    """

    def __post_init__(self):
        # Kept as a plain attribute, which torch.compile can read as a constant.
        object.__setattr__(self, "spec", self._spec())

    def __str__(self) -> str:
        return self.spec

    def __repr__(self) -> str:
        return f"<route {self.spec}>"

    def __eq__(self, other) -> bool:
        return isinstance(other, Route) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def order(self, grid: Sequence[int]) -> np.ndarray:
        """Flat row-major index visited at each step, -1 for a padding step: grid (H, W) or (T, H, W) -> int32 (S,).

        Raises:
            ValueError: the grid is not one, or this route cannot visit it.
        """
        return self._order(as_grid(grid)).astype(np.int32)

    def length(self, grid: Sequence[int]) -> int:
        """Number of stored tokens: the cells of the grid and the class tokens."""
        return prod(as_grid(grid)) + len(self.stored)

    @property
    def stored(self) -> tuple:
        """Where the class tokens of this route stand among the stored tokens; () without class tokens."""
        return ()

    def reverse(self) -> "Route":
        """The same steps backwards; class tokens and padding take part."""
        return Reversed(self)

    __neg__ = reverse

    def turn(self, name: str) -> "Route":
        """This route over the map transposed ("T"), turned counter-clockwise ("rot90", "rot180", "rot270") or mirrored
        ("flipud", "fliplr", "antiT"); in 3D over every frame."""
        if name not in _TURNS:
            raise ValueError(f"unknown turn {name!r}; there are: {', '.join(_TURNS)}")
        return Turned(_TURNS[name], self)

    def axes(self, order: str) -> "Route":
        """This route over a 3D grid with its axes in another order, slowest first, such as "wht"."""
        if order not in _AXES:
            raise ValueError(f"unknown axis order {order!r}; there are: {', '.join(_AXES)}")
        return self if order == "thw" else Permuted(order, self)

    def with_tokens(self, at: str | int | Sequence = "head", stored: str | int | Sequence = "head") -> "Route":
        """This route with class tokens; the cells keep their order.

        Args:
            at: where each token is visited: "head", "middle" (before step S // 2 of the S without tokens) or "tail", or
                its step among all. One entry a token, or one name for all.
            stored: where each token is stored, in the same words: index among all stored tokens.
        """
        return WithTokens(_grid_only(self, "with_tokens"), *_token_places(at, stored))

    def _spec(self) -> str:
        raise NotImplementedError

    def _order(self, grid: Grid) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Route):
    name: str

    def _spec(self) -> str:
        return self.name

    def _order(self, grid: Grid) -> np.ndarray:
        if self.name == "spiral" and len(grid) == 3:
            raise ValueError(f"spiral is a 2D route, got the 3D grid {_show(grid)}; spatial_first(spiral) reads frames")
        return CURVES[self.name](grid)


@dataclass(frozen=True, eq=False, repr=False)
class Reversed(Route):
    route: Route

    def _spec(self) -> str:
        return f"-{self.route}"

    @property
    def stored(self) -> tuple:
        return self.route.stored

    def reverse(self) -> Route:
        return self.route

    __neg__ = reverse

    def turn(self, name: str) -> Route:
        return self.route.turn(name).reverse()

    def axes(self, order: str) -> Route:
        return self.route.axes(order).reverse()

    def _order(self, grid: Grid) -> np.ndarray:
        return self.route._order(grid)[::-1]


@dataclass(frozen=True, eq=False, repr=False)
class Turned(Route):
    turned: tuple[bool, bool, bool]
    route: Route

    def _spec(self) -> str:
        return f"{_TURN_NAMES[self.turned]}:{self.route}"

    def turn(self, name: str) -> Route:
        # `name` acts on the map before this turn does: the two are one symmetry.
        transpose, *flips = Route.turn(self, name).turned
        if self.turned[0]:
            flips.reverse()
        both = (transpose ^ self.turned[0], flips[0] ^ self.turned[1], flips[1] ^ self.turned[2])
        return Turned(both, self.route) if any(both) else self.route

    def _order(self, grid: Grid) -> np.ndarray:
        transpose, upside_down, mirrored = self.turned
        view = np.arange(prod(grid)).reshape(grid)
        view = view.swapaxes(-1, -2) if transpose else view
        return _over(view[..., :: -1 if upside_down else 1, :: -1 if mirrored else 1], self.route)


@dataclass(frozen=True, eq=False, repr=False)
class Permuted(Route):
    permuted: str
    route: Route

    def _spec(self) -> str:
        return self.permuted if self.route == Curve("row") else f"{self.permuted}:{self.route}"

    def axes(self, order: str) -> Route:
        first = Route.axes(self, order)
        if first is self:
            return self
        return self.route.axes("".join(order["thw".index(axis)] for axis in self.permuted))

    def _order(self, grid: Grid) -> np.ndarray:
        _need_3d(self.permuted, grid)
        view = np.arange(prod(grid)).reshape(grid).transpose(["thw".index(axis) for axis in self.permuted])
        return _over(view, self.route)


@dataclass(frozen=True, eq=False, repr=False)
class Window(Route):
    size: tuple[int, ...]
    inside: Route = Curve("row")
    between: Route = Curve("row")

    def _spec(self) -> str:
        size = "x".join(map(str, self.size))
        options = [f"{k}={r}" for k, r in (("inside", self.inside), ("between", self.between)) if r != Curve("row")]
        return f"window({', '.join([size, *options])})" if options else f"w{size}"

    def _order(self, grid: Grid) -> np.ndarray:
        size = self.size * len(grid) if len(self.size) == 1 else self.size
        if len(size) != len(grid):
            raise ValueError(f"{self}: a window of {len(size)} sides cannot tile the {len(grid)}D grid {_show(grid)}")
        windows = tuple(-(-n // w) for n, w in zip(grid, size))
        padded = np.full([n * w for n, w in zip(windows, size)], PADDING)
        padded[tuple(map(slice, grid))] = np.arange(prod(grid)).reshape(grid)
        # (windows down, rows of a window, windows across, columns of a window) -> (windows, cells of a window)
        split = padded.reshape([n for pair in zip(windows, size) for n in pair])
        axes = range(0, 2 * len(grid), 2)
        cells = split.transpose(*axes, *(a + 1 for a in axes)).reshape(prod(windows), prod(size))
        return _take(_take(cells, self.between._order(windows), 0), self.inside._order(size), 1).ravel()


@dataclass(frozen=True, eq=False, repr=False)
class Frames(Route):
    route: Route
    spatial_first: bool

    def _spec(self) -> str:
        return f"{'spatial' if self.spatial_first else 'temporal'}_first({self.route})"

    def _order(self, grid: Grid) -> np.ndarray:
        _need_3d(str(self), grid)
        cells = np.arange(prod(grid)).reshape(grid[0], -1)
        cells = _take(cells, self.route._order(grid[1:]), 1)
        return (cells if self.spatial_first else cells.T).ravel()


@dataclass(frozen=True, eq=False, repr=False)
class WithTokens(Route):
    route: Route
    at: tuple
    stored: tuple = ("head",)

    def _spec(self) -> str:
        at, stored = ("+".join(map(str, places)) for places in (self.at, self.stored))
        return f"cls({self.route}, at={at}, stored={stored})"

    def turn(self, name: str) -> Route:
        return WithTokens(self.route.turn(name), self.at, self.stored)

    def axes(self, order: str) -> Route:
        return WithTokens(self.route.axes(order), self.at, self.stored)

    def _order(self, grid: Grid) -> np.ndarray:
        order = torch.from_numpy(self.route._order(grid).copy())
        return insert_tokens(order, self.at, self.stored, length=prod(grid)).numpy()


def _over(view: np.ndarray, route: Route) -> np.ndarray:
    """The route over a rearranged map of flat indices."""
    return _take(view.ravel(), route._order(view.shape), 0)


def _take(cells: np.ndarray, order: np.ndarray, axis: int) -> np.ndarray:
    """cells[order] along an axis, all padding where the order is."""
    taken = cells.take(order, axis)  # -1 takes the last for now
    padding = np.expand_dims(order < 0, tuple(a for a in range(cells.ndim) if a != axis))
    return np.where(padding, PADDING, taken)


def as_grid(grid: Sequence[int] | str) -> Grid:
    """A grid as a tuple of two or three positive ints; also from text such as "14x14" or "8x14x14".

    Raises:
        ValueError: it is not a grid.
    """
    try:
        sizes = tuple(map(int, grid.lower().split("x")) if isinstance(grid, str) else map(index, grid))
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ValueError(f"a grid is (H, W) or (T, H, W) with sides of at least 1, got {_show(grid)}")
    return sizes


def _show(grid) -> str:
    return grid if isinstance(grid, str) else "x".join(map(str, grid)) if isinstance(grid, Sequence) else repr(grid)


def _need_3d(what: str, grid: Grid) -> None:
    if len(grid) != 3:
        raise ValueError(f"{what} needs a 3D grid (T, H, W), got {_show(grid)}")


def _grid_only(route: Route, what: str) -> Route:
    if route.stored:
        raise ValueError(f"{what}: class tokens go around everything but reversal, got {route}")
    return route


def _one(spec: RouteLike, what: str) -> Route:
    routes = parse(spec)
    if len(routes) != 1:
        raise ValueError(f"{what} takes one route, got {len(routes)}: {spec}")
    return _grid_only(routes[0], what)


def window(size: int | Sequence[int], inside: RouteLike = "row", between: RouteLike = "row") -> Route:
    """Window after window, as LocalMamba does (arXiv 2403.09338).

    The map is padded at the bottom and the right (in 3D at the end too) to whole windows. Padding is visited: as steps
    with -1 in the table. Reversed, the padding of the last window comes first.

    Args:
        size: one side for all axes, or a side for each.
        inside: the route inside each window.
        between: the route from window to window.

    Raises:
        ValueError: a side is less than 1, or a route has class tokens.
    """
    sides = tuple(map(index, size)) if isinstance(size, Sequence) else (index(size),)
    if len(sides) not in (1, 2, 3) or min(sides) < 1:
        raise ValueError(f"a window has sides of at least 1, as in w7 or window(4x2), got {_show(sides)}")
    return Window(sides, _one(inside, "window"), _one(between, "window"))


def spatial_first(route: RouteLike = "row") -> Route:
    """Videos: frame after frame, each along a 2D route."""
    return Frames(_one(route, "spatial_first"), True)


def temporal_first(route: RouteLike = "row") -> Route:
    """Videos: place after place along a 2D route, and all frames at each."""
    return Frames(_one(route, "temporal_first"), False)


# -- specs --------------------------------------------------------------------------------------------------------


def parse(spec: RouteLike | Sequence[RouteLike]) -> tuple[Route, ...]:
    """Routes from a comma-separated spec, a route, or a sequence of either; the module's page has the grammar.

    Raises:
        ValueError: a name is unknown (the message lists what exists), or the spec is not well formed.
    """
    if isinstance(spec, Route):
        return (spec,)
    if isinstance(spec, str):
        return _parse_text(spec)
    if not isinstance(spec, Sequence):
        raise ValueError(f"a route is a spec, a Route or a sequence of these, got {spec!r}; {_catalogue()}")
    routes = tuple(route for part in spec for route in parse(part))
    if not routes:
        raise ValueError(f"no route given; {_catalogue()}")
    return routes


def _catalogue() -> str:
    return (
        f"there are: {', '.join(CURVES)}, wN or window(N, inside=R, between=R), spatial_first(R), temporal_first(R), "
        f"cls(R, at=, stored=), the axis orders {', '.join(_AXES)} of videos, and before any of them - (reversed), "
        f"{', '.join(name + ':' for name in _TURNS)} or an axis order with a colon"
    )


@lru_cache(maxsize=None)
def _parse_text(text: str) -> tuple[Route, ...]:
    return tuple(_parse_route(part) for part in _split(text, ","))


def _split(text: str, separator: str) -> list[str]:
    """Splits at separators outside parentheses; every part must hold something."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text + separator):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    if depth != 0:
        raise ValueError(f"unbalanced parentheses in route {text!r}")
    if "" in parts:
        raise ValueError(f"a route is missing in {text!r}; {_catalogue()}")
    return parts


def _parse_route(text: str) -> Route:
    if text.startswith("-"):
        return _parse_route(text[1:].strip()).reverse()
    head, colon, rest = text.partition(":")
    if colon and "(" not in head:
        name = _ALIASES.get(head.strip(), head.strip())
        if name not in _TURNS and name not in _AXES:
            raise _unknown(head.strip())
        route = _parse_route(rest.strip())
        return route.turn(name) if name in _TURNS else route.axes(name)
    match = re.fullmatch(r"(\w*)\s*(?:\((.*)\))?", text, re.DOTALL)
    if not match:
        raise _unknown(text)
    name, inner = _ALIASES.get(match[1], match[1]), match[2]
    arguments, options = [], {}
    for part in _split(inner, ",") if inner else []:
        key, equals, value = part.partition("=")
        if equals and key.strip().isidentifier():
            options[key.strip()] = value.strip()
        else:
            arguments.append(part)
    return _make(text, name, arguments, options)


def _make(text: str, name: str, arguments: list[str], options: dict[str, str]) -> Route:
    """The route of one call in a spec."""

    def check(usage: str, counts: Sequence[int], keywords: Sequence[str] = ()) -> None:
        if len(arguments) not in counts or set(options) - set(keywords):
            raise ValueError(f"route {text!r} does not fit {usage}")

    if name in CURVES:
        check(name, [0])
        return Curve(name)
    if re.fullmatch(r"w\d+(x\d+)*", name):
        check(name, [0])
        return window(_sides(name[1:]))
    if name == "window":
        check("window(N, inside=R, between=R)", [1], ["inside", "between"])
        return window(_sides(arguments[0]), **options)
    if name in ("spatial_first", "temporal_first"):
        check(f"{name}(R)", [0, 1])
        return Frames(_one(*arguments or ["row"], name), name == "spatial_first")
    if name in _AXES:
        check(f"{name} or {name}(R)", [0, 1])
        return (spatial_first(*arguments) if arguments else Curve("row")).axes(name)
    if name == "cls":
        check("cls(R, at=, stored=)", [1], ["at", "stored"])
        places = {k: [int(p) if p.isdecimal() else p for p in v.split("+")] for k, v in options.items()}
        return parse(arguments[0])[0].with_tokens(**places)
    raise _unknown(name or text)


def _sides(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise ValueError(f"a window has sides of at least 1, as in w7 or window(4x2), got {text!r}")
    return tuple(map(int, text.split("x")))


def _unknown(name: str) -> ValueError:
    known = [*CURVES, *_ALIASES, *_TURNS, *_AXES, "window", "spatial_first", "temporal_first", "cls"]
    close = difflib.get_close_matches(name, known, 1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return ValueError(f"unknown route {name!r}{hint} {_catalogue()}")


# -- tables -------------------------------------------------------------------------------------------------------


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


# -- class tokens -------------------------------------------------------------------------------------------------


def _token_places(at, stored) -> tuple[tuple, tuple]:
    """Both as tuples, one entry a token; a single name stands for all."""
    at, stored = ((p,) if isinstance(p, (str, int)) else tuple(p) for p in (at, stored))
    count = max(len(at), len(stored))
    if len(at) == 1 and isinstance(at[0], str):
        at *= count
    if len(stored) == 1 and isinstance(stored[0], str):
        stored *= count
    for places in (at, stored):
        bad = [p for p in places if p not in _PLACES and not (isinstance(p, int) and p >= 0)]
        if bad or not places:
            raise ValueError(f"a class token goes to {', '.join(_PLACES)} or an index from 0, got {[*bad]}")
    if len(at) != len(stored):
        raise ValueError(f"{len(at)} places to visit class tokens, {len(stored)} to store them")
    return at, stored


def stored_cells(route: Route, grid: Grid) -> np.ndarray:
    """Which cell of the grid each stored token is; class tokens count on from the last cell."""
    return np.array(_merge_order(prod(grid), route.stored))


def _merge_order(length: int, places: tuple) -> tuple[int, ...]:
    """Which of `length` things and then len(places) tokens stands where, after the tokens went to their places."""
    total = length + len(places)
    gaps = {"head": 0, "middle": length // 2, "tail": length}
    fixed = {place: length + i for i, place in enumerate(places) if isinstance(place, int)}
    if len(fixed) < sum(isinstance(place, int) for place in places) or any(place >= total for place in fixed):
        raise ValueError(f"class tokens need different indices below {total}, got {[*places]}")
    named = [(gaps[place], length + i) for i, place in enumerate(places) if isinstance(place, str)]
    order = list(range(length))
    for gap, token in sorted(named, reverse=True):  # from the back, so that gaps in front stay where they are
        order.insert(gap, token)
    for place in sorted(fixed):
        order.insert(place, fixed[place])
    return tuple(order)


def insert_tokens(
    table: Tensor,
    at: str | int | Sequence = "head",
    stored: str | int | Sequence = "head",
    length: int | None = None,
) -> Tensor:
    """Adds class tokens to a table: (..., S) -> (..., S + n), its tokens renumbered for a storage of length + n.

    A token inserted before a reversal takes part in it (VideoMamba: stored first, read first, and last on the way
    back); one inserted after does not (LocalVim: the middle of every route, index (S + n - 1) // 2).

    Args:
        table: any table, also one a sample (B, K, S).
        at: where each token is visited: "head", "middle" (before step S // 2) or "tail", or its step among all S + n.
            One entry a token, or one name for all.
        stored: where each token is stored, in the same words: index among all length + n stored tokens.
        length: number of tokens stored so far; None: the number of steps (a table without padding).

    Raises:
        ValueError: a place is none, is taken twice or lies outside; or `at` and `stored` differ in number.
    """
    at, stored = _token_places(at, stored)
    steps = table.shape[-1]
    length = steps if length is None else length
    # Where each token is stored now, the class tokens last.
    storage = torch.tensor(_merge_order(length, stored), device=table.device).argsort().to(table.dtype)
    token = torch.where(table < PADDING, -2 - table, table)
    moved = storage[token.clamp_min(0).long()]
    moved = torch.where(table < PADDING, -2 - moved, torch.where(table == PADDING, table, moved))
    both = torch.cat([moved, storage[length:].expand(*table.shape[:-1], -1)], -1)
    return both[..., torch.tensor(_merge_order(steps, at), device=table.device)]


# -- points -------------------------------------------------------------------------------------------------------

_POINT_CURVES = ("hilbert", "hilbert-trans", "zorder", "zorder-trans", "axis0", "axis1", "axis2")
_POINT_ALIASES = {"z": "zorder", "z-trans": "zorder-trans"}


def point_table(
    coords: Tensor, curve: str | Sequence[str] = "hilbert", bits: int = 10, cell: float | None = None
) -> Tensor:
    """Routes through free points, one table a sample: coords (B, N, 2 or 3) -> int32 (B, K, N).

    Points are rounded down to cells and visited in the cells' order on a curve; points of one cell in stored order.

    Args:
        coords: coordinates of any real dtype.
        curve: one or several (a comma-separated text or a sequence), each with "-" before it for its reverse:
            "hilbert", "zorder" (also "z"); "hilbert-trans", "zorder-trans" (also "z-trans") swap the first two axes, as
            Point Transformer V3 and PointMamba name them; "axis0", "axis1", "axis2" sort by one coordinate.
        bits: 2**bits cells along the longest side of each sample's bounding box; cells are squares or cubes.
        cell: PointMamba's rule instead: cells have this side, are numbered from each sample's lowest, and the curve is
            as deep as the largest number in the batch needs (at most 21 bits in 3D, 31 in 2D).

    Raises:
        ValueError: the shape is wrong, or a curve is unknown (the message lists what exists).
    """
    if coords.ndim != 3 or coords.shape[-1] not in (2, 3):
        raise ValueError(f"point_table: coords are (B, N, 2) or (B, N, 3), got {tuple(coords.shape)}")
    axes = coords.shape[-1]
    known = _POINT_CURVES[: 4 + axes]
    cells, depth = _cells(coords, bits, cell)
    orders = []
    for name in [n.strip() for n in curve.split(",")] if isinstance(curve, str) else curve:
        base = name.removeprefix("-")
        base = _POINT_ALIASES.get(base, base)
        if base not in known:
            raise ValueError(f"unknown point curve {name!r}; there are: {', '.join(known)}, and - before them")
        kind, _, swapped = base.partition("-")
        points = cells[..., [1, 0, 2][:axes]] if swapped else cells
        if kind == "hilbert":
            keys = _deep_hilbert_keys(points, depth) if depth is not None else hilbert_keys(points, bits)
        elif kind == "zorder":
            keys = zorder_keys(points, bits if depth is None else 63 // axes)
        else:
            keys = coords[..., int(kind[-1])]
        order = keys.argsort(dim=-1, stable=True)
        orders.append(order.flip(-1) if name.startswith("-") else order)
    return torch.stack(orders, 1).int()


def _cells(coords: Tensor, bits: int, cell: float | None) -> tuple[Tensor, Tensor | None]:
    """Integer cells of points, and with `cell` the bits that the largest takes, as a tensor."""
    if cell is not None:
        cells = torch.floor(coords / cell).long()
        cells = cells - cells.amin(1, keepdim=True)
        powers = 2 ** torch.arange(63 // coords.shape[-1], device=coords.device)
        return cells, (cells.amax() >= powers).sum()
    low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)
    side = (high - low).amax(-1, keepdim=True)
    side = torch.where(side > 0, side, torch.ones_like(side))
    return ((coords - low) / side * 2**bits).long().clamp(max=2**bits - 1), None


def _deep_hilbert_keys(points: Tensor, depth: Tensor) -> Tensor:
    """`hilbert_keys(points, depth)` for a depth that is a tensor: nothing waits for the device.

    A level of Skilling's curve at which all bits are zero only rolls the axes by one, so the deepest curve over axes
    rolled back gives the same keys.
    """
    axes = points.shape[-1]
    deepest = 63 // axes
    axis = (torch.arange(axes, device=points.device) + deepest - depth) % axes
    return hilbert_keys(points.index_select(-1, axis), deepest)
