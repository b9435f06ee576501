"""Private names of other packages that linescan depends on, in one place; tests/test_compat.py uses each."""

from torch import nn
from torch.nn.modules import module as _module

__all__ = ["is_observed"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(_module, "_global" + name) for name in _HOOKS]


def is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's `forward`: hooks, or a `forward` of its own."""
    state = module.__dict__
    return "forward" in state or any(map(state.__getitem__, _HOOKS)) or any(_GLOBAL_HOOKS)
