"""Models whose first numbers no test reads, made without them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm.layers
from torch import nn

_DRAWING = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]


@contextmanager
def uninitialised() -> Iterator[None]:
    """Inside, parameters of a new model are left as their memory was: for models that a whole file is loaded into, and
    for those on the meta device, where drawing no numbers takes a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in [*((nn.init, name) for name in _DRAWING), (timm.layers, "trunc_normal_")]:
            patch.setattr(module, name, lambda tensor, *args, **options: tensor)
        yield
