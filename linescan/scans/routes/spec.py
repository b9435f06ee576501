"""The grammar of specs: from text to routes, and the functions that make routes from routes."""

import difflib
import re
from functools import lru_cache
from operator import index
from typing import Sequence

from .curves import CURVES
from .orders import AXES, TURNS, Curve, Frames, Route, RouteLike, Shuffle, Window, grid_only, show

__all__ = ["parse", "spatial_first", "temporal_first", "window"]

LONGEST = 2000  # characters of a spec

_ALIASES = {
    "raster": "row",
    "column": "col",
    "serpentine": "snake",
    "boustrophedon": "snake",
    "morton": "zorder",
}


def _one(spec: RouteLike, what: str) -> Route:
    routes = parse(spec)
    if len(routes) != 1:
        raise ValueError(f"{what} takes one route, got {len(routes)}: {spec}")
    return grid_only(routes[0], what)


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
        raise ValueError(f"a window has sides of at least 1, as in w7 or window(4x2), got {show(sides)}")
    return Window(sides, _one(inside, "window"), _one(between, "window"))


def spatial_first(route: RouteLike = "row") -> Route:
    """Videos: frame after frame, each along a 2D route."""
    return Frames(_one(route, "spatial_first"), True)


def temporal_first(route: RouteLike = "row") -> Route:
    """Videos: place after place along a 2D route, and all frames at each."""
    return Frames(_one(route, "temporal_first"), False)


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
        f"there are: {', '.join(CURVES)}, shuffle(SEED), wN or window(N, inside=R, between=R), spatial_first(R), "
        f"temporal_first(R), cls(R, at=, stored=), the axis orders {', '.join(AXES)} of videos, and before any of them "
        f"- (reversed), {', '.join(name + ':' for name in TURNS)} or an axis order with a colon"
    )


@lru_cache(maxsize=1024)
def _parse_text(text: str) -> tuple[Route, ...]:
    if len(text) > LONGEST:
        raise ValueError(
            f"a route spec has at most {LONGEST} characters, got {len(text)} that begin with {text[:20]!r}"
        )
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
        rest = text.lstrip("- ")
        route = _parse_route(rest)
        return route.reverse() if text[: len(text) - len(rest)].count("-") % 2 else route
    head, colon, rest = text.partition(":")
    if colon and "(" not in head:
        name = _ALIASES.get(head.strip(), head.strip())
        if name not in TURNS and name not in AXES:
            raise _unknown(head.strip())
        route = _parse_route(rest.strip())
        return route.turn(name) if name in TURNS else route.axes(name)
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
    if name == "shuffle":
        check("shuffle or shuffle(SEED)", [0, 1])
        seed = arguments[0] if arguments else "0"
        if not re.fullmatch(r"\d{1,10}", seed) or int(seed) >= 2**32:
            raise ValueError(f"the seed of a shuffle is a number from 0 to 2^32 - 1, got {seed!r}")
        return Shuffle(int(seed))
    if re.fullmatch(r"w\d+(x\d+)*", name):
        check(name, [0])
        return window(_sides(name[1:]))
    if name == "window":
        check("window(N, inside=R, between=R)", [1], ["inside", "between"])
        return window(_sides(arguments[0]), **options)
    if name in ("spatial_first", "temporal_first"):
        check(f"{name}(R)", [0, 1])
        return Frames(_one(*arguments or ["row"], what=name), name == "spatial_first")
    if name in AXES:
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
    known = [*CURVES, *_ALIASES, *TURNS, *AXES, "shuffle", "window", "spatial_first", "temporal_first", "cls"]
    close = difflib.get_close_matches(name, known, 1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return ValueError(f"unknown route {name!r}{hint} {_catalogue()}")
