import re

import pytest
import torch
from golden import cases, check
from properties import FORMS, LAWS, Mixer, close, gate, results
from torch.utils.flop_counter import FlopCounterMode

from linescan.scans import chunks
from linescan.scans.ops.gla import gla, hgrn2, retention, simple_gla
from linescan.scans.recurrence import backend

H = 2
GLA = Mixer(gla, "gla", lambda make: dict(q=make(H, 4), k=make(H, 4), v=make(H, 3), g=gate(make(H, 4))))
SIMPLE = Mixer(simple_gla, "simple_gla", lambda make: dict(q=make(H, 4), k=make(H, 4), v=make(H, 3), g=gate(make(H))))
RELATIVES = [
    Mixer(retention, "simple_gla", lambda make: dict(q=make(H, 4), k=make(H, 4), v=make(H, 3)), name="retention"),
    Mixer(hgrn2, "gla", lambda make: dict(q=make(H, 4), f=make(H, 4), v=make(H, 3)), name="hgrn2"),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("mixer", [GLA, SIMPLE], ids=str)
def test_law(mixer, law):
    law(mixer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__gla") + cases("mixer__simple_gla"), ids=str)
def test_golden(case, form):
    function = {"mixer__gla": gla, "mixer__simple_gla": simple_gla}[case.stem]

    def run(q, k, v, g, h0):
        q, k, v, g = (x.unsqueeze(1) for x in (q, k, v, g))
        o, state = function(q, k, v, g, initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__retention"), ids=str)
def test_golden_retention(case, form):
    def run(q, k, v):
        o, state = retention(*(x.unsqueeze(1) for x in (q, k, v)), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__hgrn2"), ids=str)
def test_golden_hgrn2(case, form):
    def run(q, f, v, h0):
        q, f, v, h0 = (x.unsqueeze(1) for x in (q, f, v, h0))
        o, state = hgrn2(q, f, v, 0.25, initial_state=h0, return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__bi_gla"), ids=str)
def test_golden_bidirectional(case, form):
    """Both ways at once: two routes share q, k, v and have a gate set each."""

    def run(q, k, v, gf, gb):
        steps = torch.arange(q.shape[1])
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        return gla(q, k, v, torch.stack((gf, gb), 1), route=torch.stack((steps, steps.flip(0))), merge="sum") / 2

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("mixer", [GLA, SIMPLE], ids=str)
def test_chunk_size_does_not_matter(mixer, monkeypatch):
    tokens = mixer.inputs(L=100)
    want = results(mixer, tokens, "chunked")
    for size in (1, 8, 32, 128):
        monkeypatch.setattr(chunks, "CHUNK", size)
        close(results(mixer, tokens, "chunked"), want)


GATES = {
    "mild": lambda g: g / 64,  # one boundary for a whole chunk
    "minus 5": lambda g: torch.full_like(g, -5),
    "minus 100": lambda g: torch.full_like(g, -100),
    "minus infinity": lambda g: torch.full_like(g, -torch.inf),
    "zero": torch.zeros_like,
    "now and then minus 100": lambda g: torch.where(g < -3, -100, -1e-3),
    "now and then minus infinity": lambda g: torch.where(g < -3, -torch.inf, -1e-3),
}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mixer", [GLA, SIMPLE], ids=str)
def test_delicate_gates(mixer, gates):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    tokens = mixer.inputs(L=200)
    tokens["g"] = GATES[gates](tokens["g"])
    want = results(mixer, tokens, "reference")
    for form in FORMS:
        close(results(mixer, {name: x.float() for name, x in tokens.items()}, form), want, 2e-6)


@pytest.mark.parametrize("lower_bound", [0.0, 0.3])
def test_hgrn2_saturated_gates(lower_bound):
    """Keys and decays keep their digits where the forget gate saturates."""
    mixer = Mixer(lambda **x: hgrn2(lower_bound=lower_bound, **x), "gla", RELATIVES[1].tokens)
    tokens = mixer.inputs(L=70)
    tokens["f"] = 60 * tokens["f"].sign()
    want = results(mixer, tokens, "reference")
    narrow = {name: x.float() for name, x in tokens.items()}
    close(results(mixer, narrow, "chunked"), want, 2e-6)
    remembered = torch.full_like(narrow["f"], 60.0)
    assert hgrn2(narrow["q"], remembered, narrow["v"], lower_bound).abs().max() > 0  # keys of 1e-26, not 1 - 1 = 0


def test_hgrn2_learned_lower_bound():
    tokens = RELATIVES[1].inputs(L=9)
    bound = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    output = hgrn2(**tokens, lower_bound=bound)
    for b in (0.0, 0.5):
        same = hgrn2(**tokens, lower_bound=torch.full_like(bound, b))
        close([same], [hgrn2(**tokens, lower_bound=b)])
    (gradient,) = torch.autograd.grad(output.sum(), bound)
    assert gradient.isfinite().all() and gradient[1:].all()


@pytest.mark.parametrize("mixer", RELATIVES, ids=str)
def test_relatives_along_routes(mixer):
    """What is gla in other variables also runs on shared tokens, many routes and bfloat16."""
    tokens = mixer.inputs(L=8)
    route = torch.stack([torch.arange(8), torch.arange(8).flip(0)])
    output, _ = mixer(tokens, route=route)
    backwards, _ = mixer({name: x.flip(2) for name, x in tokens.items()})
    close([output[:, :1], output[:, 1:]], [mixer(tokens)[0], backwards.flip(2)])
    narrow, state = mixer({name: x.bfloat16() for name, x in tokens.items()})
    assert narrow.dtype == torch.bfloat16 and state.dtype == torch.float32
    close([narrow], [mixer(tokens)[0]], 3e-2)


def test_flops():
    tokens = GLA.inputs(B=2, L=10)
    with FlopCounterMode(display=False) as counter:
        gla(**tokens)
    assert counter.get_total_flops() == 2 * 10 * H * 5 * 4 * 3


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(k=torch.zeros(2, 1, 5, H, 3)), "k is (B, K, L, H, dk) with dk = 4, got (2, 1, 5, 2, 3)"),
        (dict(g=torch.zeros(2, 1, 5, H)), "g is (B, K, L, H, dk), got 4 axes (2, 1, 5, 2)"),
        (dict(g=torch.zeros(2, 3, 5, H, 4), v=torch.zeros(2, 2, 5, H, 3)), "v is (B, K, L, H, dv) with K = 3, got"),
        (dict(initial_state=torch.zeros(2, 2, H, 4, 3)), "initial_state is (B, K, H, dk, dv) with K = 1, got"),
        (dict(merge="mean"), "merge is None (one output a route) or 'sum', got 'mean'"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=re.escape(f"gla: {message}")):
        gla(**{**GLA.inputs(L=5, dtype=torch.float32), **changed})
