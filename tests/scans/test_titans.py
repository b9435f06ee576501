"""Titans' memory: golden data, and steps that are those of an optimiser."""

import pytest
import torch

from linescan.scans import titans_memory
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, case, results, same


def flat(*matrices):
    return torch.cat([x.flatten(-2) for x in matrices], -1)[:, None, None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", [*cases("mixer__titans_linear_memory"), *cases("mixer__titans_mlp_memory")], ids=str)
def test_golden(golden, form):
    dims = golden.dims

    def run(q, k, v, lr, mom, dec, w0, s0, w1=None, s1=None):
        two = w1 is not None
        weights, momentum = (flat(w0, w1), flat(s0, s1)) if two else (flat(w0), flat(s0))
        nothing = torch.zeros_like(weights)
        state = weights, momentum, nothing, nothing, weights.new_zeros(*weights.shape[:3], 2)
        tokens = (x[:, None, :, None] for x in (q, k, v, lr, mom, dec))
        options = dict(chunk=dims["C"], per_batch=dims["N"], hidden=w0.shape[-1] if two else 0)
        o, (weights, momentum, *_) = titans_memory(*tokens, **options, initial_state=state, return_final_state=True)
        weights, momentum = weights[:, 0, 0], momentum[:, 0, 0]
        if not two:
            return o[:, 0, :, 0], weights.unflatten(-1, w0.shape[-2:]), momentum.unflatten(-1, w0.shape[-2:])
        size = w0[0].numel()
        first, second = ((x[:, :size].unflatten(-1, w0.shape[-2:]), x[:, size:].unflatten(-1, w1.shape[-2:]))
                         for x in (weights, momentum))  # fmt: skip
        return o[:, 0, :, 0], *first, *second

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("hidden", [0, 5])
def test_steps_are_those_of_sgd(hidden):
    """Chunks of one token, the gradient by autograd."""
    inputs = case("titans_memory").make(1, 1, 6, hidden=hidden)
    state = [inputs.pop(key) for key in ("weights", "momentum", "base", "gradient", "gates")]
    o = titans_memory(**inputs, chunk=1, hidden=hidden, initial_state=(*state[:3], 0 * state[3], 0 * state[4]))
    for h in range(2):
        q, k, v, lr, mom, dec = (inputs[key][0, 0, :, h] for key in ("q", "k", "v", "lr", "mom", "dec"))
        W, S = state[0][0, 0, h].clone(), state[1][0, 0, h]

        def model(x, W):
            if not hidden:
                return x @ W.view(4, 4)
            return torch.nn.functional.gelu(x @ W[:20].view(4, 5)) @ W[20:].view(5, 4)

        for t in range(6):
            W.requires_grad_()
            loss = lr[t].sigmoid() * (model(k[t], W) - v[t]).square().mean()
            S = mom[t].sigmoid() * S - torch.autograd.grad(loss, W)[0]
            W = ((1 - dec[t].sigmoid()) * W + S).detach()
            torch.testing.assert_close(o[0, 0, t, h], model(q[t], W))


@pytest.mark.parametrize("chunk, batch", [(1, 1), (3, 1), (1, 4), (4, 3), (50, 2)])
def test_cut_anywhere(chunk, batch):
    """Continuing inside a chunk and inside a batch agrees with the definition."""
    op = case("titans_memory")
    for length, before in ((1, 0), (5, 2), (11, 7), (13, 12), (24, 23)):
        inputs = op.make(routes=1, length=length)
        got, want = (results(op, form, inputs, position=before, chunk=chunk, per_batch=batch) for form in FORMS)
        same(got, want, 1e-9)


def test_clipping_keeps_the_weights_bounded():
    """Large values and rates, without which the weights grow without end."""
    inputs = case("titans_memory").make(1, 1, 60, without=case("titans_memory").states, D=4)
    inputs |= {"v": 1e4 * inputs["v"], "k": 30 * inputs["k"], "lr": inputs["lr"] + 5}
    for form in FORMS:
        with backend(form):
            free, (grown, *_) = titans_memory(**inputs, chunk=2, return_final_state=True)
            bound, (kept, *_) = titans_memory(**inputs, chunk=2, clip=0.5, return_final_state=True)
        assert not grown.abs().max() < 1e6
        # Steps below 0.5 under the momenta and decays at hand.
        assert kept.norm(dim=-1).max() < 30 and bound.isfinite().all()


def test_impossible_chunks_are_refused():
    inputs = case("titans_memory").make(length=5, without=case("titans_memory").states)
    with pytest.raises(ValueError, match="titans_memory: chunk and per_batch are at least 1, got 0 and 1"):
        titans_memory(**inputs, chunk=0)
    with pytest.raises(ValueError, match="hidden and clip are not negative, got 0 and -1"):
        titans_memory(**inputs, clip=-1.0)
