"""Norms on the fast path of a CPU: what takes it, what does not, and that numbers are the same."""

import pytest
import torch
from timm.models import create_feature_extractor
from torch import nn

from linescan.layers.norm import LayerNorm, RMSNorm
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
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_the_kernel_serves_where_no_gradient_is_wanted(make, dtype, fast):
    layer = shaken(make(48), dtype)
    maps = torch.randn(2, 48, 5, 3, dtype=dtype).permute(0, 2, 3, 1)
    with torch.no_grad():
        for x in (maps, maps.flatten(1, 2), maps[0, 0, 0]):
            got, want = layer(x), shaken(make(48), dtype).double()(x.double())
            assert got.dtype is dtype and fast and fast.pop() is got
            torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_torch_serves_the_rest(fast):
    x, layer = torch.randn(3, 48), shaken(LayerNorm(48))

    def same(layer, x):
        assert layer(x).equal(nn.LayerNorm.forward(layer, x)) and not fast

    same(layer, x)  # which records gradients
    with torch.no_grad():
        same(LayerNorm(48, elementwise_affine=False), x)
        same(LayerNorm(48, bias=False), x)
        same(LayerNorm((3, 48)), x)
        same(LayerNorm(20), torch.randn(3, 20))  # channels in part vectors
        same(shaken(LayerNorm(48)).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            same(layer, x.bfloat16())
        with pytest.raises(RuntimeError, match="normalized_shape"):
            layer(torch.randn(3, 32))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        traced = torch.jit.trace(layer, x, check_trace=False)  # the check runs the module itself
        exported = torch.export.export(layer, (x,)).module()
        for graph in (compiled, traced, exported):
            assert graph(x).equal(nn.LayerNorm.forward(layer, x)) and not fast


def test_symbolic_traces_call_the_layer():
    graph = create_feature_extractor(nn.Sequential(LayerNorm(48), nn.ReLU()), ["0"])
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert graph(x)["0"].equal(LayerNorm(48)(x))
