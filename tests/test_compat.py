"""The private names of other packages that linescan depends on, each in use."""

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from linescan._compat import is_observed


def test_hooks_and_own_forwards_are_seen():
    layer = nn.Linear(2, 2)
    assert not is_observed(layer)
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        layer.register_full_backward_hook,
        layer.register_full_backward_pre_hook,
        register_module_forward_hook,
    ):
        handle = register(lambda *args: None)
        assert is_observed(layer), register.__name__
        handle.remove()
        assert not is_observed(layer)
    layer.forward = lambda x: torch.zeros(1)
    assert is_observed(layer)
