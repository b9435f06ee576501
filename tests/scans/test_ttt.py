"""Test-time training: golden data, mini-batches cut anywhere, and gradient steps taken by autograd."""

import pytest
import torch
import torch.nn.functional as F

from linescan.scans import ttt_linear, ttt_linear_fla
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, case


def started(h0, b0):
    start = torch.cat((h0, b0[..., None, :]), -2).unsqueeze(1)
    return start, torch.zeros_like(start)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__ttt_linear"), ids=str)
def test_golden(golden, form):
    def run(q, k, v, lr, token, weight, bias, h0, b0):
        tokens = (x.unsqueeze(1) for x in (q, k, v, lr))
        o, (start, pending) = ttt_linear(
            *tokens, token, weight, bias, initial_state=started(h0, b0), return_final_state=True
        )
        weights = (start - token[(q.shape[1] - 1) % len(token)].clamp_min(0) * pending).squeeze(1)
        return o.squeeze(1), weights[..., :-1, :], weights[..., -1, :]

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__ttt_linear_fla"), ids=str)
def test_golden_of_the_form_of_fla(golden, form):
    def run(q, k, v, eta, weight, bias, h0, b0):
        tokens = (x.unsqueeze(1) for x in (q, k, v, eta))
        o, (start, pending) = ttt_linear_fla(
            *tokens, weight, bias, golden.dims["M"], initial_state=started(h0, b0), return_final_state=True
        )
        return o.squeeze(1), (start[:, 0] - eta[:, -1, :, None, None] * pending[:, 0])[..., :-1, :]

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_autograd(form):
    """A mini-batch of one token: plain gradient descent on the loss."""
    inputs = case("ttt_linear").make(1, 1, 6, mini_batch=1)
    q, k, v = (inputs[key][0, 0] for key in "qkv")
    with backend(form):
        output = ttt_linear(**{key: x for key, x in inputs.items() if key not in ("start", "pending")},
                            initial_state=(inputs["start"], torch.zeros_like(inputs["start"])))  # fmt: skip
    for head in range(2):
        weight, bias = inputs["weight"][head], inputs["bias"][head]
        W = inputs["start"][0, 0, head].clone().requires_grad_()

        def inner(x, W):
            return F.layer_norm(x @ W[:-1] + W[-1], (4,), weight, bias, eps=1e-6)

        for t in range(6):
            loss = 0.5 * (inner(k[t, head], W) - (v - k)[t, head]).square().sum()
            step = inputs["lr"][0, 0, t, head] * inputs["token"][0].clamp_min(0)
            W = (W - step * torch.autograd.grad(loss, W)[0]).detach().requires_grad_()
            torch.testing.assert_close(output[0, 0, t, head], q[t, head] + inner(q[t, head], W))


def test_impossible_mini_batches_are_refused():
    inputs = case("ttt_linear").make(length=5, without=["start", "pending"])
    with pytest.raises(ValueError, match="ttt_linear: a mini-batch has at least 1 token, got 0"):
        ttt_linear(**inputs | {"token": inputs["token"][:0]})
    inputs = case("ttt_linear_fla").make(length=5, without=["start", "pending"])
    with pytest.raises(ValueError, match="ttt_linear_fla: a mini-batch has at least 1 token, got -1"):
        ttt_linear_fla(**inputs, mini_batch=-1)
