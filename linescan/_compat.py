"""Private functions of other packages, all in one place, each with a test in tests/test_compat.py.

Importing this file imports torch alone. A release that changes one of them breaks this file and no other.
"""

from contextlib import contextmanager
from functools import wraps
from typing import Callable, Iterator, Sequence

import torch
from torch import nn
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
    """oneDNN's linear map in float32 on CPUs, (x, weight, bias) -> x weight^T + bias; None if torch lacks it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    operator = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], "")


def has_int8_products() -> bool:
    """Whether `torch._int_mm` is fast on this CPU: oneDNN has instructions for products of int8."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(_module, "_global" + name) for name in _HOOKS]


def is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's `forward`: hooks, or a `forward` of its own."""
    state = module.__dict__
    return "forward" in state or any(map(state.__getitem__, _HOOKS)) or any(_GLOBAL_HOOKS)


def mmengine_flop_handles() -> dict:
    """The handles that every `FlopAnalyzer` of mmengine starts with; an empty dictionary where there are none."""
    from mmengine.analysis import complexity_analysis

    return getattr(complexity_analysis, "_DEFAULT_SUPPORTED_FLOP_OPS", {})
