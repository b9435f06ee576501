"""Causal convolution: torch's own convolution, and its state."""

import pytest
import torch
import torch.nn.functional as F

from linescan.scans import causal_conv1d
from linescan.scans.recurrence import backend

from .tools import FORMS, case, noise


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("form", FORMS)
def test_is_torch_conv1d(form, activation, width):
    torch.manual_seed(0)
    x, weight, bias = noise(2, 3, 5, 4), noise(3, 4, width), noise(3, 4)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    flat = x.movedim(2, 3).flatten(1, 2)
    want = F.conv1d(flat, weight.flatten(0, 1)[:, None], bias.flatten(), padding=width - 1, groups=12)[..., :5]
    want = want.unflatten(1, (3, 4)).movedim(3, 2)
    want = want if activation is None else F.silu(want)
    with backend(form):
        got = causal_conv1d(x, weight, bias, activation=activation)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(y.square().sum(), tensors) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    without = causal_conv1d(x, weight, activation=activation)
    torch.testing.assert_close(without, causal_conv1d(x, weight, torch.zeros_like(bias), activation=activation))


def test_state_is_the_last_inputs():
    inputs = case("causal_conv1d").make(length=9)
    _, state = causal_conv1d(**inputs, return_final_state=True)
    torch.testing.assert_close(state, inputs["x"][:, :, -3:].mT)
    _, state = causal_conv1d(**inputs | {"x": inputs["x"][:, :, :1]}, return_final_state=True)
    want = torch.cat((inputs["initial_state"][..., 1:], inputs["x"][:, :, 0, :, None]), -1)
    torch.testing.assert_close(state, want)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation is None or 'silu', got 'gelu'"):
        causal_conv1d(**case("causal_conv1d").make(), activation="gelu")
