"""Routes as objects: orders over the cells of a grid (H, W) or (T, H, W), made from curves and from each other."""

from dataclasses import dataclass
from itertools import permutations
from math import prod
from operator import index
from typing import ClassVar, Sequence, Union

import numpy as np

from .class_tokens import merge_order, token_places
from .curves import CURVES, Grid

__all__ = [
    "Curve",
    "Frames",
    "PADDING",
    "Permuted",
    "Reversed",
    "Route",
    "RouteLike",
    "Shuffle",
    "Turned",
    "Window",
    "WithTokens",
    "as_grid",
]

PADDING = -1
MOST_STEPS_PER_CELL = 64  # windows that are a little larger than the map are in use, others are mistakes
MOST_STEPS = 2**26

# The symmetries of a rectangle: transpose first, then reverse the rows, then the columns.
TURNS = {
    "T": (True, False, False),
    "rot90": (True, True, False),
    "rot180": (False, True, True),
    "rot270": (True, False, True),
    "flipud": (False, True, False),
    "fliplr": (False, False, True),
    "antiT": (True, True, True),
}
_TURN_NAMES = {turn: name for name, turn in TURNS.items()}

AXES = ["".join(p) for p in permutations("thw")]

RouteLike = Union[str, "Route"]


@dataclass(frozen=True, eq=False, repr=False)
class Route:
    """An order to visit the cells of a grid. Hashable; `str(route)` is a spec from which `parse` makes an equal route.

    Routes come from specs (`parse`), from the functions of this module, and from each other by the methods below.

    Attributes:
        spec: the text.
    """

    spec: ClassVar[str]

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
            ValueError: the grid is not one, or this route cannot visit it, or takes far more steps than it has cells.
        """
        grid = as_grid(grid)
        steps, cells = self._steps(grid), prod(grid)
        if steps > max(MOST_STEPS_PER_CELL * cells, 4096) or steps > MOST_STEPS:
            raise ValueError(
                f"{self} takes {steps:,} steps on the {cells:,} cells of {show(grid)}; a route takes at most "
                f"{MOST_STEPS:,} steps, and {MOST_STEPS_PER_CELL} per cell"
            )
        return self._order(grid).astype(np.int32)

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
        if name not in TURNS:
            raise ValueError(f"unknown turn {name!r}; there are: {', '.join(TURNS)}")
        return Turned(TURNS[name], self)

    def axes(self, order: str) -> "Route":
        """This route over a 3D grid with its axes in another order, slowest first, such as "wht"."""
        if order not in AXES:
            raise ValueError(f"unknown axis order {order!r}; there are: {', '.join(AXES)}")
        return self if order == "thw" else Permuted(order, self)

    def with_tokens(self, at: str | int | Sequence = "head", stored: str | int | Sequence = "head") -> "Route":
        """This route with class tokens; the cells keep their order.

        Args:
            at: where each token is visited: "head", "middle" (before step S // 2 of the S without tokens), "half"
                (before step L // 2, for L cells, whatever padding the route has) or "tail", or its step among all. One
                entry a token, or one name for all.
            stored: where each token is stored, in the same words: index among all stored tokens.
        """
        return WithTokens(grid_only(self, "with_tokens"), *token_places(at, stored))

    def _spec(self) -> str:
        raise NotImplementedError

    def _order(self, grid: Grid) -> np.ndarray:
        raise NotImplementedError

    def _steps(self, grid: Grid) -> int:
        """Number of steps, known without making the order."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Route):
    name: str

    def _spec(self) -> str:
        return self.name

    def _order(self, grid: Grid) -> np.ndarray:
        if self.name == "spiral" and len(grid) == 3:
            raise ValueError(f"spiral is a 2D route, got the 3D grid {show(grid)}; spatial_first(spiral) reads frames")
        return CURVES[self.name](grid)

    def _steps(self, grid: Grid) -> int:
        return prod(grid)


@dataclass(frozen=True, eq=False, repr=False)
class Shuffle(Route):
    seed: int = 0

    def _spec(self) -> str:
        return f"shuffle({self.seed})"

    def _order(self, grid: Grid) -> np.ndarray:
        return np.random.RandomState(self.seed).permutation(prod(grid))  # numpy keeps this stream as it is

    def _steps(self, grid: Grid) -> int:
        return prod(grid)


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

    def _steps(self, grid: Grid) -> int:
        return self.route._steps(grid)


@dataclass(frozen=True, eq=False, repr=False)
class Turned(Route):
    turned: tuple[bool, bool, bool]
    route: Route

    def _spec(self) -> str:
        return f"{_TURN_NAMES[self.turned]}:{self.route}"

    def turn(self, name: str) -> Route:
        # `name` acts on the map before this turn does: the two are one symmetry.
        transpose, *flips = Route.turn(self, name).turned  # type: ignore[attr-defined]
        if self.turned[0]:
            flips.reverse()
        both = (transpose ^ self.turned[0], flips[0] ^ self.turned[1], flips[1] ^ self.turned[2])
        return Turned(both, self.route) if any(both) else self.route

    def _order(self, grid: Grid) -> np.ndarray:
        transpose, upside_down, mirrored = self.turned
        view = np.arange(prod(grid)).reshape(grid)
        view = view.swapaxes(-1, -2) if transpose else view
        return _over(view[..., :: -1 if upside_down else 1, :: -1 if mirrored else 1], self.route)

    def _steps(self, grid: Grid) -> int:
        return self.route._steps((*grid[:-2], grid[-1], grid[-2]) if self.turned[0] else grid)


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

    def _steps(self, grid: Grid) -> int:
        _need_3d(self.permuted, grid)
        return self.route._steps(tuple([grid["thw".index(axis)] for axis in self.permuted]))


@dataclass(frozen=True, eq=False, repr=False)
class Window(Route):
    size: tuple[int, ...]
    inside: Route = Curve("row")
    between: Route = Curve("row")

    def _spec(self) -> str:
        size = "x".join(map(str, self.size))
        options = [f"{k}={r}" for k, r in (("inside", self.inside), ("between", self.between)) if r != Curve("row")]
        return f"window({', '.join([size, *options])})" if options else f"w{size}"

    def _tile(self, grid: Grid) -> tuple[Grid, Grid]:
        """Sides of a window, and how many windows there are along each axis."""
        size = self.size * len(grid) if len(self.size) == 1 else self.size
        if len(size) != len(grid):
            raise ValueError(f"{self}: a window of {len(size)} sides cannot tile the {len(grid)}D grid {show(grid)}")
        return size, tuple(-(-n // w) for n, w in zip(grid, size))

    def _steps(self, grid: Grid) -> int:
        size, windows = self._tile(grid)
        return self.inside._steps(size) * self.between._steps(windows)

    def _order(self, grid: Grid) -> np.ndarray:
        size, windows = self._tile(grid)
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

    def _steps(self, grid: Grid) -> int:
        _need_3d(str(self), grid)
        return grid[0] * self.route._steps(grid[1:])


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
        cells, order = prod(grid), self.route._order(grid)
        stored = np.argsort(merge_order(cells, self.stored))  # where each cell, and then each class token, is stored
        steps = np.concatenate([np.where(order < 0, PADDING, stored[order]), stored[cells:]])
        return steps[list(merge_order(len(order), self.at, cells))]

    def _steps(self, grid: Grid) -> int:
        return self.route._steps(grid) + len(self.at)


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
        raise ValueError(f"a grid is (H, W) or (T, H, W) with sides of at least 1, got {show(grid)}")
    return sizes


def show(grid) -> str:
    return grid if isinstance(grid, str) else "x".join(map(str, grid)) if isinstance(grid, Sequence) else repr(grid)


def _need_3d(what: str, grid: Grid) -> None:
    if len(grid) != 3:
        raise ValueError(f"{what} needs a 3D grid (T, H, W), got {show(grid)}")


def grid_only(route: Route, what: str) -> Route:
    if route.stored:
        raise ValueError(f"{what}: class tokens go around everything but reversal, got {route}")
    return route
