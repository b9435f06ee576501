"""What every recurrence shares: one operator each, several implementations, inputs read through a route.

A recurrence is written once, as a plain function over inputs that already stand in time order: its *definition*.
`recurrence` turns the definition and its layout into a `torch.library` operator `linescan::NAME` that

- checks its arguments (`linescan.scans.layout`),
- reads its token inputs (B, K, L, ...) through a route table and writes its output back to the same places
  (`linescan.scans.visits` says what tables mean),
- is differentiable: an implementation without a backward of its own is differentiated by running it again,
- has a fake (shape-only) form, so that `torch.compile` and `torch.export` see one operator,
- is made of standard operators where `torch.onnx.export` traces it (`linescan.scans.exported`),
- computes in float32 for half-precision inputs, with autocast off inside, and in float64 for float64 inputs,
- picks the fastest implementation for the device at run time, or the one that `backend` forces.

Inside a transform of `torch.func` and in forward-mode differentiation the definition itself runs, which is slow, and
right for all of them. A graph that was traced at one size and runs at another raises an error: it holds route tables.
"""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from itertools import compress
from typing import Any, Callable, ContextManager, Iterator, NamedTuple, Sequence, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .._compat import above_autograd, is_jit_tracing, is_transformed, is_watched, plain_shape, unwatched
from . import exported
from .layout import Layout
from .visits import read, visited, write

__all__ = [
    "Implementation",
    "Public",
    "Recurrence",
    "backend",
    "check_arguments",
    "check_merge",
    "functions",
    "given_states",
    "precise",
    "public",
    "recurrence",
    "recurrences",
]

# Types of arguments without dispatch behaviour.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))


class _Setting(NamedTuple):
    backend: str = ""
    dispatcher: bool = False


_setting: ContextVar[_Setting] = ContextVar("linescan_backend", default=_Setting())
_traced_setting = _Setting()  # the same for torch.compile, which reads no context variable, but has a guard on this
_recurrences: dict[str, "Recurrence"] = {}
_functions: dict[str, "Public"] = {}


@contextmanager
def backend(name: str = "", *, dispatcher: bool = False) -> Iterator[None]:
    """Forces one implementation of every recurrence called inside the `with` block, in this thread or task only.

    Args:
        name: "reference" (the sequential definition, differentiable any number of times), "chunked" (vectorised torch
            operations), or a kernel's name ("cpu", "triton"). The backward of a call made inside uses it too. A
            recurrence without a form of that name raises a ValueError when it is called. "": the fastest.
        dispatcher: call the operator through torch's dispatcher, as a compiled graph does, where it could be spared.

    Raises:
        ValueError: no recurrence has an implementation of that name.
    """
    global _traced_setting
    known = sorted({i for r in _recurrences.values() for i in r.implementations})
    if name and name not in known:
        raise ValueError(f"unknown scan backend {name!r}; there are: {', '.join(known)}")
    before, traced_before = _setting.get(), _traced_setting
    setting = _Setting(name, dispatcher)
    _setting.set(setting)
    _traced_setting = setting
    try:
        yield
    finally:
        _setting.set(before)
        _traced_setting = traced_before


def recurrences() -> dict[str, "Recurrence"]:
    """All registered recurrences by name."""
    return dict(_recurrences)


def functions() -> dict[str, "Public"]:
    """All public functions by name."""
    return dict(_functions)


@dataclass
class Implementation:
    """One way to compute a recurrence. `state` stands for a tensor, a tuple of the states where there are several, or
    None where there is none.

    Attributes:
        forward: (*inputs, route, merge) -> (output, final state), in grid order.
        backward: (grad_output, grad_state, *inputs, route, merge) -> gradients of the floating tensors among `inputs`
            that are not None, in order; `grad_state` and each of several may be None. None: differentiate `forward` by
            running it again. A name: that implementation's.
        supports: (*inputs, route, merge) -> whether this call can be served (device, dtype, shape).
        check: (*inputs, route, merge) -> None; raises where a call cannot be served though `backend` asks for it.
        kernel: forward and backward return new contiguous tensors, and autocast has no part in them.
        room: (*inputs, route, merge) -> a list of tensors, which a kernel's forward fills where a backward will follow,
            and its backward reads. Both take it as `kept`, which is empty in inference and in graphs, whose operators
            hand nothing over. None: they do not take it.
    """

    forward: Callable
    backward: Callable | str | None = None
    supports: Callable = lambda *args: True
    check: Callable = lambda *args: None
    kernel: bool = False
    room: Callable | None = None


