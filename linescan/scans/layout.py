"""Layouts: what the arguments of a recurrence look like, said once. Checks, shapes, FLOPs and examples follow from it.

    Layout("gla", ["q", "k", "v", "g", "scale", "initial_state"],
           "q k: B K L H dk; v: B K L H dv; g: B K L H dk", "B K L H dv", state="B R H dk dv",
           scale=lambda dk: dk**-0.5)

An argument is `name: axes`, or `name?: axes` if it may be None. Axes are separated by spaces:

- a name (`H`, `dk`) is a size, the same wherever the name stands again;
- `B` and `L` are the batch and the tokens in their stored order, `R` the number of routes, `S` the number of steps;
- `K` is the route axis of an argument that routes may share: 1 or R long;
- a number is that size, and anything else is an expression in names, options, and `with_NAME`, whether an argument is
  given: `W-1`, `dv+normalize`, `(rank if with_delta_weight else D)`;
- `[K]` in front and `[G]` elsewhere are axes that may be missing; a missing `[K]` is put there, for all routes.

What begins with `B K L` is a token input, read along the route; what else begins with `B` belongs to samples, and the
rest are parameters. Tensors are floating-point unless the axes begin with the word `bool` or `int`.
"""

import re
from dataclasses import dataclass
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor

from .visits import check_table

__all__ = ["Layout"]

# The sizes of examples, where neither the layout nor the caller names another.
SIZES = {"H": 2, "dk": 4, "dv": 3, "D": 4, "N": 3, "P": 3, "W": 4}


class Axis(NamedTuple):
    """One axis: what it is called, and its size if that follows from others."""

    text: str
    size: int | Callable[[dict], int] | None
    missing: bool = False  # whether it may be


ALL_ROUTES = Axis("K", None, True)


@dataclass(frozen=True)
class Argument:
    """One tensor argument."""

    name: str
    axes: tuple[Axis, ...]
    optional: bool
    kind: str

    @property
    def is_token(self) -> bool:
        return [axis.text for axis in self.axes[:3]] == ["B", "K", "L"]

    def __str__(self) -> str:
        """The axes as messages and docstrings show them: (B, K or 1, L, D), or (D,) or (K, D)."""
        names = {"K": "K" if self.axes[0] == ALL_ROUTES else "K or 1", "R": "K"}
        whole = [names.get(axis.text, axis.text) for axis in self.axes]
        short = [name for name, axis in zip(whole, self.axes) if not axis.missing]
        forms = [whole] if len(short) == len(whole) else [short, whole]
        return " or ".join([f"({', '.join(axes)}{',' * (len(axes) == 1)})" for axes in forms])

    def fits(self, ndim: int) -> bool:
        return ndim == len(self.axes) or ndim == len(self.axes) - 1 and any(axis.missing for axis in self.axes)

    def paired(self, shape: Sequence) -> Iterable[tuple[Axis, Any]]:
        """Every axis with its size in a shape, 1 where it is missing."""
        if len(shape) < len(self.axes):
            at = next(i for i, axis in enumerate(self.axes) if axis.missing)
            shape = (*shape[:at], 1, *shape[at:])
        return zip(self.axes, shape)


def _parse_axis(text: str) -> Axis:
    missing = text.startswith("[")
    text = text.strip("[]")
    if text.isidentifier():
        return Axis(text, None, missing)
    if text.isdigit():
        return Axis(text, int(text), missing)
    return Axis(text.removeprefix("(").removesuffix(")"), expression(text), missing)


def expression(text: str) -> Callable[[dict], Any]:
    """Arithmetic over names as a function of their values."""
    code = compile(text, "<layout>", "eval")
    return lambda values: eval(code, {"__builtins__": {}}, {name: values.get(name) for name in code.co_names})


def _parse_axes(text: str) -> tuple[str, tuple[Axis, ...]]:
    words = re.findall(r"\([^)]*\)|\S+", text)
    kind = words.pop(0) if words[0] in ("bool", "int") else "float"
    return kind, tuple(map(_parse_axis, words))


def _parse(text: str) -> list[Argument]:
    arguments = []
    for part in filter(str.strip, text.split(";")):
        names, _, axes = part.partition(":")
        kind, axes = _parse_axes(axes)
        arguments += [Argument(name.rstrip("?"), axes, name.endswith("?"), kind) for name in names.split()]
    return arguments


def _default(value) -> Callable[[dict], Any]:
    """An option's default as a function of the sizes."""
    if not callable(value):
        return lambda sizes: value
    names = value.__code__.co_varnames[: value.__code__.co_argcount]
    return lambda sizes: value(**{name: sizes[name] for name in names})


