"""Recurrences in standard operators, for graphs that run where linescan is not: ONNX.

While `torch.onnx.export` traces a model, each recurrence is what it is here. Inputs are gathered into time order with
the route table, a loop (`Scan` in ONNX) carries the states over pieces of time, and the outputs are gathered back. The
graph has the size of one piece, whatever the length and the batch.

A recurrence needs nothing for that: its definition, called on a few tokens at a time with the states between, is the
body of the loop. Where more can be done for all tokens at once, or the recurrence reads them in both directions, it has
a form of its own: `Recurrence.exported`.

Inside `functions`, a recurrence becomes the call of a function of the domain "linescan" instead, whose body is that
form: it is traced once for all calls of one kind. Where there is a kernel, the function has the name of its operator: a
runtime that has the kernel runs it, and any other the body.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import example_size, scan
from . import visits

if TYPE_CHECKING:
    from .recurrence import Recurrence

__all__ = ["DOMAIN", "Body", "Functions", "functions", "in_pieces", "loop", "read", "write"]

DOMAIN = "linescan"  # of the operators that have kernels
STEPS = 4  # of a piece; measured in ONNX Runtime: the loop's own work counts little from there on


def loop(
    body: Callable,
    states: Sequence[Tensor],
    tokens: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    size: int = STEPS,
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Carries states over pieces of `size` tokens.

    Args:
        body: (states, tokens, others) -> (states, outputs), all lists of tensors, of one piece (B, K, size, ...). It
            changes nothing in place. Tokens of zeros fill the last piece: the final states count where these leave them
            alone.
        states: before the first token, of the shapes that `body` returns.
        tokens: (B, K, T, ...).
        others: tensors that are the same for every piece.
        reverse: from the last token to the first; `body` then gets its pieces in that order.

    Returns:
        The states after the last piece, and the outputs (B, K, T, ...).
    """
    length = tokens[0].shape[2]

    def split(x: Tensor) -> Tensor:  # (B, K, T, ...) -> (pieces, B, K, size, ...)
        x = x.flip(2) if reverse else x
        if size > 1:
            x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, -length % size))
        return x.unflatten(2, (-1, size)).movedim(2, 0)

    kept = len(states) + len(others)  # `others` are carried along: OpenVINO reads no loop that takes them from outside

    def carried(tensors: Sequence[Tensor]) -> list[Tensor]:  # no views, and at the end like what they began with
        return [x.clone(memory_format=torch.contiguous_format) for x in tensors]

    def step(*given: Tensor) -> list[Tensor]:
        same = given[len(states) : kept]
        after, outputs = body(given[: len(states)], given[kept:], same)
        return [*carried((*after, *same)), *outputs]

    results = scan(step, carried((*states, *others)), [split(x) for x in tokens])
    outputs = [y.movedim(0, 2).flatten(2, 3)[:, :, :length] for y in results[kept:]]
    return list(results[: len(states)]), [y.flip(2) if reverse else y for y in outputs]


def in_pieces(recurrence: "Recurrence", inputs: Sequence, size: int = STEPS) -> tuple:
    """A definition in a loop, from inputs in time order to (output, final state).

    Where the definition counts tokens, `size` is a multiple of the period that it counts in. What is left of the tokens
    after whole pieces is one more, shorter piece: only the definition itself may say what padding would do to the
    states. Where their number is not known, a piece is one token.
    """
    layout, inputs = recurrence.layout, list(inputs)
    token_at = [at for at in layout.token_positions if inputs[at] is not None]
    state_at = layout.state_positions
    other_at = [
        at for at, x in enumerate(inputs) if isinstance(x, Tensor) and at not in token_at and at not in state_at
    ]
    length = inputs[token_at[0]].shape[2]
    if not isinstance(length, int):
        size = 1

    def define(states: Sequence[Tensor], tokens: Sequence[Tensor], others: Sequence[Tensor]):
        given = list(inputs)
        for positions, values in ((state_at, states), (token_at, tokens), (other_at, others)):
            for at, x in zip(positions, values):
                given[at] = x
        output, state = recurrence.definition(*given)
        return list(state) if isinstance(state, tuple) else [state], [output]

    states, tokens, others = ([inputs[at] for at in positions] for positions in (state_at, token_at, other_at))
    rest = length % size if size > 1 else 0
    outputs = []
    if not isinstance(length, int) or length >= size:
        whole = [x[:, :, : length - rest] for x in tokens] if rest else tokens
        states, outputs = loop(define, states, whole, others, size)
    if rest:
        states, last = define(states, [x[:, :, length - rest :] for x in tokens], others)
        outputs += last
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], tuple(states) if len(states) > 1 else states[0]


# -- routes -----------------------------------------------------------------------------------------------------------
# As `visits.read` and `visits.write`, for tables that serve every sample: their indices do not depend on the batch, so
# that a runtime makes them once, when it loads the graph.


def _columns(table: Tensor, per_route: int, shared: bool) -> Tensor:
    """Indices into tokens (B, K * per_route, ...) for a table (K, ...) of tokens of each route."""
    if not shared:
        table = table + per_route * torch.arange(table.shape[0], device=table.device)[:, None]
    return table.flatten()


def _place(mask: Tensor, x: Tensor) -> Tensor:
    """(K, T) against x (B, K, T, ...)."""
    return mask.reshape(1, *mask.shape, *[1] * (x.ndim - 3))