def without_autocast(device: str) -> ContextManager:
    """Inside, there is no autocast. Where there is none outside, a graph has no region for it: torch's exporters take
    a multiple of the time for these."""
    inside = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if inside else nullcontext()


def is_plain(inputs) -> bool:
    """True if no tracing, dispatch mode, functorch transform or tensor subclass is involved in a call.

    Such a call need not go through the dispatcher, which costs as much as the scan of a small image.
    """
    return not is_watched() and _PLAIN.issuperset(map(type, inputs))


def is_forced() -> bool:
    """True if `backend` forces a form that is none of the kernels."""
    return _setting.get().backend in ("reference", "chunked")


def wants_gradient(inputs) -> bool:
    """True if autograd records a call of these inputs."""
    return torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in inputs])


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


def _flat(result: tuple) -> tuple:
    """(output, state) -> (output, *states)."""
    output, state = result
    return (output,) if state is None else (output, *state) if isinstance(state, tuple) else result


def _packed(states: Sequence) -> Tensor | tuple | None:
    """States as public functions and implementations have them."""
    return tuple(states) if len(states) > 1 else states[0] if states else None


class Recurrence:
    """A named recurrence with its operator and implementations; made by `recurrence`.

    Attributes:
        name: of the operator, `linescan::NAME`.
        definition: the sequential function over inputs in time order.
        parameters: names of the inputs.
        layout: of the inputs, the output and the states.
        implementations: by name; the later ones are preferred.
        in_graphs: the operator of `linescan.scans.exported.DOMAIN` that has a kernel, and what makes its arguments by
            name, in order, from (*inputs, route, merge): these tensors, None and plain values. None: no kernel.
    """

    def __init__(self, definition: Callable, layout: Layout, empty: Callable[..., Sequence[Tensor]] | None = None):
        self.name = layout.name
        self.definition = definition
        self.parameters = layout.parameters
        self.layout = layout
        self.empty = empty
        self.implementations: dict[str, Implementation] = {}
        self.register("reference", self._through_route(definition))
        self._nothing = Implementation(self._without_steps)
        self._exported: Callable = lambda *inputs: exported.in_pieces(self, inputs)
        self.in_graphs: tuple[str, Callable[..., dict[str, Any]]] | None = None
        self._make_operator()
        _recurrences[self.name] = self

    def __call__(
        self, *inputs, route: Tensor | None = None, merge: str | None = None, return_final_state: bool = False
    ):
        """What a public function returns: the output, or with `return_final_state` (output, final state).

        Args:
            inputs: all inputs of the definition, in order; options that are None take their defaults.
            route: table (K, S) or (B, K, S).
            merge: None for one output per route (B, K, L, ...), or "sum" for their sum (B, L, ...).
            return_final_state: whether to return the states after the last step too.

        Raises:
            ValueError: an argument that does not fit, or a backend that this recurrence does not have.
        """
        check_merge(self.name, merge)
        summed = merge is not None
        if is_plain(inputs):
            inputs = self.layout.check(inputs, route).fill(inputs)
            setting = _setting.get()
            if setting.dispatcher:
                outputs = self._dispatch(inputs, route, summed, setting.backend)
            elif setting.backend == "reference":  # plain torch: differentiable any number of times
                outputs = self._define(inputs, route, summed)
            elif wants_gradient(inputs):
                outputs = self._eager.apply(*inputs, route, summed, setting.backend, 0)
            else:
                outputs = self._forward(*inputs, route, summed, setting.backend, 0)
        else:
            outputs = self._watched(inputs, route, summed)
        if not return_final_state:
            return outputs[0]
        return outputs[0], _packed(outputs[1:])

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

    def exported(self, core: Callable) -> Callable:
        """Decorator: the form that graphs of standard operators have, where it is not the definition in a loop.

        A function with the definition's own signature (inputs in time order) that changes nothing in place and whose
        operations do not multiply with the length: it has `exported.loop` for that.
        """
        self._exported = core
        return core

    def pick(self, name: str, *call) -> Implementation:
        """The implementation `name`, or with "" the fastest that supports the call."""
        if not name:
            for implementation in reversed(self.implementations.values()):
                if implementation.supports(*call):
                    break
            if implementation.kernel:
                return implementation
        elif name not in self.implementations:
            raise ValueError(f"{self.name} has no form {name!r}; it has: {', '.join(self.implementations)}")
        tokens, route = self._tokens(call), call[-2]
        if tokens[0].shape[0] == 0 or (tokens[0].shape[2] if route is None else route.shape[-1]) == 0:
            return self._nothing
        if name:
            implementation = self.implementations[name]
            implementation.check(*call)
        self.layout.check_devices(call[:-2], route)  # kernels check devices themselves
        return implementation

    def _in_time_order(self, inputs, route: Tensor | None, read: Callable = read) -> list:
        """The inputs as a definition takes them: token inputs (B, K, S, ...), floating ones in the compute dtype."""
        compute = self._compute_dtype(inputs)
        batch, routes, _ = self._visited(inputs, route)
        ready = [x.to(compute) if self._has_gradient(x) else x for x in inputs]
        for at in self.layout.token_positions:
            if ready[at] is not None:
                x = read(ready[at], route)
                ready[at] = x.expand(batch, routes, *x.shape[2:])
        return ready

    def _with_states(self, ordered: Sequence, inputs: Sequence, route: Tensor | None) -> list:
        """Inputs in time order, with empty states where none are given."""
        ordered = list(ordered)
        missing = [at for at in self.layout.state_positions if ordered[at] is None]
        if missing:
            for at, state in zip(self.layout.state_positions, self._empty_states(inputs, route)):
                if at in missing:
                    ordered[at] = state
        return ordered

    def _empty_states(self, inputs: Sequence, route: Tensor | None) -> list[Tensor]:
        """The states before the first token."""
        first, dtype = self._tokens(inputs)[0], self._compute_dtype(inputs)
        states = [first.new_zeros(shape, dtype=dtype) for shape in self.layout.shapes(inputs, route)[1]]
        return states if self.empty is None else list(self.empty(*states))

    def _through_route(self, core: Callable, read: Callable = read, write: Callable = write) -> Callable:
        """A time-ordered function as one in grid order, computing in at least float32."""

        def forward(*args):
            *inputs, route, merge = args
            ordered = self._in_time_order(inputs, route, read)
            output, state = core(*self._with_states(ordered, inputs, route))
            output = write(output, route, self._visited(inputs, route)[2], merge)
            return output.to(self._tokens(inputs)[0].dtype), state

        return forward

    def _backward_through_route(self, core: Callable) -> Callable:
        """The same for a backward: gathers the output's gradient, scatters the inputs'."""

        def backward(grad_output, grad_state, *args):
            *inputs, route, merge = args
            routes = self._visited(inputs, route)[1]
            grad_output = grad_output.to(self._compute_dtype(inputs))
            if merge:
                grad_output = grad_output.unsqueeze(1)
                if route is None:
                    grad_output = grad_output.expand(-1, routes, *grad_output.shape[2:])
            if route is not None:  # a visit whose output is dropped has gradient zero, as padding has input zero
                grad_output = read(grad_output, route.clamp_min(-1))
            states = grad_state if isinstance(grad_state, tuple) else (grad_state,)
            if self.layout.states and None in states:
                empty = self._empty_states(inputs, route)
                grad_state = _packed([torch.zeros_like(x) if g is None else g for g, x in zip(states, empty)])

            def ready(*floats):
                return tuple(self._differentiable(self._in_time_order(self._replace(inputs, floats), route)))

            ordered, scatter = torch.func.vjp(ready, *self._differentiable(inputs))
            given = self._replace(inputs, ordered)
            full = self._with_states(given, inputs, route)
            grads = core(grad_output, grad_state, *full)
            pairs = zip([x for x, all_ in zip(given, full) if self._has_gradient(all_)], grads)
            return scatter(tuple([grad for x, grad in pairs if x is not None]))

        return backward

    def _without_steps(self, *args):
        """No step is taken, or there is no sample: outputs are zero, and states stay."""
        *inputs, route, merge = args
        output, shapes = self.layout.shapes(inputs, route)
        first = self._tokens(inputs)[0]
        nothing = sum([x.flatten()[:0].sum() for x in self._differentiable(inputs)])  # so that a gradient comes back
        output = first.new_zeros((output[0], *output[2:]) if merge else output) + nothing.to(first.dtype)
        states = []
        given = [inputs[at] for at in self.layout.state_positions]
        for x, empty, shape in zip(given, self._empty_states(inputs, route), shapes):
            if x is not None:
                x = x[tuple(map(slice, shape))].to(empty.dtype)
                after = [(0, want - have) for have, want in zip(x.shape, shape)]
                x = F.pad(x, [n for pair in reversed(after) for n in pair])
            states.append((empty if x is None else x) + nothing.to(empty.dtype))
        return output, _packed(states)

    # -- the operator ---------------------------------------------------------------------------------------------

    def _make_operator(self) -> None:
        # `slack` is S - L, which a traced graph keeps as a number where the table may be a constant of the graph: run
        # with another number of tokens, it gives itself away. A table that is made in the graph may have any number.
        common = f"{self._schema()}, Tensor? route, bool merge, str backend, SymInt slack"
        qualified = f"linescan::{self.name}"
        states = list(self.layout.states)
        results = ", ".join(["Tensor"] * (1 + len(states)))
        grads = "".join([f", Tensor? grad_{name}" for name in states])

        forward = torch.library.custom_op(
            qualified, self._operate, mutates_args=(), schema=f"({common}) -> {f'({results})' if states else results}"
        )
        backward = torch.library.custom_op(
            f"{qualified}_backward",
            above_autograd(self._operate_backward),  # kernels differentiate what is torch around them
            mutates_args=(),
            schema=f"(Tensor grad_output{grads}, {common}) -> Tensor[]",
        )
        forward.register_fake(self._fake)
        backward.register_fake(
            lambda *args: [
                torch.empty_like(x, memory_format=torch.contiguous_format)
                for x in self._differentiable(args[1 + len(states) :])
            ]
        )

        def setup_context(ctx, inputs, output, kept=()):
            output = output if isinstance(output, tuple) else (output,)
            ctx.set_materialize_grads(False)
            ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
            ctx.others = [None if tensor else x for x, tensor in zip(inputs, ctx.is_tensor)]
            ctx.save_for_backward(*compress(inputs, ctx.is_tensor), *kept)
            ctx.output = output[0].shape, output[0].dtype, output[0].device

        def differentiate(ctx, grad_output, *grad_states):
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if tensor else x for x, tensor in zip(ctx.others, ctx.is_tensor)]
            if grad_output is None:
                shape, dtype, device = ctx.output
                grad_output = torch.zeros(shape, dtype=dtype, device=device)
            # a gradient that will be differentiated again has to know that it cannot be
            plain = not torch.is_grad_enabled() and is_plain((grad_output, *grad_states))
            call = grad_output, *grad_states, *inputs
            grads = iter(self._operate_backward(*call, kept=list(tensors)) if plain else backward(*call))
            return tuple([
                next(grads) if tensor and x.is_floating_point() else None for x, tensor in zip(inputs, ctx.is_tensor)
            ])  # fmt: skip

        # The older form of a Function: with a `setup_context` of its own, torch binds the arguments anew at every call.
        def forward_eagerly(ctx, *inputs):
            output = self._forward(*inputs, kept=(kept := []))
            setup_context(ctx, inputs, output, kept)
            return output

        forward.register_autograd(differentiate, setup_context=setup_context)
        self._eager: Any = type(
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

        if not self.layout.counts:
            return

        @register_flop_formula(getattr(torch.ops.linescan, self.name))
        def formula(*args, out_shape=None, **kwargs):
            *inputs, route, _, _, _ = args
            return self.layout.flops(inputs, route)

    def _schema(self) -> str:
        """The inputs as an operator declares them: tensors by the layout, options by their annotations."""
        hints = get_type_hints(self.definition)
        words = []
        for name in self.parameters:
            argument = self.layout.arguments.get(name)
            if argument is not None:
                words.append(f"Tensor{'?' * argument.optional} {name}")
            else:
                words.append(f"{hints[name].__name__}{'?' * (name in self.layout.defaults)} {name}")
        return ", ".join(words)

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
        return [inputs[at] for at in self.layout.token_positions if inputs[at] is not None]

    def _visited(self, inputs, route: Tensor | None) -> tuple[int, int, int]:
        return visited(self._tokens(inputs), route)

    def _watched(self, inputs, route: Tensor | None, merge: bool) -> tuple:
        """A call that is compiled, traced, transformed, or seen by a dispatch mode or a tensor subclass."""
        if torch.onnx.is_in_onnx_export():
            return self._export(inputs, route, merge)
        if torch.compiler.is_compiling():  # the fake form checks the arguments
            expansions = self.layout.expansions(inputs, self._visited(inputs, route)[1])
            setting = _traced_setting
        else:
            with unwatched():
                checked = self.layout.check(inputs, route)
            inputs, expansions, setting = checked.fill(inputs), (), _setting.get()
            if is_transformed():
                return self._define(inputs, route, merge)
        for at, shape in expansions:
            inputs = (*inputs[:at], inputs[at].expand(shape), *inputs[at + 1 :])
        if setting.backend == "reference" and not setting.dispatcher and not is_jit_tracing():
            return self._define(inputs, route, merge)
        return self._dispatch(inputs, route, merge, setting.backend)

    def _define(self, inputs, route: Tensor | None, merge: bool) -> tuple:
        """The definition in plain torch operations."""
        call = *inputs, route, merge
        with torch.autocast(inputs[0].device.type, enabled=False):
            return _flat(self.pick("reference", *call).forward(*call))

    def _export(self, inputs, route: Tensor | None, merge: bool) -> tuple:
        """The call in standard operators, for graphs that run elsewhere."""
        inputs = self.layout.check(inputs, route).fill(inputs)
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]  # else the loop is traced for a backward
        found = exported.current_functions()
        if found is None or found.operator(self) is None or self._compute_dtype(inputs) != torch.float32:
            return self.in_standard_operators(*inputs, route, merge)
        output, *states = found.call(self, inputs, route, merge)
        return output.to(self._tokens(inputs)[0].dtype), *states

    def in_standard_operators(self, *call) -> tuple:
        """(output, *states) of a call (*inputs, route, merge)."""
        forward = self._through_route(self._exported, exported.read, exported.write)
        with without_autocast(call[0].device.type):
            return _flat(forward(*call))

    def _dispatch(self, inputs, route: Tensor | None, merge: bool, name: str) -> tuple:
        """The operator, through torch's dispatcher."""
        outputs = self.operator(*inputs, route, merge, name, self._slack(inputs, route))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _slack(self, inputs, route: Tensor | None) -> int:
        """S - L."""
        if route is None:
            return 0
        steps = plain_shape(route)[-1]
        slack = steps - plain_shape(inputs[self.layout.token_positions[0]])[2]
        # A table with a plain number of steps may be a constant, which fits this number of tokens alone.
        return slack if isinstance(steps, torch.SymInt) else int(slack)

    def new_outputs(self, *call) -> tuple[Tensor, Tensor | tuple | None]:
        """Room for (output, final state) of a call (*inputs, route, merge), with nothing in it yet."""
        *inputs, route, merge = call
        output, states = self.layout.shapes(inputs, route)
        first, dtype = self._tokens(inputs)[0], self._compute_dtype(inputs)
        output = first.new_empty((output[0], *output[2:]) if merge else output)
        return output, _packed([first.new_empty(state, dtype=dtype) for state in states])

    def _fake(self, *args):
        *call, _, _ = args
        *inputs, route, _ = call
        self.layout.check(inputs, route)
        outputs = _flat(self.new_outputs(*call))
        return outputs if len(outputs) > 1 else outputs[0]

    def _operate(self, *args):
        """The operator as graphs call it: checks what held when they were traced."""
        *inputs, route, merge, name, slack = args
        checked = self.layout.check(inputs, route)
        if route is not None and route.shape[-1] - checked.sizes["L"] != slack:
            raise ValueError(
                f"{self.name}: traced with {route.shape[-1] - slack} tokens and a route table for them, now run with "
                f"{checked.sizes['L']}; trace the model again at this size"
            )
        outputs = self._forward(*checked.fill(inputs), route, merge, name, slack)
        return outputs if len(outputs) > 1 else outputs[0]

    def _forward(self, *args, kept: list | None = None) -> tuple:
        *call, name, _ = args
        implementation = self.pick(name, *call)
        if implementation.kernel:
            if kept is None or implementation.room is None:
                return _flat(implementation.forward(*call))
            kept += implementation.room(*call)
            return _flat(implementation.forward(*call, kept=kept))
        if call[0].is_meta:
            return _flat(self.new_outputs(*call))
        with torch.autocast(call[0].device.type, enabled=False):
            outputs = _flat(implementation.forward(*call))
        return tuple(_apart(outputs, call))

    def _operate_backward(self, grad_output, *args, kept=()):
        states = len(self.layout.states)
        grad_states, (*inputs, route, merge, name, _) = args[:states], args[states:]
        if any([inputs[at] is None for at in self.layout.default_positions]):
            inputs = self.layout.check(inputs, route).fill(inputs)
        call = *inputs, route, merge
        implementation = self.pick(name, *call)
        if isinstance(implementation.backward, str):
            implementation = self.implementations[implementation.backward]
        grad_state = _packed(grad_states)
        if implementation.kernel:
            if implementation.room is None:
                return implementation.backward(grad_output, grad_state, *call)
            return implementation.backward(grad_output, grad_state, *call, kept=kept)
        if grad_output.is_meta:
            return [torch.empty_like(x) for x in self._differentiable(inputs)]
        with torch.autocast(grad_output.device.type, enabled=False):
            if implementation.backward is not None:
                grads = implementation.backward(grad_output, grad_state, *call)
                return _apart(grads, (grad_output, *grad_states, *call))

            def again(*floats):
                return _flat(implementation.forward(*self._replace(call, floats)))

            outputs, vjp = torch.func.vjp(again, *self._differentiable(call))
            grad_states = [torch.zeros_like(x) if g is None else g for g, x in zip(grad_states, outputs[1:])]
            return _apart(vjp((grad_output, *grad_states)), (grad_output, *grad_states, *call))


