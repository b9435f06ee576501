"""The gates: the kernels of one pass against plain torch in float64, on every instruction set of this machine."""

import pytest
import torch

from linescan.scans import backend, gates
from linescan.scans.kernels import cpu

compiled = pytest.mark.skipif(cpu.missing() is not None, reason=f"CPU kernels {cpu.missing()}")
FACTOR = {"log_sigmoid": 1 / 16, "sigmoid": -0.6, "exponential": -0.05}


def inputs(name, batch=2, routes=3, length=5, heads=2, channels=19):
    """Float64 inputs, routes innermost in memory as projections have them; of two the first is of all routes."""
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape):
        return 4 * torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64).movedim(1, 2)

    shared, own = (tokens(k, heads, channels) for k in (1, routes))
    if name == "erase":
        return own, tokens(routes, heads)
    if name == "linear_unit":
        rate = -3 * torch.rand(heads * channels, generator=generator, dtype=torch.float64)
        return shared.flatten(3), own.flatten(3), tokens(routes, heads * channels), rate
    if name == "blend":
        return shared, own, 1 / 16
    if name == "share":
        return shared, tokens(1, heads, channels), own
    return (own, FACTOR[name]) if name in FACTOR else (own,)


def results(name, given):
    """Outputs, and gradients of all tensors."""
    given = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in given]
    outputs = gates.GATES[name](*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, [x for x in given if isinstance(x, torch.Tensor)], weights)


def narrow(given):
    """The same in float32, in the same order in memory."""
    return [x.float() if isinstance(x, torch.Tensor) else x for x in given]


@compiled
@pytest.mark.parametrize("channels", [19, 32])
@pytest.mark.parametrize("name", gates.GATES)
def test_kernels_agree_with_torch(name, channels, monkeypatch):
    given = narrow(inputs(name, channels=channels))
    want = results(name, [x.double() if isinstance(x, torch.Tensor) else x for x in given])
    monkeypatch.setattr(gates.GATES[name], "form", None)  # the kernel is what serves
    before = cpu.instruction_set()
    for level in cpu.LANES:
        if cpu.instruction_set(level) == level:
            for got, y in zip(results(name, given), want, strict=True):
                torch.testing.assert_close(got.double(), y, rtol=3e-6, atol=3e-6 * float(y.detach().abs().max()))
    cpu.instruction_set(before)


@compiled
@pytest.mark.parametrize("name", gates.GATES)
def test_without_gradients_and_with_them_the_same(name):
    given = narrow(inputs(name))
    first = results(name, given)
    assert all(torch.equal(a, b) for a, b in zip(first, results(name, given)))
    outputs = gates.GATES[name](*given)
    for got, y in zip(outputs if isinstance(outputs, tuple) else (outputs,), first):
        assert torch.equal(got, y)


@compiled
@pytest.mark.parametrize("value", [0.0, 20.0, 80.0, torch.inf])
@pytest.mark.parametrize("name", ["log_sigmoid", "sigmoid", "exponential", "forget"])
def test_gates_at_their_ends(name, value):
    """Saturated gates keep their digits, and so do their gradients; infinite ones give what torch gives."""
    for sign in (1, -1):
        x = torch.full((1, 2, 3, 1, 16), sign * value)
        given = (x,) if name == "forget" else (x, FACTOR[name])
        want = results(name, [y.double() if isinstance(y, torch.Tensor) else y for y in given])
        for got, y in zip(results(name, given), want):
            torch.testing.assert_close(got.double(), y, rtol=2e-5, atol=1e-30)


@compiled
@pytest.mark.parametrize("rate", [-8.0, -1e-3, -1e-7, -1e-9, 0.0])
@pytest.mark.parametrize("gate", [0.0, 20.0, -20.0])
def test_a_linear_unit_that_hardly_forgets(rate, gate):
    """Its root keeps its digits where the decay is close to 1, and the derivative of it stays finite."""
    x, gates_ = torch.ones(1, 1, 2, 16), torch.full((1, 1, 2, 16), gate)
    given = x, torch.zeros_like(x), gates_, torch.full((16,), rate)
    want = results("linear_unit", [y.double() for y in given])
    for got, y in zip(results("linear_unit", given), want):
        torch.testing.assert_close(got.double(), y, rtol=1e-5, atol=1e-30)


@compiled
@pytest.mark.parametrize("name", gates.GATES)
def test_gradients_can_be_differentiated(name):
    given = [(x / 4).requires_grad_() if isinstance(x, torch.Tensor) else x for x in narrow(inputs(name))]
    leaves = [x for x in given if isinstance(x, torch.Tensor)]
    second = []
    for form in ("", "reference"):
        with backend(form):
            outputs = gates.GATES[name](*given)
            total = sum(y.sin().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))
            first = torch.autograd.grad(total, leaves, create_graph=True)
            second.append(torch.autograd.grad(sum(x.sin().sum() for x in first), leaves, materialize_grads=True))
    for a, b in zip(*second):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@compiled
def test_threads_do_not_change_a_bit():
    from linescan.engine.processes import threads

    for name in gates.GATES:
        given = narrow(inputs(name, length=700))
        found = []
        for count in (1, 3):
            with threads(count):
                found.append(results(name, given))
        assert all(torch.equal(a, b) for a, b in zip(*found)), name
