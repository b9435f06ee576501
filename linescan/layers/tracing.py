"""Functions that symbolic tracing (torch.fx) records as one call."""

from functools import wraps
from typing import Callable

from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["opaque"]


def opaque(function: Callable) -> Callable:
    """Decorator for functions whose Python depends on sizes or dtypes: a symbolic trace calls them, not looks inside.

    It uses torch's protocol for functions of tensor-like arguments, which proxies of torch.fx follow; arguments may
    stand in tuples.
    """

    @wraps(function)
    def call(*args, **kwargs):
        parts = [part for arg in args for part in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        if has_torch_function(parts):
            return handle_torch_function(call, parts, *args, **kwargs)
        return function(*args, **kwargs)

    return call
