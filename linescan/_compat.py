"""Private functions of other packages, all in one place, each with a test in tests/test_compat.py.

Importing this file imports torch alone. A release that changes one of them breaks this file and no other.
"""

import operator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, Callable, Iterator, Sequence, cast

import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

__all__ = [
    "above_autograd",
    "argument_names",
    "dispatch_modes_active",
    "example_size",
    "has_int8_products",
    "is_jit_tracing",
    "is_observed",
    "is_symbol",
    "is_transformed",
    "is_watched",
    "known_equal",
    "linear_pointwise",
    "mmengine_flop_handles",
    "plain_shape",
    "quick_onnx_export",
    "scan",
    "unwatched",
]


def dispatch_modes_active() -> bool:
    """True inside a `TorchDispatchMode`, such as that of fake tensors, `make_fx` or a FLOP counter."""
    return bool(_get_current_dispatch_mode_stack())


def is_jit_tracing() -> bool:
    """True while `torch.jit.trace` records."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """True inside `torch.func` transforms (grad, vmap, jvp, ...) and forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """True if the call at hand is compiled, exported, traced, transformed, or seen by a dispatch mode."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside, nothing is traced, transformed or seen by a dispatch mode: sizes are ints, and tables can be read."""
    state = torch._C._get_tracing_state()
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C._dispatch_key_parse("Tracer")):
        state = None  # below the tracer, in the kernel of an operator: nothing is recorded there
    if state is not None:
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes(), torch._C._DisableFuncTorch():
            yield
    finally:
        if state is not None:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


