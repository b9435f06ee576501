"""HGRN and the RG-LRU: golden data, and what they are."""

import pytest
import torch

from linescan.scans import hgrn, rg_lru
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__hgrn"), ids=str)
def test_golden(golden, form):
    def run(x, g, h0):
        o, state = hgrn(x.unsqueeze(1), g.unsqueeze(1), initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__rg_lru"), ids=str)
def test_golden_rg_lru(golden, form):
    def run(x, gate_x, gate_a, a_param, h0, reset):
        tokens = (t.unsqueeze(1) for t in (x, gate_x, gate_a))
        o, state = rg_lru(*tokens, a_param, reset.unsqueeze(1), initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


def test_the_rg_lru_keeps_the_variance():
    """Its input is scaled for that, but for the first token of a sequence, which starts with it."""
    x = torch.randn(4000, 1, 300, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full, reset = torch.full_like(x, 30.0), torch.zeros(x.shape[:3], dtype=torch.bool)
    reset[:, :, 0] = True
    h = rg_lru(x, full, torch.zeros_like(x), torch.tensor([-4.0], dtype=torch.float64), reset)
    torch.testing.assert_close(h.var(0), torch.ones_like(h[0]), atol=0.15, rtol=0)


@pytest.mark.parametrize("value", [-5.0, -100.0, -torch.inf, 0.0])
def test_delicate_gates(value):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    inputs = case("hgrn").make(routes=1, length=200)
    for gates in (torch.full_like(inputs["g"], value), torch.where(inputs["g"] < -1.5, value, -1e-3)):
        inputs["g"] = gates
        want = results(case("hgrn"), "reference", inputs)
        for form in FORMS:
            same(results(case("hgrn"), form, bits(inputs, torch.float32)), want, 5e-6, floor=1)


def test_is_an_exponential_average():
    """With a constant gate a and inputs (1 - a) x, a constant x is approached from zero as 1 - a^t."""
    g = torch.full((1, 1, 50, 1), 0.9, dtype=torch.float64).log()
    steps = torch.arange(1, 51, dtype=torch.float64)[:, None]
    torch.testing.assert_close(hgrn(torch.full_like(g, 0.1), g)[0, 0], 1 - 0.9**steps)
