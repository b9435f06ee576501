"""Arguments of models, checked by what their class says of them: types from annotations, ranges from names."""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin

from .errors import InputError

__all__ = ["check_arguments", "optional_arguments", "parameters"]

# Whole numbers are counts and sizes, at least 1; these may be 0: no classifier, single images, the first block, ...
MAY_BE_ZERO = {"num_categories", "num_classes", "num_frames", "shift_pixels", "stripes", "taps"}


@cache
def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class and of those that it extends, by name."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            found |= inspect.signature(base.__init__).parameters
    return found


def optional_arguments(cls: type) -> set[str]:
    """The arguments of a class for which None is a value."""
    return {name for name, parameter in parameters(cls).items() if type(None) in get_args(parameter.annotation)}


def check_arguments(cls: type, args: Mapping[str, Any]) -> None:
    """Checks values for a class's arguments; names that the class does not have are left to Python.

    A sequence is wanted as a list or a tuple. Floats are finite, and those named `..._rate` are probabilities.

    Raises:
        InputError: a value has another type, or is out of range; one line names the argument.
    """
    known = parameters(cls)
    for name, value in args.items():
        if name not in known:
            continue
        wanted = known[name].annotation
        if not _fits(value, wanted):
            raise InputError(f"{name} is {_words(wanted)}, not {value!r}")
        for number in _numbers(value):
            if not math.isfinite(number):
                raise InputError(f"{name} is finite, not {value!r}")
            if name.endswith("_rate") and not 0 <= number <= 1:
                raise InputError(f"{name} is between 0 and 1, not {value!r}")
            least = int(name not in MAY_BE_ZERO)
            if isinstance(number, Integral) and int in _members(wanted) and number < least:
                raise InputError(f"{name} is at least {least}, not {value!r}")


def _members(annotation) -> set:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_members, inner))


def _fits(value, annotation) -> bool:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in inner)
    if annotation is type(None):
        return value is None
    if annotation is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if origin is tuple or origin is Sequence:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        kinds = inner if origin is tuple else inner * len(value)
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    return True  # a mapping, a class, a function: what it is for will tell


def _numbers(value) -> list:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, Real) and not isinstance(value, bool) else []


def _words(annotation) -> str:
    """An annotation in words: `int | tuple[int, int] | None` -> "a whole number, a pair of whole numbers, or None"."""
    names = {int: "whole number", float: "number", str: "word", bool: "True or False", type(None): "None"}

    def each(kind, many: bool) -> str:
        origin, inner = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            parts = [each(one, many) for one in inner]
            return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
        if origin is tuple or origin is Sequence:
            count = {2: "a pair", 3: "a triple"}.get(len(inner), "a list") if origin is tuple else "a list"
            return f"{count} of {each(inner[0], True)}"
        name = names.get(kind, getattr(kind, "__name__", str(kind)))
        if kind in (bool, type(None)):
            return name
        return f"{name}s" if many else f"a {name}"

    return each(annotation, False)