_AUTOGRAD = [getattr(torch._C.DispatchKey, key) for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView")]


def above_autograd(function: Callable) -> Callable:
    """The function as the kernel of an operator that may itself differentiate: gradients are recorded inside.

    The kernel of a Python operator that has an autograd formula runs where torch records none, whatever the grad mode.
    """

    @wraps(function)
    def run(*args):
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for key in _AUTOGRAD:
            excluded = excluded.remove(key)
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            return function(*args)

    return run


def plain_shape(x: torch.Tensor) -> torch.Size:
    """The shape of a tensor in plain ints, also while `torch.jit.trace` records."""
    if not torch.compiler.is_compiling() and is_jit_tracing():
        with unwatched():
            return x.shape
    return x.shape


def known_equal(a: int, b: int) -> bool:
    """Whether two sizes are equal; False where that is not known, in a graph of dynamic sizes."""
    if not torch.compiler.is_compiling() and type(a) is type(b) is int:  # dynamo takes symbols for numbers
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def is_symbol(size: int | torch.SymInt) -> bool:
    """Whether a size has no number yet, in a graph of dynamic sizes."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(size)


def example_size(size: int | torch.SymInt) -> int:
    """A size as a number: of the example that is traced, where it is a symbol."""
    return size if isinstance(size, int) else size.node.hint


def argument_names(operator: torch._ops.OpOverload) -> list[str]:
    """Names of the arguments of a registered operator."""
    return [argument.name for argument in operator._schema.arguments]


def scan(body: Callable, states: Sequence, tokens: Sequence) -> Sequence[torch.Tensor]:
    """torch's loop over the first axis of `tokens`, as one operator of a graph: body(*states, *tokens)."""
    from torch._higher_order_ops.scan import scan_op

    return scan_op(body, list(states), list(tokens), ())


def linear_pointwise():
    """oneDNN's linear map on CPUs, (x, weight, bias) -> x weight^T + bias; None if torch lacks it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    operator = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], "")


def has_bfloat16_products() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_int8_products() -> bool:
    """Whether `torch._int_mm` is fast on this CPU: oneDNN has instructions for products of int8."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(_module, "_global" + name) for name in _HOOKS]


def is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's `forward`: hooks, or a `forward` of its own."""
    state = module.__dict__
    return bool(
        "forward" in state
        or state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
        or any(_GLOBAL_HOOKS)
    )


def mmengine_flop_handles() -> dict:
    """The handles that every `FlopAnalyzer` of mmengine starts with; an empty dictionary where there are none."""
    from mmengine.analysis import complexity_analysis

    return getattr(complexity_analysis, "_DEFAULT_SUPPORTED_FLOP_OPS", {})


# -- ONNX -------------------------------------------------------------------------------------------------------------


@contextmanager
def quick_onnx_export() -> Iterator[None]:
    """Inside, `torch.onnx.export` gives the network that it gives elsewhere, in less than half of the time.

    Torch runs the whole of a traced program three times more: twice to take apart what ONNX has no translation for, and
    once to make dtypes alike. Here the calls without a translation alone are traced again, each by itself; a program
    that changes a tensor goes torch's way. Translations, which torch collects for each export, are kept, and so are the
    signatures of operators. The sizes of what norms give are known at once; torch would take each norm apart to find
    them. Graphs become Python when one is called, not after each pass over them; where gradients are off says nothing
    to ONNX, so no graph is cut there. The file does not name the lines of source, with their paths on this machine,
    that each operator comes from: to find them takes time, too.
    """
    try:
        from onnx_ir.schemas import OpSignature
        from torch._dynamo import config
        from torch._export.passes import replace_set_grad_with_hop_pass as grad_mode
        from torch._subclasses.fake_impls import get_fast_op_impls
        from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
        from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule

        whole, make_registry = _fx_passes.decompose_with_registry, _registration.ONNXRegistry.from_torchlib
        make_signature, compiled = OpSignature.from_op_schema, fx.GraphModule.recompile
    except (ImportError, AttributeError):  # of another torch, whose way is the right one, too
        yield
        return

    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        table = _decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(registry)))

        def is_known(target: torch._ops.OpOverload) -> bool:  # what torch makes of one chunk is no list
            return target is not torch.ops.aten.chunk.default and registry.is_registered(target)

        try:
            _take_apart(program, is_known, table)
        except Exception:  # it is still the same program, and torch says best what is wrong with it
            return whole(program, registry)
        return program

    def promote(interpreter: Any, node: fx.Node) -> Any:
        with interpreter._set_current_node(node):
            if rule := get_type_promotion_rule(node, interpreter.type_promotion_table):
                interpreter._maybe_promote_node(node, rule)
        known = node.op == "call_function" and "val" in node.meta
        return node.meta["val"] if known else fx.Interpreter.run_node(interpreter, node)

    def translations(cls: type, opset_version: int) -> Any:
        registry = cls()
        registry.__dict__ |= _translations(make_registry, opset_version).__dict__
        registry.functions = dict(registry.functions)  # to which an export may add
        return registry

    signatures: dict[tuple, Any] = {}

    def signature(schema: Any) -> Any:
        key = schema.domain, schema.name, schema.since_version
        if key not in signatures:
            signatures[key] = make_signature(schema)
        return signatures[key]

    def compile_when_called(module: fx.GraphModule) -> None:
        def forward(self, *args, **kwargs):
            compiled(self)  # which gives the class another `forward`
            return self(*args, **kwargs)

        if trees := getattr(module.graph._codegen, "pytree_info", None):
            module._in_spec, module._out_spec = trees.in_spec, trees.out_spec
        type(module).forward = forward

    known_sizes = get_fast_op_impls()
    with ExitStack() as stack:
        for owner, name, value in (
            (_fx_passes, "decompose_with_registry", decompose),
            (_TypePromotionInterpreter, "run_node", promote),
            (_registration.ONNXRegistry, "from_torchlib", classmethod(translations)),
            (OpSignature, "from_op_schema", staticmethod(signature)),
            (fx.GraphModule, "recompile", compile_when_called),
            (fx.proxy, "CapturedTraceback", _NoTraceback),
            (grad_mode, "replace_set_grad_with_hop_pass", _without_grad_mode),
        ):
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        for norm, sizes in (
            (torch.ops.aten._native_batch_norm_legit_no_training.default, _batch_norm_sizes),
            (torch.ops.aten.native_layer_norm.default, _layer_norm_sizes),
        ):
            if norm not in known_sizes:
                known_sizes[norm] = sizes
                stack.callback(known_sizes.pop, norm)
        # With a dynamic batch, torch's memory of what operators give costs more than it saves.
        stack.enter_context(config.patch(fake_tensor_cache_enabled=False))
        yield


class _NoTraceback:
    """In place of torch's `CapturedTraceback`: nothing is captured."""

    @classmethod
    def extract(cls) -> type["_NoTraceback"]:
        return cls

    @staticmethod
    def summary() -> None:
        return None


def _without_grad_mode(module: fx.GraphModule, signature: Any) -> tuple[fx.GraphModule, Any]:
    """A traced program without the calls that turn gradients on or off."""
    for node in module.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        module.graph.erase_node(node)
    return module, signature