def recurrence(
    inputs: str, output: str, *, empty: Callable[..., Sequence[Tensor]] | None = None, **layout
) -> Callable[[Callable], Recurrence]:
    """Decorator that registers a definition as the operator `linescan::NAME` and returns its `Recurrence`.

    Args:
        inputs, output, layout: of a `Layout`: what the tensors look like, `state`, `requires`, `flops`, `values` and
            `sizes` of examples, and defaults of options. The first token input is the one whose dtype the output takes.
        empty: from states of zeros to those before the first token, if they are others.

    The definition takes tensors, and options with a type annotation (bool, int, float or str). It gets token inputs as
    (B, K, S, ...) in time order, states always, and every other argument as it is; computes step by step; and returns
    the output (B, K, S, ...) and the final state, a tuple of them if there are several, or None.
    """

    def register(definition: Callable) -> Recurrence:
        name, parameters = definition.__name__.strip("_"), list(signature(definition).parameters)
        return Recurrence(definition, Layout(name, parameters, inputs, output, **layout), empty)

    return register


_COMMON = ("route", "merge", "return_final_state")


@dataclass(frozen=True)
class Public:
    """A public function: what it is called, the recurrence that it runs (None: it has no order), and its arguments."""

    name: str
    function: Callable
    recurrence: Recurrence | None
    layout: Layout