def read(x: Tensor, route: Tensor | None) -> Tensor:
    """Gathers tokens into time order: x (B, K or 1, L, ...), route (K, S) or (B, K, S) -> (B, K, S, ...)."""
    if route is None or route.ndim == 3:
        return visits.read(x, route)
    table = route.long()
    token = torch.where(table < 0, (-2 - table).clamp_min(0), table)
    columns = _columns(token, x.shape[2], x.shape[1] == 1)
    out = x.flatten(1, 2).index_select(1, columns).unflatten(1, table.shape)
    return out.masked_fill(_place(table == -1, x), 0)


def write(y: Tensor, route: Tensor | None, length: int, merge: bool) -> Tensor:
    """Puts time-ordered outputs back: y (B, K, S, ...) -> (B, K, L, ...), or with `merge` their sum (B, L, ...)."""
    if route is None or route.ndim == 3:
        return visits.write(y, route, length, merge)
    table = route.long()
    routes, steps = table.shape
    slots = torch.where(table < 0, length, table)  # one more slot takes what is dropped
    times = torch.arange(steps, device=y.device).expand(routes, steps)
    step = table.new_full((routes, length + 1), -1).scatter(1, slots, times)[:, :-1]
    out = y.flatten(1, 2).index_select(1, _columns(step.clamp_min(0), steps, False)).unflatten(1, step.shape)
    out = out.masked_fill(_place(step < 0, y), 0)
    return out.sum(1) if merge else out


# -- functions --------------------------------------------------------------------------------------------------------


@dataclass
class Body:
    """What the calls of one kind compute, in standard operators.

    Attributes:
        operator: that is called.
        arguments: names of its tensors, in order; those that are left out, too.
        attributes: names of the others.
        module: takes the tensors that are there, and returns the outputs.
        examples: shapes and dtypes of these tensors by name.
        dynamic: of each, the axes that may have any size.
    """

    operator: str
    arguments: list[str]
    attributes: list[str]
    module: nn.Module
    examples: dict[str, tuple[tuple[int, ...], torch.dtype]]
    dynamic: list[tuple[int, ...]]


class _Standard(nn.Module):
    """A recurrence in standard operators, from the tensors that are there.

    Args:
        run: (*inputs, route, merge) -> outputs.
        call: its arguments, with the position of a tensor in place of each tensor.
    """

    def __init__(self, run: Callable, call: Sequence):
        super().__init__()
        self.run, self.call = run, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(*(tensors[x.at] if isinstance(x, _Position) else x for x in self.call))


@dataclass(frozen=True)
class _Position:
    at: int


class Functions:
    """The bodies of all calls of a graph, by name; calls of the same kind share one.

    A call is a node of the domain, whose attribute `body` is the name.

    Args:
        kernels: whether calls are those that kernels take; a recurrence without one then has no function. Else each has
            one of its own.
    """

    def __init__(self, kernels: bool = True) -> None:
        self.kernels = kernels
        self.bodies: dict[str, Body] = {}
        self._names: dict[tuple, str] = {}

    def operator(self, recurrence: "Recurrence") -> tuple[str, Callable[..., dict[str, Any]]] | None:
        """The function that calls become, as `Recurrence.in_graphs`; None: they become none."""
        if self.kernels:
            return recurrence.in_graphs
        names = (*recurrence.parameters, "route", "merge")
        return recurrence.name, lambda *call: dict(zip(names, call))

    def call(self, recurrence: "Recurrence", inputs: Sequence, route: Tensor | None, merge: bool) -> tuple:
        """(output, *states) of a recurrence that has a function, in float32."""
        operator, arguments = self.operator(recurrence)
        inputs = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        call = [*inputs, None if route is None else route.long(), merge]
        given = arguments(*call)
        tensors = {key: x for key, x in given.items() if x is None or isinstance(x, Tensor)}
        others = {key: x for key, x in given.items() if key not in tensors}
        there = {key: x for key, x in tensors.items() if x is not None}
        positions = {id(x): _Position(at) for at, x in enumerate(there.values())}
        call = [positions[id(x)] if isinstance(x, Tensor) else x for x in call]

        shapes = tuple((key, tuple(map(str, x.shape))) for key, x in there.items())
        kind = (recurrence.name, *call, *others.items(), *shapes)
        if kind not in self._names:
            name = self._names[kind] = f"{recurrence.name}_{len(self.bodies)}"
            self.bodies[name] = Body(
                operator, list(tensors), list(others), _Standard(recurrence.in_standard_operators, call),
                {key: (tuple(map(example_size, x.shape)), x.dtype) for key, x in there.items()},
                [tuple(at for at, size in enumerate(x.shape) if not isinstance(size, int)) for x in there.values()],
            )  # fmt: skip
        output, states = recurrence.layout.shapes(inputs, route)
        results = [(output[0], *output[2:]) if merge else output, *states]
        return tuple(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{operator}", list(tensors.values()), {**others, "body": self._names[kind]},
                dtypes=[torch.float32] * len(results), shapes=results, version=1,
            )
        )  # fmt: skip


_functions: ContextVar[Functions | None] = ContextVar("linescan_functions", default=None)


def current_functions() -> Functions | None:
    """Those of the `with functions()` block at hand."""
    return _functions.get()


@contextmanager
def functions(kernels: bool = True) -> Iterator[Functions]:
    """Inside, recurrences are traced as calls of functions; with `kernels` those alone that have one."""
    found = Functions(kernels)
    token = _functions.set(found)
    try:
        yield found
    finally:
        _functions.reset(token)