def _batch_norm_sizes(mode: Any, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    with mode:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def _layer_norm_sizes(mode: Any, x: torch.Tensor, shape: Sequence, *args: Any) -> tuple[torch.Tensor, ...]:
    statistics = *x.shape[: x.ndim - len(shape)], *(1 for _ in shape)
    with mode:
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        return output, x.new_empty(statistics), x.new_empty(statistics)


@cache
def _translations(make_registry: Callable, opset_version: int) -> Any:
    """What torch can translate to ONNX."""
    return make_registry(opset_version=opset_version)


class _Entangled(Exception):
    """A call cannot be traced by itself."""


def _is_call(node: fx.Node) -> bool:
    """Whether a node calls an operator of torch."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _take_apart(program: torch.export.ExportedProgram, is_known: Callable, table: dict) -> None:
    """Replaces the calls that ONNX has no translation for by others, in place.

    Raises:
        _Entangled: something is not functional; the program is still the same program.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.utils import detect_fake_mode

    regions = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    whole = program.graph_module
    graphs = [module for module in whole.modules() if isinstance(module, fx.GraphModule)]
    for node in [node for module in graphs for node in module.graph.nodes]:
        higher = isinstance(node.target, torch._ops.HigherOrderOperator)
        if node.target in regions or higher and node.target is not torch.ops.higher_order.scan:
            raise _Entangled
        if _is_call(node) and node.target._schema.is_mutable:
            _do_not_write(node)
    with detect_fake_mode([node.meta.get("val") for node in whole.graph.nodes]), enable_python_dispatcher():
        for module in graphs:
            module.graph.eliminate_dead_code()
            calls = list(module.graph.nodes)[::-1]
            while calls:
                call = calls.pop()
                if _is_call(call) and not is_known(call.target):
                    implicit = call.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
                    if implicit or call.target in table:
                        calls += _inline(call, table, program.graph_signature if module is whole else None)
            module.graph.eliminate_dead_code()
            for node in module.graph.nodes:
                node.meta.setdefault("nn_module_stack", {})  # else torch says of each that there is none
            module.recompile()


def _inline(call: fx.Node, table: dict, signature: torch.export.ExportGraphSignature | None) -> list[fx.Node]:
    """Puts what a call does, one step of taking apart, in its place; the new nodes, the last one first."""
    from torch.fx.experimental.proxy_tensor import make_fx

    given = call.all_input_nodes

    def run(*values):
        known = dict(zip(given, values))
        args, kwargs = (fx.node.map_arg(x, known.__getitem__) for x in (call.args, call.kwargs))
        answer = table.get(call.target, call.target)(*args, **kwargs)
        return tuple(answer) if isinstance(answer, tuple) else answer  # some have names

    inner = make_fx(run)(*(node.meta["val"] for node in given)).graph
    for node in inner.nodes:
        if node.op == "get_attr":
            raise _Entangled
        if _is_call(node) and node.target._schema.is_mutable:
            _do_not_write(node)
    placed = dict(zip(inner.find_nodes(op="placeholder"), given))
    with call.graph.inserting_before(call):
        result: Any = call.graph.graph_copy(inner, placed)
    new = list(placed.values())[len(given) :]
    for node in new:
        node.meta = {**call.meta, **node.meta}
    one = not isinstance(result, (tuple, list))
    for old in [call] if one else [user for user in call.users if user.target is operator.getitem]:
        value: Any = result if one else result[cast(int, old.args[1])]
        if isinstance(value, fx.Node):
            old.replace_all_uses_with(value)
            if signature is not None:
                signature.replace_all_uses(old.name, value.name)
        for user in list(old.users):  # of a number
            args, kwargs = (fx.node.map_arg(x, lambda at: value if at is old else at) for x in (user.args, user.kwargs))
            user.args, user.kwargs = args, kwargs
        call.graph.erase_node(old)
    if not one:
        call.graph.erase_node(call)
    return new[::-1]


def _do_not_write(call: fx.Node) -> None:
    """Makes a call that changes a tensor in place give it instead, where nothing else sees the tensor."""
    target, changed = call.target, call.args[0]
    twin = getattr(getattr(torch.ops, target.namespace), target._opname.rstrip("_"), None)
    dtypes = {node.meta["val"].dtype for node in call.all_input_nodes if isinstance(node.meta["val"], torch.Tensor)}
    if (
        twin is None or target._opname[-1] != "_" or target._overloadname not in twin.overloads()
        or not _is_call(changed) or "dropout" in str(changed.target) or len(changed.users) > 1 or len(dtypes) > 1
        or any(result.alias_info is not None for result in changed.target._schema.returns)
    ):  # fmt: skip
        raise _Entangled
    call.target = getattr(twin, target._overloadname)
