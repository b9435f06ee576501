import re

import pytest
import torch
import torch.nn.functional as F
from golden import cases, check
from properties import FORMS, LAWS, Mixer, close, forms_agree, gate, half_precision, results, routes_permute
from torch.utils.flop_counter import FlopCounterMode

from linescan.scans import chunks
from linescan.scans.ops.delta import delta_rule, dplr, gated_delta_rule, kda, rwkv7
from linescan.scans.recurrence import backend

H = 2


def unit(x):
    return F.normalize(x, dim=-1)


def delta(make):
    return dict(q=make(H, 4), k=unit(make(H, 4)), v=make(H, 3), beta=2 * make(H).sigmoid())


def low_rank(make):
    return dict(q=make(H, 4), k=make(H, 4), v=make(H, 3), a=unit(make(H, 4)), b=0.3 * make(H, 4), g=gate(make(H, 4)))


def goose(make):
    gates = dict(w=-0.6 * make(H, 4).sigmoid(), a=make(H, 4).sigmoid())
    return dict(r=make(H, 4), k=make(H, 4), v=make(H, 3), kk=unit(make(H, 4)), **gates)


GATED = Mixer(gated_delta_rule, "gated_delta_rule", lambda make: dict(delta(make), g=gate(make(H))))
KDA = Mixer(kda, "gated_delta_rule", lambda make: dict(delta(make), g=gate(make(H, 4))), name="kda")
DPLR = Mixer(dplr, "dplr", low_rank)
DELTA = Mixer(delta_rule, "gated_delta_rule", delta, name="delta_rule")
RWKV7 = Mixer(rwkv7, "dplr", goose, name="rwkv7")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("mixer", [GATED, KDA, DPLR], ids=str)
def test_law(mixer, law):
    law(mixer)


@pytest.mark.parametrize("law", [forms_agree, routes_permute, half_precision], ids=lambda law: law.__name__)
@pytest.mark.parametrize("mixer", [DELTA, RWKV7], ids=str)
def test_law_of_relatives(mixer, law):
    law(mixer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [delta_rule, gated_delta_rule, kda, dplr, rwkv7], ids=lambda f: f.__name__)
def test_golden(function, form):
    def run(h0, **tokens):
        tokens = {name: x.unsqueeze(1) for name, x in tokens.items()}
        o, state = function(**tokens, initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    for case in cases(f"mixer__{function.__name__}"):
        with backend(form):
            check(case, run)
            check(case, run, torch.float32)


@pytest.mark.parametrize("mixer", [GATED, KDA, DPLR], ids=str)
def test_chunk_size_does_not_matter(mixer, monkeypatch):
    tokens = mixer.inputs(L=100)
    want = results(mixer, tokens, "chunked")
    for size in (1, 8, 32, 128):
        monkeypatch.setattr(chunks, "CHUNK", size)
        close(results(mixer, tokens, "chunked"), want)


@pytest.mark.parametrize("decay", [-5.0, -100.0, -torch.inf, 0.0, "mixed"])
@pytest.mark.parametrize("mixer", [GATED, KDA, RWKV7], ids=str)
def test_delicate_decays(mixer, decay):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    tokens = mixer.inputs(L=150)
    name = "w" if mixer is RWKV7 else "g"
    g = tokens[name]
    if decay == "mixed":
        tokens[name] = torch.where(g < g.median(), -torch.inf, -1e-3)
    else:
        tokens[name] = torch.full_like(g, decay)
    want = results(mixer, tokens, "reference")
    for form in FORMS:
        close(results(mixer, {name: x.float() for name, x in tokens.items()}, form), want, 2e-5)


@pytest.mark.parametrize("beta, tolerance", [(1.0, 1e-5), (2.0, 1e-4)])
@pytest.mark.parametrize("mixer", [DELTA, GATED, KDA], ids=str)
def test_same_key_again_and_again(mixer, beta, tolerance):
    """The worst case of the triangular system: every token corrects, or overcorrects, the one before.

    With beta 2 and keys that are not quite of norm 1, rounding the inputs to float32 alone moves the results by 2e-5.
    """
    tokens = mixer.inputs(L=150)
    tokens["k"] = tokens["k"][:, :, :1].expand_as(tokens["k"]).contiguous()
    tokens["beta"] = torch.full_like(tokens["beta"], beta)
    if "g" in tokens:
        tokens["g"] = 1e-3 * tokens["g"]
    want = results(mixer, tokens, "reference")
    close(results(mixer, {name: x.float() for name, x in tokens.items()}, "chunked"), want, tolerance)


def test_a_key_is_answered_with_its_last_value():
    """With unit keys and beta 1 the state answers the key just written with exactly that value."""
    tokens = DELTA.inputs(L=20)
    tokens["beta"] = torch.ones_like(tokens["beta"])
    tokens["q"] = tokens["k"]
    for form in FORMS:
        with backend(form):
            close([delta_rule(**tokens, scale=1.0)], [tokens["v"]])


def test_they_are_one_family():
    """gated_delta_rule without decay is delta_rule, kda with one decay a head is gated_delta_rule, and kda is dplr."""
    tokens = KDA.inputs(L=30)
    plain = {name: x for name, x in tokens.items() if name != "g"}
    close([gated_delta_rule(**plain, g=torch.zeros_like(tokens["beta"]))], [delta_rule(**plain)])
    one = tokens["g"][..., 0]
    close([kda(**plain, g=one[..., None].expand_as(tokens["g"]))], [gated_delta_rule(**plain, g=one)])
    q, k, v, beta, g = tokens.values()
    written = beta[..., None] * k
    close([dplr(q, written, v, k * g.exp(), -written, g)], [kda(**tokens)])


def test_flops():
    for mixer, operations in ((DELTA, 7), (KDA, 7), (DPLR, 9), (RWKV7, 9)):
        with FlopCounterMode(display=False) as counter:
            mixer(mixer.inputs(B=2, L=10))
        assert counter.get_total_flops() == 2 * 10 * H * operations * 4 * 3


@pytest.mark.parametrize(
    "mixer, changed, message",
    [
        (GATED, dict(g=torch.zeros(2, 1, 5, H, 4)), "gated_delta_rule: g is (B, K, L, H), got 5 axes"),
        (KDA, dict(g=torch.zeros(2, 1, 5, H)), "kda: g is (B, K, L, H, dk), got 4 axes (2, 1, 5, 2)"),
        (DELTA, dict(beta=torch.zeros(2, 1, 6, H)), "delta_rule: beta is (B, K, L, H) with L = 5, got (2, 1, 6, 2)"),
        (DPLR, dict(a=torch.zeros(2, 1, 5, H, 3)), "dplr: a is (B, K, L, H, dk) with dk = 4, got (2, 1, 5, 2, 3)"),
        (RWKV7, dict(kk=torch.zeros(2, 1, 5, H, 3)), "rwkv7: kk is (B, K, L, H, dk) with dk = 4, got (2, 1, 5, 2, 3)"),
        (DPLR, dict(merge="mean"), "dplr: merge is None (one output a route) or 'sum', got 'mean'"),
    ],
)
def test_bad_input(mixer, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.function(**{**mixer.inputs(L=5, dtype=torch.float32), **changed})
