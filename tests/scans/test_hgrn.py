"""HGRN: golden data, and what it is."""

import pytest
import torch

from linescan.scans import hgrn
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
