import pytest
import torch
import torch.nn.functional as F
from golden import cases, check
from properties import FORMS, LAWS, Mixer, close, gate, gradients_hold, results

from linescan.scans import chunks
from linescan.scans.ops.gla import simple_gla
from linescan.scans.ops.log_linear import log_linear_attention
from linescan.scans.recurrence import backend

H = 2


def mixer(levels):
    return Mixer(
        log_linear_attention,
        "log_linear_attention",
        lambda make: dict(q=make(H, 4), k=make(H, 4), v=make(H, 3), g=gate(make(H)), lam=F.softplus(make(H, levels))),
        resume=lambda state, before: dict(initial_state=state, position=before),
    )


LOG_LINEAR = mixer(levels=9)  # 256 tokens


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law(mixer(levels=5) if law is gradients_hold else LOG_LINEAR)  # finite differences of every weight take time


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__log_linear"), ids=str)
def test_golden(case, form):
    def run(**tokens):
        return log_linear_attention(**{name: x.unsqueeze(1) for name, x in tokens.items()}, scale=1.0).squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_quadratic_form(form):
    """A weight for each pair of tokens, by the level of the pair."""
    tokens = LOG_LINEAR.inputs(B=1, L=40)
    q, k, v, g, lam = (x[0, 0] for x in tokens.values())
    want = torch.zeros_like(v)
    for t in range(40):
        for j in range(t + 1):
            decay = g[j + 1 : t + 1].sum(0).exp()
            want[t] += (lam[t, :, (t ^ j).bit_length()] * decay * (q[t] * k[j]).sum(-1) / 2)[:, None] * v[j]
    with backend(form):
        close([log_linear_attention(**tokens)[0, 0]], [want])


def test_equal_weights_are_simple_gla():
    tokens = LOG_LINEAR.inputs(L=100)
    tokens["lam"] = torch.ones_like(tokens["lam"])
    output, state = log_linear_attention(**tokens, return_final_state=True)
    del tokens["lam"]
    want, final = simple_gla(**tokens, return_final_state=True)
    close((output, state.sum(2)), (want, final))


def test_state_is_the_binary_position():
    """After 100 = 0b1100100 tokens there are buckets of 64, 32 and 4 tokens."""
    _, state = LOG_LINEAR(LOG_LINEAR.inputs(L=100))
    assert state.abs().amax((0, 1, 3, 4, 5)).nonzero().flatten().tolist() == [2, 5, 6]


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_any_position_and_chunk_size(size, monkeypatch):
    """Continuing anywhere agrees with the definition: inside a block, at its edge, and across a carry of high bits."""
    monkeypatch.setattr(chunks, "CHUNK", size)
    for length, before in ((1, 7), (5, 13), (37, 5), (33, 31), (64, 64), (70, 32), (3, 125), (9, 246)):
        tokens = LOG_LINEAR.inputs(L=length)
        state = LOG_LINEAR(LOG_LINEAR.inputs(L=before, seed=1))[1]
        close(*(results(LOG_LINEAR, tokens, form, state, before) for form in FORMS))


def test_heads_share_groups():
    tokens = LOG_LINEAR.inputs(L=20)
    shared = {**tokens, "q": tokens["q"][..., :1, :], "k": tokens["k"][..., :1, :]}
    repeated = {**shared, "q": shared["q"].expand(-1, -1, -1, H, -1), "k": shared["k"].expand(-1, -1, -1, H, -1)}
    close([log_linear_attention(**shared)], [log_linear_attention(**repeated)])


@pytest.mark.parametrize("value", [-5.0, -100.0, -torch.inf, 0.0])
def test_delicate_gates(value):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    tokens = LOG_LINEAR.inputs(L=200)
    for gates in (torch.full_like(tokens["g"], value), torch.where(tokens["g"] < -3, value, -1e-3)):
        tokens["g"] = gates
        want = results(LOG_LINEAR, tokens, "reference")
        for form in FORMS:
            close(results(LOG_LINEAR, {name: x.float() for name, x in tokens.items()}, form), want, 5e-6)


def test_bad_input():
    tokens = LOG_LINEAR.inputs(L=20)
    with pytest.raises(ValueError, match="tokens 0 to 19 need 6 levels, lam has 5"):
        log_linear_attention(**{**tokens, "lam": tokens["lam"][..., :5]})
    with pytest.raises(ValueError, match="9 tokens fill 4 buckets, initial_state has 3"):
        log_linear_attention(**tokens, initial_state=torch.zeros(2, 1, 3, H, 4, 3), position=9)
    with pytest.raises(ValueError, match="2 heads of v cannot share 3 heads of q and k evenly"):
        log_linear_attention(**{**tokens, "q": torch.zeros(2, 1, 20, 3, 4), "k": torch.zeros(2, 1, 20, 3, 4)})
