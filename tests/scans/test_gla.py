"""Gated linear attention and its relatives: golden data, and gates that are delicate."""

import pytest
import torch

from linescan.scans import gla, hgrn2, retention, simple_gla
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__gla") + cases("mixer__simple_gla"), ids=str)
def test_golden(golden, form):
    function = {"mixer__gla": gla, "mixer__simple_gla": simple_gla}[golden.stem]

    def run(q, k, v, g, h0):
        q, k, v, g = (x.unsqueeze(1) for x in (q, k, v, g))
        o, state = function(q, k, v, g, initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__retention"), ids=str)
def test_golden_retention(golden, form):
    def run(q, k, v):
        o, state = retention(*(x.unsqueeze(1) for x in (q, k, v)), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__hgrn2"), ids=str)
def test_golden_hgrn2(golden, form):
    def run(q, f, v, h0):
        q, f, v, h0 = (x.unsqueeze(1) for x in (q, f, v, h0))
        o, state = hgrn2(q, f, v, 0.25, initial_state=h0, return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__bi_gla"), ids=str)
def test_golden_bidirectional(golden, form):
    """Both ways at once: two routes share q, k, v and have a gate set each."""

    def run(q, k, v, gf, gb):
        steps = torch.arange(q.shape[1])
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        return gla(q, k, v, torch.stack((gf, gb), 1), route=torch.stack((steps, steps.flip(0))), merge="sum") / 2

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


GATES = {
    "mild": lambda g: g / 64,  # one boundary for a whole chunk
    "minus 5": lambda g: torch.full_like(g, -5),
    "minus 100": lambda g: torch.full_like(g, -100),
    "minus infinity": lambda g: torch.full_like(g, -torch.inf),
    "zero": torch.zeros_like,
    "now and then minus 100": lambda g: torch.where(g < -1.5, -100, -1e-3),
    "now and then minus infinity": lambda g: torch.where(g < -1.5, -torch.inf, -1e-3),
}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", ["gla", "simple_gla"])
def test_delicate_gates(name, gates):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    inputs = case(name).make(routes=1, length=200)
    inputs["g"] = GATES[gates](inputs["g"])
    want = results(case(name), "reference", inputs)
    for form in FORMS:
        same(results(case(name), form, bits(inputs, torch.float32)), want, 2e-6, floor=1)


@pytest.mark.parametrize("lower_bound", [0.0, 0.3])
def test_hgrn2_saturated_gates(lower_bound):
    """Keys and decays keep their digits where the forget gate saturates."""
    inputs = case("hgrn2").make(routes=1, length=70, without=["initial_state"])
    inputs["f"] = 60 * inputs["f"].sign()
    with backend("reference"):
        want = hgrn2(**inputs, lower_bound=lower_bound)
    narrow = bits(inputs, torch.float32)
    with backend("chunked"):
        same({"o": hgrn2(**narrow, lower_bound=lower_bound)}, {"o": want}, 2e-6, floor=1)
    remembered = torch.full_like(narrow["f"], 60.0)
    assert hgrn2(narrow["q"], remembered, narrow["v"], lower_bound).abs().max() > 0  # keys of 1e-26, not 1 - 1 = 0


def test_hgrn2_learned_lower_bound():
    inputs = case("hgrn2").make(routes=1, length=9)
    bound = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    output = hgrn2(**inputs, lower_bound=bound)
    for b in (0.0, 0.5):
        torch.testing.assert_close(
            hgrn2(**inputs, lower_bound=torch.full_like(bound, b)), hgrn2(**inputs, lower_bound=b)
        )
    (gradient,) = torch.autograd.grad(output.sum(), bound)
    assert gradient.isfinite().all() and gradient[1:].all()


@pytest.mark.parametrize("name", ["retention", "hgrn2"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_leaves_the_state_as_it_is(name, form):
    """Also where the function makes the decay itself."""
    inputs = case(name).make(routes=1)
    order = torch.tensor([[3, 0, 6, 1, 2, 5, 4]])
    padded = torch.tensor([[-1, 3, 0, -1, -1, 6, 1, 2, 5, 4, -1]])
    with backend(form):
        torch.testing.assert_close(case(name)(inputs, padded), case(name)(inputs, order))
