"""Linear maps, one for all tokens or one per route, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from linescan._compat import linear_pointwise
from linescan.scans import matmul
from linescan.scans.matmul import linear, project_routes, project_routes_backward

VIEWS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "a slice of the channels": lambda *shape: torch.randn(*shape[:-1], 12)[..., 3:8],
    "transposed": lambda *shape: torch.randn(*shape).transpose(0, -2),
    "expanded": lambda *shape: torch.randn(1, *shape[1:]).expand(shape),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5), (1, 2, 9, 5), (2, 0, 5)], ids=str)
def test_is_torchs_linear(shape, view, bias):
    torch.manual_seed(0)
    x, weight, bias = VIEWS[view](*shape), torch.randn(6, 5), torch.randn(6) if bias else None
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(linear(x, weight.T.contiguous().T, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("view", VIEWS)
def test_hands_over_the_bias_in_bfloat16(view):
    torch.manual_seed(0)
    x, weight, bias = (t.bfloat16() for t in (VIEWS[view](2, 7, 5), torch.randn(6, 5), torch.randn(6)))
    exact = F.linear(x.float(), weight.float(), bias.float())
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias).float(), exact, rtol=2**-8, atol=1e-6)
    if matmul._has_bfloat16:
        assert "mkldnn::_linear_pointwise" in operators(lambda: linear(x, weight, bias))
    weight.requires_grad_()
    for of_ours, of_torch in zip(*(torch.autograd.grad(f(x, weight, bias).sum(), weight) for f in (linear, F.linear))):
        torch.testing.assert_close(of_ours, of_torch)


def operators(run):
    """Names of what torch runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.key for event in profile.key_averages()}


@pytest.fixture
def as_on_amd(monkeypatch):
    monkeypatch.setattr(matmul, "_through_onednn", linear_pointwise())


def test_takes_onednn_in_eager_mode(as_on_amd):
    x, weight = torch.randn(4, 5), torch.randn(6, 5)
    fast = "mkldnn::_linear_pointwise"
    if torch.backends.mkldnn.is_available():
        assert fast in operators(lambda: linear(x, weight))
        assert fast in operators(lambda: linear(x, weight.clone().requires_grad_()).sum().backward())
        with torch.backends.mkldnn.flags(enabled=False):
            assert fast not in operators(lambda: linear(x, weight))
    assert fast not in operators(lambda: linear(x.double(), weight.double()))
    assert fast not in operators(lambda: torch.func.vmap(linear, (0, None))(x, weight))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(linear(dual, weight)).tangent is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("learned", ["x", "weight", "bias", "x weight", "x weight bias"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 5)], ids=str)
def test_gradients(shape, learned):
    """First and second, of whatever wants one."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(shape), "weight": torch.randn(6, 5), "bias": torch.randn(6)}
    leaves = [inputs[name].requires_grad_() for name in learned.split()]
    found = []
    for function in (linear, F.linear):
        loss = function(**inputs).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append((first, second))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_wrong_sizes_fail_as_torch_does():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 4), torch.randn(6, 5))


@pytest.mark.parametrize("weights", [1, 3])
@pytest.mark.parametrize("routes", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_map_a_route(batch, routes, weights):
    torch.manual_seed(0)
    x = torch.randn(batch, routes, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(weights, 6, 5, dtype=torch.float64, requires_grad=True)
    want = x @ weight.mT
    torch.testing.assert_close(project_routes(x, weight), want)
    with torch.no_grad():
        torch.testing.assert_close(project_routes(x.float(), weight.float()), want.float(), rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(want)
        got = project_routes_backward(grad, x, weight)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, weight), grad))