def public(of: Recurrence | None, inputs: str | None = None, **layout) -> Callable[[Callable], Callable]:
    """Decorator that lists a public function in `functions`.

    Args:
        of: the recurrence that the function calls, or None.
        inputs, layout: the function's own `Layout`, if it takes other arguments than its recurrence; the function then
            calls `check_arguments` first.
    """

    def register(function: Callable) -> Callable:
        parameters = [name for name in signature(function).parameters if name not in _COMMON]
        own = of.layout if inputs is None else Layout(function.__name__, parameters, inputs, **layout)
        _functions[function.__name__] = Public(function.__name__, function, of, own)
        return function

    return register


def check_arguments(name: str, *inputs, route: Tensor | None = None) -> tuple[int, int, int]:
    """Checks the arguments of a public function against its own layout; all of them but those of every recurrence.

    In a graph that is being compiled, the operators that the function calls check what reaches them.

    Returns:
        (B, K, L), as plain numbers also while a trace is recorded.
    """
    layout = _functions[name].layout
    if torch.compiler.is_compiling():
        return visited([inputs[at] for at in layout.token_positions], route)
    with unwatched() if is_watched() else nullcontext():
        sizes = layout.check(inputs, route).sizes
        layout.check_devices(inputs, route)
    return sizes["B"], sizes["R"], sizes["L"]


def check_merge(name: str, merge: str | None) -> None:
    """Raises a ValueError if `merge` is none that recurrences know."""
    if merge is not None and merge != "sum":
        raise ValueError(f"{name}: merge is None (one output per route) or 'sum', got {merge!r}")


def given_states(name: str, initial_state: Sequence[Tensor] | None) -> tuple:
    """The states of a public function that has several, each None where there is no initial state.

    Raises:
        ValueError: not a tuple of so many.
    """
    names = _functions[name].layout.states
    if initial_state is None:
        return (None,) * len(names)
    if not isinstance(initial_state, (tuple, list)) or len(initial_state) != len(names):
        got = type(initial_state).__name__ if isinstance(initial_state, Tensor) else f"{len(initial_state)} tensors"
        raise ValueError(f"{name}: initial_state is a tuple ({', '.join(names)}), got {got}")
    return tuple(initial_state)


def precise(x: Tensor) -> Tensor:
    """x in float32 at least: for what a public function computes of its arguments."""
    return x if x.dtype is torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))