class Checked(NamedTuple):
    """What holds for all calls with the same shapes, dtypes and options.

    Attributes:
        sizes: of the axes by name, and what else expressions may use.
        filled: (position, value) of options that were left out.
        expanded: (position, shape) of parameters that all routes share.
        output, states: shapes of the output (B, K, L, ...) and of the states.
    """

    sizes: dict[str, Any]
    filled: tuple
    expanded: tuple
    output: tuple
    states: list[tuple]

    def fill(self, inputs: Sequence) -> Sequence:
        """The inputs with defaults in place of None, and parameters for every route."""
        if self.filled or self.expanded:
            inputs = list(inputs)
            for at, value in self.filled:
                inputs[at] = value
            for at, shape in self.expanded:
                inputs[at] = inputs[at].expand(shape)
        return inputs


class Layout:
    """The layout of one function.

    Args:
        name: of the function, for messages.
        parameters: names of all its inputs in order, tensors and options.
        inputs: the tensors among them, but for the states; see the module's page.
        output: axes of the output, or "" for a function whose own layout has none.
        state: axes of the state, the optional input `initial_state` and the second result; or several as
            "name: axes; name: axes", which are optional inputs too; a parameter `initial_state` stands for all of them,
            as a tuple. Where the first of these is an input already, it keeps that layout as an input.
        requires: what else must hold: a function of sizes and options by name that returns what is wrong, or None.
        flops: floating-point operations of a forward (two per multiply-add), an expression in sizes and options.
        values: name -> function from normal noise to values that the argument may have, for examples.
        sizes: of axes, and values of options, in examples.
        defaults: of options: values, or functions of sizes.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[str],
        inputs: str,
        output: str = "",
        *,
        state: str = "",
        requires: Callable[..., str | None] | None = None,
        flops: str | None = None,
        values: dict[str, Callable[[Tensor], Tensor]] | None = None,
        sizes: dict[str, int] | None = None,
        **defaults,
    ):
        self.name, self.parameters = name, list(parameters)
        state = f"initial_state: {state}" if state and ":" not in state else state
        declared = {a.name: a for a in _parse(inputs)}
        self.states = {a.name: Argument(a.name, a.axes, True, a.kind) for a in _parse(state)}
        if "initial_state" in self.parameters and "initial_state" not in self.states:
            at = self.parameters.index("initial_state")
            self.parameters[at : at + 1] = self.states
        declared = self.states | declared
        unknown = set(declared) - set(self.parameters)
        if unknown:
            raise TypeError(f"{name} has a layout for {', '.join(sorted(unknown))}, but no such arguments")
        self.arguments = {key: declared[key] for key in self.parameters if key in declared}
        self.options = [key for key in self.parameters if key not in declared]
        self.output = Argument("output", _parse_axes(output)[1], False, "float") if output else None
        self.requires = requires
        self._needed = () if requires is None else requires.__code__.co_varnames[: requires.__code__.co_argcount]
        self._flops = None if flops is None else expression(flops)
        self.values, self.sizes = values or {}, sizes or {}
        self.defaults = {key: _default(value) for key, value in defaults.items()}
        at = {key: i for i, key in enumerate(self.parameters)}
        self._at = [(at[key], argument) for key, argument in self.arguments.items()]
        self.token_positions = [at[key] for key, argument in self.arguments.items() if argument.is_token]
        self.state_positions = [at[key] for key in self.states]
        self._options_at = [at[key] for key in self.options]
        self.default_positions = [at[key] for key in self.defaults]
        self._shared_at = [(at[key], len(a.axes)) for key, a in self.arguments.items() if a.axes[0] == ALL_ROUTES]
        self._key = self._make_key()
        self._checked: dict[tuple, Checked] = {}

    @property
    def counts(self) -> bool:
        """Whether it says how many operations a forward takes."""
        return self._flops is not None

    @property
    def tokens(self) -> list[str]:
        """Names of the token inputs."""
        return [self.parameters[i] for i in self.token_positions]

    def _make_key(self) -> Callable:
        """A function of the inputs and the route that says all that a check depends on; written out, for speed."""
        parts = []
        for key in self.parameters:
            if key not in self.arguments:
                parts.append(f"{key} if {key}.__class__ in plain else {key}.__class__")
            elif self.arguments[key].optional:
                parts.append(f"None if {key} is None else ({key}.shape, {key}.dtype)")
            else:
                parts.append(f"{key}.shape, {key}.dtype")
        parts.append("None if route is None else (route.shape, route.dtype)")
        code = f"lambda {', '.join(self.parameters)}, route: ({', '.join(parts)})"
        return eval(code, {"plain": (int, float, bool, str, type(None))})

    # -- checks ---------------------------------------------------------------------------------------------------

    def check(self, inputs: Sequence, route: Tensor | None) -> Checked:
        """Checks a call; calls like an earlier one are known by their shapes.

        Raises:
            ValueError: what is wrong with which argument, in one line.
        """
        try:
            key = self._key(*inputs, route)
            checked = self._checked.get(key)
        except (AttributeError, TypeError):  # no tensor where one should be; sizes that are symbols
            key = checked = None
        if checked is None:
            checked = self._check(inputs, route)
            if key is not None:
                if len(self._checked) > 4096:
                    self._checked.clear()
                self._checked[key] = checked
        if route is not None and type(route) is Tensor:
            check_table(self.name, route, checked.sizes["L"])
        return checked

    def check_devices(self, inputs: Sequence, route: Tensor | None) -> None:
        """Raises a ValueError if tensors stand on several devices, of which torch's own message says less."""
        device = inputs[self.token_positions[0]].device
        if all([x.device == device for x in (*inputs, route) if isinstance(x, Tensor)]):
            return
        devices = {
            name: x.device for name, x in zip((*self.parameters, "route"), (*inputs, route)) if isinstance(x, Tensor)
        }
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{self.name}: all tensors of a call stand on one device, got {places}")

    def _check(self, inputs: Sequence, route: Tensor | None) -> Checked:
        for at, argument in self._at:
            self._check_kind(argument, inputs[at])
        for at in self._options_at:
            if isinstance(inputs[at], Tensor):
                raise ValueError(f"{self.name}: {self.parameters[at]} is a plain value, not a tensor")
        if route is not None:
            self._check_route(route)
        sizes = self._bind([None if x is None else x.shape for x in self._tensors(inputs)], inputs, route)
        if route is not None:
            self._check_rows(inputs, route, sizes)
        for (at, argument), x in zip(self._at, self._tensors(inputs)):
            if x is not None:
                self._check_sizes(argument, tuple(x.shape), sizes)
        if self.requires is not None:
            wrong = self.requires(**{name: sizes.get(name) for name in self._needed})
            if wrong:
                raise ValueError(f"{self.name}: {wrong}")
        filled = [(at, sizes[self.parameters[at]]) for at in self.default_positions if inputs[at] is None]
        expanded = self.expansions(inputs, sizes["R"])
        return Checked(sizes, tuple(filled), tuple(expanded), *self._shapes(sizes))

    def expansions(self, inputs: Sequence, routes: int) -> list[tuple[int, tuple]]:
        """(position, shape for all routes) of the parameters that have one set for all of them."""
        found = []
        for at, axes in self._shared_at:
            x = inputs[at]
            if x is not None and (x.ndim < axes or x.shape[0] != routes):
                found.append((at, (routes, *x.shape[x.ndim - axes + 1 :])))
        return found

    def _tensors(self, inputs: Sequence) -> list:
        return [inputs[at] for at, _ in self._at]

    def _fail(self, argument: Argument, what: str):
        raise ValueError(f"{self.name}: {argument.name} is {argument}{what}")

    def _check_kind(self, argument: Argument, x) -> None:
        if x is None and argument.optional:
            return
        if not isinstance(x, Tensor):
            self._fail(argument, f", got {'None' if x is None else type(x).__name__}")
        kind = "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"
        if kind != argument.kind or x.is_complex():
            wanted = {"float": "floating-point numbers", "bool": "booleans", "int": "integers"}[argument.kind]
            raise ValueError(f"{self.name}: {argument.name} holds {wanted}, got {x.dtype}")
        if not argument.fits(x.ndim):
            self._fail(argument, f", got {x.ndim} axes {tuple(x.shape)}")

    def _check_sizes(self, argument: Argument, shape: tuple, sizes: dict) -> None:
        for axis, size in argument.paired(shape):
            if axis.text == "K":
                if size != 1 and size != sizes["R"]:
                    self._fail(argument, f" with K = {sizes['R']}, got {shape}")
                continue
            known = axis.size(sizes) if callable(axis.size) else sizes[axis.text] if axis.size is None else axis.size
            if size != known:
                named = "" if isinstance(axis.size, int) else f" with {axis.text.replace('R', 'K')} = {known}"
                self._fail(argument, f"{named}, got {shape}")

    def _check_route(self, route) -> None:
        good = isinstance(route, Tensor) and route.ndim in (2, 3)
        if not good or route.dtype == torch.bool or route.is_floating_point() or route.is_complex():
            got = f"{route.dtype} {tuple(route.shape)}" if isinstance(route, Tensor) else type(route).__name__
            raise ValueError(f"{self.name}: a route is an integer table (K, S) or (B, K, S), got {got}")

    def _check_rows(self, inputs: Sequence, route: Tensor, sizes: dict) -> None:
        rows = route.shape[-2]
        for at in self.token_positions:
            if inputs[at] is not None and inputs[at].shape[1] not in (1, rows):
                raise ValueError(
                    f"{self.name}: {self.parameters[at]} has {inputs[at].shape[1]} routes on axis 1, "
                    f"the route table has {rows}"
                )
        if route.ndim == 3 and route.shape[0] != sizes["B"]:
            raise ValueError(f"{self.name}: route table for {route.shape[0]} samples, the inputs have {sizes['B']}")

    def _bind(self, shapes: Sequence, inputs: Sequence, route) -> dict[str, Any]:
        """Sizes by name; with the options, and whether each argument is given. `route`: a table, its shape or None."""
        values: dict[str, Any] = {}
        for i in self._options_at:  # bool as int, which symbolic sizes can be added to
            values[self.parameters[i]] = int(inputs[i]) if isinstance(inputs[i], bool) else inputs[i]
        rows = 1
        for (_, argument), shape in zip(self._at, shapes):
            values[f"with_{argument.name}"] = shape is not None
            if shape is not None and argument.is_token:
                values.setdefault("B", shape[0])
                values.setdefault("L", shape[2])
                rows = max(rows, shape[1])
        table = route.shape if isinstance(route, Tensor) else route
        values["R"] = rows if table is None else max(rows, table[-2])
        values["S"] = values["L"] if table is None else table[-1]
        for (_, argument), shape in zip(self._at, shapes):
            if shape is not None:
                for axis, size in argument.paired(shape):
                    if axis.size is None and axis.text != "K":
                        values.setdefault(axis.text, size)
        for name, default in self.defaults.items():
            if values.get(name) is None:
                values[name] = default(values)
        return values

    # -- what follows from it -------------------------------------------------------------------------------------

    def shapes(self, inputs: Sequence, route: Tensor | None) -> tuple[tuple, list[tuple]]:
        """Shapes of the output (B, K, L, ...) and of the states, of inputs that were checked."""
        if not torch.compiler.is_compiling():
            checked = self.check(inputs, route)  # the same call again
            return checked.output, checked.states
        return self._shapes(self._bind([None if x is None else x.shape for x in self._tensors(inputs)], inputs, route))

    def _shapes(self, sizes: dict) -> tuple[tuple, list[tuple]]:
        output = () if self.output is None else self._shape(self.output, sizes)
        return output, [self._shape(state, sizes) for state in self.states.values()]

    @staticmethod
    def _shape(argument: Argument, sizes: dict, routes: str = "R") -> tuple:
        shape = []
        for axis in argument.axes:
            name = routes if axis.text == "K" else axis.text
            shape.append(axis.size(sizes) if callable(axis.size) else sizes[name] if axis.size is None else axis.size)
        return tuple(shape)

    def flops(self, inputs: Sequence, route: Sequence[int] | None) -> int:
        """Floating-point operations of a forward, from inputs with shapes in place of tensors."""
        return self._flops(self._bind(self._tensors(inputs), inputs, route))

    def example(
        self,
        batch: int = 2,
        routes: int = 2,
        length: int = 7,
        *,
        shared: Iterable[str] = (),
        without: Iterable[str] = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **sizes: int,
    ) -> dict[str, Tensor]:
        """Random tensors that the function takes, by name: all but those `without`.

        Args:
            batch, routes, length: B, R and L.
            shared: names of arguments that all routes share (route axis 1 long).
            without: names of optional arguments to leave out.
            dtype: of the floating-point ones. Values are drawn in float64, in the dtype itself on a GPU.
            device, generator: where and with which generator; torch's own by default.
            sizes: of other axes and values of options, by name.
        """
        values: dict[str, Any] = {f"with_{name}": name not in without for name in self.arguments}
        values |= dict(B=batch, R=routes, L=length, S=length, one=1)
        for argument in self.arguments.values():
            for axis in argument.axes:
                if axis.size is None and axis.text != "K":
                    values.setdefault(axis.text, self.sizes.get(axis.text, SIZES.get(axis.text, 3)))
        values |= {key: self.sizes.get(key, 0) for key in self.options} | sizes
        drawn = torch.float64 if device is None or torch.device(device).type == "cpu" else torch.float32
        made = {}
        for name, argument in self.arguments.items():
            if name in without:
                continue
            shape = self._shape(argument, values, "one" if name in shared else "R")
            x = torch.randn(shape, dtype=drawn, device=device, generator=generator)
            x = self.values[name](x) if name in self.values else x
            made[name] = x.to(dtype) if argument.kind == "float" else x > 1 if argument.kind == "bool" else x.long()
        return made
