"""Norms on the fast path of a CPU: what takes it, what does not, and that numbers are the same."""

import pytest
import torch
from torch import nn

from linescan.layers.norm import RMSNorm, layer_norm
from linescan.scans.kernels import cpu


@pytest.fixture
def fast(monkeypatch):
    """Records what the kernel gave."""
    given, function = [], cpu.norm

    def norm(*args, **kwargs):
        out = function(*args, **kwargs)
        if out is not None:
            given.append(out)
        return out

    monkeypatch.setattr(cpu, "norm", norm)
    return given


def shaken(layer: nn.Module, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return layer.to(dtype)


@pytest.mark.skipif(cpu.missing() is not None, reason="no kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [nn.LayerNorm, RMSNorm])
def test_ordinary_norms_take_it(make, dtype, fast):
    layer = shaken(make(48), dtype)
    maps = torch.randn(2, 48, 5, 3, dtype=dtype).permute(0, 2, 3, 1)
    with torch.no_grad():
        for x in (maps, maps.flatten(1, 2), maps[0, 0, 0]):
            got, want = layer_norm(layer, x), shaken(make(48), dtype).double()(x.double())
            assert got.dtype is dtype and fast and fast.pop() is got
            torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_the_rest_goes_the_layers_way(fast):
    x, layer = torch.randn(3, 48), shaken(nn.LayerNorm(48))

    def same(layer, x):
        assert layer_norm(layer, x).equal(layer(x)) and not fast

    same(layer, x)  # which records gradients
    with torch.no_grad():
        same(nn.Identity(), x)
        same(nn.LayerNorm(48, elementwise_affine=False), x)
        same(nn.LayerNorm(48, bias=False), x)
        same(nn.LayerNorm((3, 48)), x)
        same(nn.LayerNorm(20), torch.randn(3, 20))  # channels in part vectors
        same(shaken(nn.LayerNorm(48)).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            same(layer, x.bfloat16())
        with pytest.raises(RuntimeError, match="normalized_shape"):
            layer_norm(layer, torch.randn(3, 32))
        seen = []
        layer.register_forward_hook(lambda *args: seen.append(args))
        layer_norm(layer, x)
        assert len(seen) == 1 and not fast


def test_traces_see_the_layer(fast):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LayerNorm(48)

        def forward(self, x):
            return layer_norm(self.layer, x)

    net, x = Net(), torch.randn(3, 48)
    with torch.no_grad():
        assert [n.target for n in torch.fx.symbolic_trace(net).graph.nodes if n.op == "call_module"] == ["layer"]
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.jit.trace(net, x, check_trace=False)  # the check runs the module itself
        torch.export.export(net, (x,))
        assert torch.allclose(compiled(x), net.layer(x), atol=1e-6) and not fast
