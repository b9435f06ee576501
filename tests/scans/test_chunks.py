import pytest
import torch

from linescan.scans.chunks import linear_scan, running_max


def sequential(a, x, initial, reverse, plus=torch.add, times=torch.mul):
    """The definition: states from h = initial, in the order of time."""
    states = [initial]
    steps = range(x.shape[-2])
    for t in reversed(steps) if reverse else steps:
        states.append(plus(times(a[..., t if a.shape[-2] > 1 else 0, :], states[-1]), x[..., t, :]))
    return torch.stack(states[::-1] if reverse else states, -2)


def inputs(length, constant=False):
    generator = torch.Generator().manual_seed(length)
    noise = [
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((3, 1 if constant else length, 4), (2, 3, length, 4), (2, 3, 4))
    ]
    return [x.requires_grad_() for x in (noise[0].sigmoid(), *noise[1:])]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9, 23])
def test_linear_scan(length, constant, reverse):
    """All states and all gradients are those of the loop, whatever the chunk size; `a` serves all leading axes of x."""
    a, x, initial = inputs(length, constant)
    want = sequential(a, x, initial, reverse)
    weight = torch.randn_like(want)
    gradients = torch.autograd.grad((want * weight).sum(), (a, x, initial))
    for chunk in (None, 1, 4, 5, length, 50):
        got = linear_scan(a, x, initial, reverse, chunk)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for g, w in zip(torch.autograd.grad((got * weight).sum(), (a, x, initial)), gradients):
            torch.testing.assert_close(g, w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_running_max(constant, reverse):
    a, x, initial = (t.detach() for t in inputs(23, constant))
    want = sequential(-a, x, initial, reverse, torch.maximum, torch.add)
    for chunk in (None, 1, 4, 23, 50):
        got = running_max(-a.expand(2, *a.shape), x, initial, reverse, chunk)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
