"""Causal convolution: torch's own convolution, and the promises of every recurrence."""

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, noise

from linescan.scans import causal_conv1d
from linescan.scans.ops import causal_conv as module
from linescan.scans.recurrence import backend


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_is_torch_conv1d(name, activation, width):
    torch.manual_seed(0)
    x, weight, bias = noise(2, 3, 5, 4), noise(3, 4, width), noise(3, 4)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    flat = x.movedim(2, 3).flatten(1, 2)
    want = F.conv1d(flat, weight.flatten(0, 1)[:, None], bias.flatten(), padding=width - 1, groups=12)[..., :5]
    want = want.unflatten(1, (3, 4)).movedim(3, 2)
    want = want if activation is None else F.silu(want)
    with backend(name):
        got = causal_conv1d(x, weight, bias, activation=activation)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(y.square().sum(), tensors) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    without = causal_conv1d(x, weight, activation=activation)
    torch.testing.assert_close(without, causal_conv1d(x, weight, torch.zeros_like(bias), activation=activation))


class TestCausalConv(Contract):
    recurrence, function = module._causal_conv1d, causal_conv1d
    tokens = ("x",)
    options = {"activation": "silu"}

    def inputs(self, batch, routes, length):
        return {
            "x": noise(batch, routes, length, 3),
            "weight": noise(routes, 3, 4),
            "bias": noise(routes, 3),
            "initial_state": noise(batch, routes, 3, 3),
        }

    def test_chunk_size_does_not_matter(self):
        """It has no chunks."""

    def test_state_is_the_last_inputs(self):
        inputs = self.make(length=9)
        _, state = self.call(inputs)
        torch.testing.assert_close(state, inputs["x"][:, :, -3:].mT)
        _, state = self.call({key: v[:, :, :1] if key == "x" else v for key, v in inputs.items()})
        want = torch.cat((inputs["initial_state"][..., 1:], inputs["x"][:, :, 0, :, None]), -1)
        torch.testing.assert_close(state, want)

    def test_unknown_activation(self):
        inputs = self.make()
        with pytest.raises(ValueError, match="activation is None or 'silu', got 'gelu'"):
            causal_conv1d(**inputs, activation="gelu")
