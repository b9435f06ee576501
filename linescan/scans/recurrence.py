"""What every recurrence shares: one operator each, several implementations, inputs read through a route.

A recurrence is written once, as a plain function over inputs that already stand in time order: its *definition*.
`recurrence` turns the definition into a `torch.library` operator `linescan::NAME` that

- reads its token inputs (B, K, L, ...) through a route table and writes its output back to the same places,
- is differentiable: an implementation without a backward of its own is differentiated by running it again,
- has a fake (shape-only) form, so that `torch.compile` and `torch.export` see one operator,
- computes in float32 for half-precision inputs, with autocast off inside, and in float64 for float64 inputs,
- picks the fastest implementation for the device at run time, or the one that `backend` forces.

Route tables
------------
An integer tensor (K, S), or (B, K, S) where every sample has its own. Entry [k, t] is the token that route k visits at
step t, or a negative number:

- ``-1``: a padding token. All token inputs are zero there; the step is taken, its output is dropped.
- ``-(i + 2)``: token i is read once more; the output of this visit is dropped.

A token that no step of a route writes has output zero on that route. A route writes a token at most once.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import compress
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "Recurrence",
    "Implementation",
    "backend",
    "recurrence",
    "recurrences",
    "read",
    "write",
    "visited",
    "check_shapes",
    "call",
]

_forced = ""
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), bool, int, float))  # types of arguments that hide nothing
_fitting: set[tuple] = set()  # shapes that have been checked: a small scan takes no longer than checking it again
_registry: dict[str, "Recurrence"] = {}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one implementation of every recurrence called inside the `with` block.

    Args:
        name: "reference" (the sequential definition, differentiable any number of times), "chunked" (vectorised torch
            operations), or a kernel's name ("cpu", "triton"). The backward of a call made inside uses it too.

    Raises:
        ValueError: no recurrence has an implementation of that name.
    """
    global _forced
    known = sorted({i for r in _registry.values() for i in r.implementations})
    if name not in known:
        raise ValueError(f"unknown scan backend {name!r}; there are: {', '.join(known)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def recurrences() -> dict[str, "Recurrence"]:
    """All registered recurrences by name."""
    return dict(_registry)


@dataclass
class Implementation:
    """One way to compute a recurrence.

    Attributes:
        forward: (*inputs, route, merge) -> (output, final state), in grid order.
        backward: (grad_output, grad_state, *inputs, route, merge) -> gradients of the floating tensors among `inputs`
            that are not None, in order; `grad_state` may be None. None: differentiate `forward` by running it again.
        supports: (*inputs, route, merge) -> whether this call can be served (device, dtype, shape).
        check: (*inputs, route, merge) -> None; raises where a call cannot be served though `backend` asks for it.
        kernel: forward and backward return new contiguous tensors, and autocast has no part in them.
    """

    forward: Callable
    backward: Callable | None = None
    supports: Callable = lambda *args: True
    check: Callable = lambda *args: None
    kernel: bool = False


def _steps(route: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The token read at each step as an index into the flattened (B, K, L), and the (B, K, S) table itself."""
    table = route.long()
    if table.ndim == 2:
        table = table.expand(batch, *table.shape)
    return torch.where(table < 0, (-2 - table).clamp_min(0), table), table


def read(x: Tensor, route: Tensor | None) -> Tensor:
    """Gathers tokens into time order: x (B, K or 1, L, ...), route (K, S) or (B, K, S) -> (B, K, S, ...)."""
    if route is None:
        return x
    batch, routes, length = x.shape[:3]
    token, table = _steps(route, batch, length)
    row = torch.arange(batch, device=x.device)[:, None, None] * routes
    if routes > 1:
        row = row + torch.arange(routes, device=x.device)[:, None]
    flat = x.reshape(batch * routes * length, *x.shape[3:])
    out = flat.index_select(0, (row * length + token).flatten()).reshape(*table.shape, *x.shape[3:])
    padding = table == -1
    if padding.any():
        out = out.masked_fill(padding.reshape(*table.shape, *[1] * (x.ndim - 3)), 0)
    return out


def write(y: Tensor, route: Tensor | None, length: int, merge: bool = False) -> Tensor:
    """Puts time-ordered outputs back: y (B, K, S, ...) -> (B, K, L, ...); the inverse of `read` for permutations.

    With `merge` the sum over routes, (B, L, ...).
    """
    if route is None:
        return y.sum(1) if merge else y
    batch, routes, steps = y.shape[:3]
    _, table = _steps(route, batch, length)
    if merge and steps < length:  # routes through parts of the tokens: K whole maps would be mostly zeros
        first = torch.arange(batch, device=y.device)[:, None, None] * length
        target = torch.where(table < 0, batch * length, first + table).flatten()
        out = y.new_zeros(batch * length + 1, *y.shape[3:]).index_add(0, target, y.flatten(0, 2))
        return out[:-1].reshape(batch, length, *y.shape[3:])
    row = torch.arange(batch * routes, device=y.device).reshape(batch, routes, 1)
    slots = batch * routes * length  # one more takes what is dropped
    target = torch.where(table < 0, slots, row * length + table).flatten()
    step = target.new_full((slots + 1,), -1).scatter(0, target, torch.arange(len(target), device=y.device))[:-1]
    out = y.flatten(0, 2).index_select(0, step.clamp_min(0))  # gathering is faster than copying to an index
    if (step < 0).any():
        out = out.masked_fill((step < 0).reshape(-1, *[1] * (y.ndim - 3)), 0)
    out = out.reshape(batch, routes, length, *y.shape[3:])
    return out.sum(1) if merge else out


def check_shapes(name: str, route: Tensor | None, **arguments: tuple[Tensor | None, str]) -> None:
    """Raises a ValueError for the first argument whose shape departs from its layout; None passes.

    A layout names the axes, as in "B K L D"; a name seen before must have the same size again. In a token input "K" is
    the route axis, K or 1 long; everywhere else "R" is the number of routes.
    """
    signature = None
    if not torch.compiler.is_compiling():
        table = None if route is None else (route.shape, route.dtype)
        signature = (name, table, *[None if x is None else (layout, x.shape) for x, layout in arguments.values()])
        try:
            if signature in _fitting:
                return
        except TypeError:  # symbolic sizes
            signature = None
    _check_table(name, route)
    tokens = [x for x, layout in arguments.values() if x is not None and layout.startswith("B K L") and x.ndim > 2]
    sizes = {"R": visited(tokens, route)[1]}
    for key, (x, layout) in arguments.items():
        if x is None:
            continue
        axes = layout.split()
        shape = tuple(x.shape)
        if len(shape) != len(axes):
            wanted = ", ".join(axes).replace("R", "K")
            raise ValueError(f"{name}: {key} is ({wanted}), got {x.ndim} axes {shape}")
        for axis, size in zip(axes, shape):
            if size == 1 and axis == "K":
                continue
            known = sizes["R"] if axis == "K" else int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            if size != known:
                wanted = ", ".join(axes).replace("R", "K")
                raise ValueError(f"{name}: {key} is ({wanted}) with {axis.replace('R', 'K')} = {known}, got {shape}")
    if signature is not None:
        if len(_fitting) > 4096:
            _fitting.clear()
        _fitting.add(signature)


def call(op: "Recurrence", *inputs, route: Tensor | None, merge: str | None, return_final_state: bool):
    """Runs an operator and returns what a public function returns: the output, or (output, final state).

    Raises:
        ValueError: `merge` is neither None nor "sum".
    """
    if merge not in (None, "sum"):
        raise ValueError(f"{op.name}: merge is None (one output a route) or 'sum', got {merge!r}")
    output, state = op(*inputs, route=route, merge=merge == "sum")
    return (output, state) if return_final_state else output


def _check_table(name: str, route: Tensor | None) -> None:
    if route is not None and (route.is_floating_point() or route.ndim not in (2, 3)):
        raise ValueError(
            f"{name}: a route is an integer table (K, S) or (B, K, S), got {route.dtype} {tuple(route.shape)}"
        )


def visited(tokens: Sequence[Tensor], route: Tensor | None) -> tuple[int, int, int]:
    """(B, K, L) of a call, from its token inputs (each with K or 1 on the route axis) and its route table."""
    batch, length = tokens[0].shape[0], tokens[0].shape[2]
    routes = max(x.shape[1] for x in tokens)
    if route is not None:
        routes = max(routes, route.shape[-2])
    return batch, routes, length


def _apart(outputs: Sequence[Tensor], inputs: Sequence) -> list[Tensor]:
    """Contiguous outputs that share no memory with each other or with an input, as an operator must return them."""
    seen = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
    separate = []
    for x in outputs:
        x = x.contiguous()
        x = x.clone() if x.untyped_storage().data_ptr() in seen else x
        seen.add(x.untyped_storage().data_ptr())
        separate.append(x)
    return separate


def is_plain(inputs) -> bool:
    """Whether nobody watches this call: no tracing, no dispatch mode, no functional transform, no tensor subclass.

    Such a call need not go through the dispatcher, which costs as much as the scan of a small image.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    ) and _PLAIN.issuperset(map(type, inputs))


class Recurrence:
    """A named recurrence with its operator and implementations; made by `recurrence`."""

    def __init__(self, definition: Callable, tokens: Sequence[str], shapes: Callable, flops: Callable | None):
        self.name = definition.__name__.strip("_")
        self.definition = definition
        self.parameters = list(signature(definition).parameters)
        self.is_token = [name in tokens for name in self.parameters]
        self.shapes = shapes
        self.implementations: dict[str, Implementation] = {}
        self.register("reference", self._through_route(definition))
        self._make_operator(flops)
        _registry[self.name] = self

    # -- implementations ------------------------------------------------------------------------------------------

    def register(self, name: str, *args, **kwargs):
        """Adds an `Implementation`; later ones are preferred to earlier ones where they support a call."""
        self.implementations[name] = Implementation(*args, **kwargs)

    def chunked(self, core: Callable) -> Callable:
        """Decorator: registers a vectorised form with the definition's own signature (inputs in time order)."""
        self.register("chunked", self._through_route(core))
        return core

    def chunked_backward(self, core: Callable) -> Callable:
        """Decorator: gives the chunked form a backward of its own, in time order too.

        The function takes (grad_output (B, K, S, ...), grad_state, *the definition's inputs) and returns the gradients
        of the floating tensors among the inputs that are not None, in order.
        """
        self.implementations["chunked"].backward = self._backward_through_route(core)
        return core

    def _in_time_order(self, inputs, route: Tensor | None) -> list:
        """The inputs as a definition takes them: token inputs (B, K, S, ...), floating ones in the compute dtype."""
        compute = self._compute_dtype(inputs)
        batch, routes, _ = self._visited(inputs, route)
        ready = []
        for x, token in zip(inputs, self.is_token):
            if self._has_gradient(x):
                x = x.to(compute)
                if token:
                    x = read(x, route)
                    x = x.expand(batch, routes, *x.shape[2:])
            ready.append(x)
        return ready

    def _through_route(self, core: Callable) -> Callable:
        """A time-ordered function as one in grid order, computing in at least float32."""

        def forward(*args):
            *inputs, route, merge = args
            output, state = core(*self._in_time_order(inputs, route))
            output = write(output, route, self._visited(inputs, route)[2], merge)
            return output.to(self._tokens(inputs)[0].dtype), state

        return forward

    def _backward_through_route(self, core: Callable) -> Callable:
        """The same for a backward: gathers the output's gradient, scatters the inputs'."""

        def backward(grad_output, grad_state, *args):
            *inputs, route, merge = args
            batch, routes, length = self._visited(inputs, route)
            compute = self._compute_dtype(inputs)
            grad_output = grad_output.to(compute)
            if merge:
                grad_output = grad_output.unsqueeze(1)
                if route is None:
                    grad_output = grad_output.expand(-1, routes, *grad_output.shape[2:])
            if route is not None:  # a visit whose output is dropped has gradient zero, as padding has input zero
                grad_output = read(grad_output, route.clamp_min(-1))
            if grad_state is None:
                grad_state = grad_output.new_zeros(self.shapes(batch, routes, length, *inputs)[1])

            def ready(*floats):
                return tuple(self._differentiable(self._in_time_order(self._replace(inputs, floats), route)))

            ordered, scatter = torch.func.vjp(ready, *self._differentiable(inputs))
            return scatter(tuple(core(grad_output, grad_state, *self._replace(inputs, ordered))))

        return backward

    def pick(self, name: str, *args) -> Implementation:
        """The implementation `name`, or with "" the fastest that supports the call."""
        if name:
            implementation = self.implementations.get(name) or self.implementations["chunked"]
            implementation.check(*args)
            return implementation
        for implementation in reversed(self.implementations.values()):
            if implementation.supports(*args):
                return implementation
        raise RuntimeError(f"{self.name}: no implementation supports this call")

    # -- the operator ---------------------------------------------------------------------------------------------

    def _make_operator(self, flops: Callable | None) -> None:
        inputs = torch.library.infer_schema(self.definition, mutates_args=()).rpartition(") ->")[0][1:]
        common = f"{inputs}, Tensor? route, bool merge, str backend"
        qualified = f"linescan::{self.name}"

        forward = torch.library.custom_op(
            qualified, self._forward, mutates_args=(), schema=f"({common}) -> (Tensor, Tensor)"
        )
        backward = torch.library.custom_op(
            f"{qualified}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor grad_output, Tensor? grad_state, {common}) -> Tensor[]",
        )
        forward.register_fake(self._fake)
        backward.register_fake(
            lambda go, gs, *args: [
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in self._differentiable(args)
            ]
        )

        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
            ctx.others = [None if tensor else x for x, tensor in zip(inputs, ctx.is_tensor)]
            ctx.save_for_backward(*compress(inputs, ctx.is_tensor))
            ctx.output = output[0].shape, output[0].dtype, output[0].device

        def differentiate(ctx, grad_output, grad_state):
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if tensor else x for x, tensor in zip(ctx.others, ctx.is_tensor)]
            if grad_output is None:
                shape, dtype, device = ctx.output
                grad_output = torch.zeros(shape, dtype=dtype, device=device)
            # a gradient that will be differentiated again has to know that it cannot be
            plain = not torch.is_grad_enabled() and is_plain((grad_output, grad_state))
            grads = iter((self._backward if plain else backward)(grad_output, grad_state, *inputs))
            return tuple([
                next(grads) if tensor and x.is_floating_point() else None for x, tensor in zip(inputs, ctx.is_tensor)
            ])  # fmt: skip

        # The older form of a Function: with a `setup_context` of its own, torch binds the arguments anew at every call.
        def forward_eagerly(ctx, *inputs):
            output = self._forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        forward.register_autograd(differentiate, setup_context=setup_context)
        self._eager = type(
            self.name,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward_eagerly),
                "backward": staticmethod(differentiate),
            },
        )

        def no_second_derivative(ctx, *grads):
            raise RuntimeError(
                f"{self.name} has no second derivative in its fast forms; "
                "use `with linescan.scans.backend('reference'):` for the forward pass"
            )

        backward.register_autograd(no_second_derivative, setup_context=lambda ctx, inputs, output: None)
        self.operator = forward
        if flops is not None:
            overload = getattr(torch.ops.linescan, self.name)

            @register_flop_formula(overload)
            def formula(*shapes, out_shape=None, **kwargs):
                return flops(*shapes[: len(self.parameters)])

    @staticmethod
    def _has_gradient(x) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point()

    def _differentiable(self, args) -> list[Tensor]:
        return [x for x in args if self._has_gradient(x)]

    def _replace(self, args, floats) -> list:
        """`args` with other tensors in place of the differentiable ones."""
        floats = iter(floats)
        return [next(floats) if self._has_gradient(x) else x for x in args]

    def _compute_dtype(self, inputs) -> torch.dtype:
        return torch.float64 if torch.float64 in [x.dtype for x in self._differentiable(inputs)] else torch.float32

    def _tokens(self, inputs) -> list[Tensor]:
        return [x for x, token in zip(inputs, self.is_token) if token and x is not None]

    def _visited(self, inputs, route: Tensor | None) -> tuple[int, int, int]:
        return visited(self._tokens(inputs), route)

    def _fake(self, *args):
        *inputs, route, merge, _ = args
        first = self._tokens(inputs)[0]
        output, state = self.shapes(*self._visited(inputs, route), *inputs)
        if merge:
            output = (output[0], *output[2:])
        return first.new_empty(output), first.new_empty(state, dtype=self._compute_dtype(inputs))

    def _forward(self, *args):
        *call, name = args
        implementation = self.pick(name, *call)
        if implementation.kernel:
            return implementation.forward(*call)
        with torch.autocast(call[0].device.type, enabled=False):
            outputs = implementation.forward(*call)
        return tuple(_apart(outputs, call))

    def _backward(self, grad_output, grad_state, *args):
        *call, name = args
        implementation = self.pick(name, *call)
        if implementation.kernel:
            return implementation.backward(grad_output, grad_state, *call)
        with torch.autocast(grad_output.device.type, enabled=False):
            if implementation.backward is not None:
                grads = implementation.backward(grad_output, grad_state, *call)
                return _apart(grads, (grad_output, grad_state, *call))

            def again(*floats):
                return implementation.forward(*self._replace(call, floats))

            (_, state), vjp = torch.func.vjp(again, *self._differentiable(call))
            grad_state = torch.zeros_like(state) if grad_state is None else grad_state
            return _apart(vjp((grad_output, grad_state)), (grad_output, grad_state, *call))

    def __call__(self, *inputs, route: Tensor | None = None, merge: bool = False) -> tuple[Tensor, Tensor]:
        """(output (B, K, L, ...) in grid order, or (B, L, ...) summed over routes if `merge`; final state)."""
        self._check_route(inputs, route)
        if _forced == "reference":  # plain torch: differentiable any number of times
            with torch.autocast(inputs[0].device.type, enabled=False):
                return self.implementations["reference"].forward(*inputs, route, merge)
        if not is_plain(inputs):
            return self.operator(*inputs, route, merge, _forced)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return self._eager.apply(*inputs, route, merge, _forced)
        return self._forward(*inputs, route, merge, _forced)

    def _check_route(self, inputs, route: Tensor | None) -> None:
        if route is None:
            return
        _check_table(self.name, route)
        for x, token, name in zip(inputs, self.is_token, self.parameters):
            if token and x is not None and x.shape[1] not in (1, route.shape[-2]):
                raise ValueError(
                    f"{self.name}: {name} has {x.shape[1]} routes on axis 1, the route table has {route.shape[-2]}"
                )
        if route.ndim == 3 and route.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"{self.name}: route table for {route.shape[0]} samples, inputs have {inputs[0].shape[0]}")


def recurrence(tokens: Sequence[str], shapes: Callable, flops: Callable | None = None) -> Callable:
    """Decorator that registers a definition as the operator `linescan::NAME` and returns its `Recurrence`.

    Args:
        tokens: names of the arguments with layout (B, K or 1, L, ...), read along the route; the first is the one whose
            dtype the output takes. Definitions get them as (B, K, S, ...) in time order; every other argument as it is.
        shapes: (B, K, L, *inputs) -> (output shape (B, K, L, ...), final state shape), without `merge`.
        flops: (*input shapes, None for a missing one) -> floating-point operations of a forward (two a multiply-add).

    The definition has type annotations, returns (output (B, K, S, ...), final state), and computes step by step.
    """
    return lambda definition: Recurrence(definition, tokens, shapes, flops)
