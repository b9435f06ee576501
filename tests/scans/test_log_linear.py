"""Log-linear attention: golden data, its equation, and its buckets at any position."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linescan.scans import chunks, gated_delta_rule, log_linear_attention, log_linear_gated_delta_rule
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same

LOG_LINEAR, DELTA = case("log_linear_attention"), case("log_linear_gated_delta_rule")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__log_linear"), ids=str)
def test_golden(golden, form):
    def run(**tokens):
        return log_linear_attention(**{name: x.unsqueeze(1) for name, x in tokens.items()}, scale=1.0).squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__log_linear_gated_delta_rule"), ids=str)
def test_golden_with_the_delta_rule(golden, form):
    """Final states are by level in the original: after an odd number of tokens no two levels are in one bucket."""

    def run(**tokens):
        tokens = {name: x.unsqueeze(1) for name, x in tokens.items()}
        o, state = log_linear_gated_delta_rule(**tokens, return_final_state=True)
        if golden.dims["T"] % 2 == 0:
            return o.squeeze(1)
        state = state[:, 0].movedim(1, -1)
        return o.squeeze(1), torch.cat((state[..., :1], torch.zeros_like(state[..., :1]), state[..., 1:-1]), -1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_quadratic_form(form):
    """A weight for each pair of tokens, by the level of the pair."""
    inputs = LOG_LINEAR.make(1, 1, 40)
    q, k, v, g, lam = (inputs[key][0, 0] for key in ("q", "k", "v", "g", "lam"))
    want = torch.zeros_like(v)
    for t in range(40):
        for j in range(t + 1):
            decay = g[j + 1 : t + 1].sum(0).exp()
            want[t] += (lam[t, :, (t ^ j).bit_length()] * decay * (q[t] * k[j]).sum(-1) / 2)[:, None] * v[j]
    with backend(form):
        torch.testing.assert_close(log_linear_attention(**inputs)[0, 0], want)


def test_equal_weights_are_simple_gla():
    inputs = LOG_LINEAR.make(length=100, without=["initial_state"])
    inputs["lam"] = torch.ones_like(inputs["lam"])
    output, state = LOG_LINEAR(inputs)
    del inputs["lam"]
    want, final = case("simple_gla")(inputs)
    torch.testing.assert_close((output, state.sum(2)), (want, final))


def test_equal_weights_are_the_gated_delta_rule():
    inputs = DELTA.make(length=100, without=["initial_state"])
    inputs["lam"] = torch.ones_like(inputs["lam"])
    output, state = DELTA(inputs)
    del inputs["lam"]
    want, final = gated_delta_rule(**inputs, scale=1.0, return_final_state=True)
    torch.testing.assert_close((output, state.sum(2)), (want, final))


def test_state_is_the_binary_position():
    """After 100 = 0b1100100 tokens there are buckets of 64, 32 and 4 tokens."""
    _, state = LOG_LINEAR(LOG_LINEAR.make(length=100))
    assert state.abs().amax((0, 1, 3, 4, 5)).nonzero().flatten().tolist() == [2, 5, 6]


@pytest.mark.parametrize("length, before", [(1, 7), (5, 13), (37, 5), (33, 31), (64, 64), (70, 32), (3, 125), (9, 246)])
def test_any_position_and_chunk_size(length, before, monkeypatch):
    """Continuing anywhere agrees with the definition: inside a block, at its edge, and across a carry of high bits."""
    for op in (LOG_LINEAR, DELTA):
        inputs = op.make(routes=1, length=length)
        want = results(op, "reference", inputs, position=before)
        for size in (1, 4, 16, 64):
            monkeypatch.setattr(chunks, "CHUNK", size)
            same(results(op, "chunked", inputs, position=before), want, 1e-9)


def test_a_state_may_have_fewer_buckets_than_there_are_levels():
    inputs = LOG_LINEAR.make(length=6)
    few = inputs | {"initial_state": inputs["initial_state"][:, :, :3]}
    for form in FORMS:
        with backend(form):
            torch.testing.assert_close(LOG_LINEAR(few, position=5), LOG_LINEAR(inputs, position=5))
    _, state = LOG_LINEAR({key: x[:, :, :0] if key in LOG_LINEAR.tokens else x for key, x in few.items()}, position=5)
    assert state.shape[2] == 9 and not state[:, :, 3:].any()
    torch.testing.assert_close(state[:, :, :3], few["initial_state"])


def test_heads_share_groups():
    inputs = LOG_LINEAR.make(length=20)
    shared = {**inputs, "q": inputs["q"][..., :1, :], "k": inputs["k"][..., :1, :]}
    repeated = {**shared, "q": shared["q"].expand(-1, -1, -1, 2, -1), "k": shared["k"].expand(-1, -1, -1, 2, -1)}
    torch.testing.assert_close(log_linear_attention(**shared), log_linear_attention(**repeated))


@pytest.mark.parametrize("value", [-5.0, -100.0, -torch.inf, 0.0])
def test_delicate_gates(value):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    inputs = LOG_LINEAR.make(routes=1, length=200, without=["initial_state"])
    for gates in (torch.full_like(inputs["g"], value), torch.where(inputs["g"] < -1.5, value, -1e-3)):
        inputs["g"] = gates
        want = results(LOG_LINEAR, "reference", inputs)
        for form in FORMS:
            same(results(LOG_LINEAR, form, bits(inputs, torch.float32)), want, 5e-6, floor=1)


def test_counts_flops():
    """Half of the log2 T buckets are read (2 operations per element of a state), one is updated and read (5)."""
    with FlopCounterMode(display=False) as counter:
        LOG_LINEAR(LOG_LINEAR.make(length=32))
    assert counter.get_total_flops() == (2 * 2 * 32 * 2) * (4 * 3) * (5 + 5)


def test_bad_input():
    inputs = LOG_LINEAR.make(length=20)
    with pytest.raises(ValueError, match="tokens 0 to 19 need 6 levels, lam has 5"):
        log_linear_attention(**inputs | {"lam": inputs["lam"][..., :5]})
    with pytest.raises(ValueError, match="9 tokens fill 4 buckets, initial_state has 3"):
        log_linear_attention(**inputs | {"initial_state": inputs["initial_state"][:, :, :3]}, position=9)
    with pytest.raises(ValueError, match="2 heads of v cannot share 3 heads of q and k evenly"):
        wide = {key: torch.zeros(2, 2, 20, 3, 4, dtype=torch.float64) for key in "qk"}
        log_linear_attention(**inputs | wide)
