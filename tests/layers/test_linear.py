"""Linear layers on the fast path: what computes them, and what does not."""

import pytest
import torch
from torch import nn

from linescan.layers.linear import linear
from linescan.scans import matmul


@pytest.fixture
def fast(monkeypatch):
    """Records the calls that take the fast path."""
    calls, function = [], matmul.linear
    monkeypatch.setattr(matmul, "linear", lambda *args: calls.append(args) or function(*args))
    return calls


def test_ordinary_layers_take_it(fast):
    layer, x = nn.Linear(5, 6), torch.randn(2, 3, 5, requires_grad=True)
    assert torch.allclose(linear(layer, x), layer(x), atol=1e-6) and len(fast) == 1
    linear(layer, x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_what_somebody_observes_or_replaces_is_called(fast):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, plain = torch.randn(3, 5), nn.Linear(5, 6)
    doubled = Doubled(5, 6)
    doubled.load_state_dict(plain.state_dict())
    assert torch.allclose(linear(doubled, x), 2 * plain(x), atol=1e-6)
    assert torch.equal(linear(nn.Identity(), x), x)
    seen = []
    handle = plain.register_forward_hook(lambda *args: seen.append(args))
    linear(plain, x)
    assert len(seen) == 1
    handle.remove()
    plain.forward = lambda x: x
    assert torch.equal(linear(plain, x), x)
    assert not fast


def test_traces_see_the_layer(fast):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 6)

        def forward(self, x):
            return linear(self.layer, x)

    net, x = Net(), torch.randn(3, 5)
    assert [n.target for n in torch.fx.symbolic_trace(net).graph.nodes if n.op == "call_module"] == ["layer"]
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.jit.trace(net, x, check_trace=False)  # the check runs the module itself
    torch.export.export(net, (x,))
    assert torch.allclose(compiled(x), net.layer(x), atol=1e-6) and not fast
