import pytest
import torch
from golden import cases, check
from properties import FORMS, LAWS, Mixer, close, gate, results

from linescan.scans.ops.hgrn import hgrn
from linescan.scans.recurrence import backend

HGRN = Mixer(hgrn, "hgrn", lambda make: dict(x=make(5), g=gate(make(5))))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law(HGRN)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__hgrn"), ids=str)
def test_golden(case, form):
    def run(x, g, h0):
        h, state = hgrn(x.unsqueeze(1), g.unsqueeze(1), initial_state=h0.unsqueeze(1), return_final_state=True)
        return h.squeeze(1), state.squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("value", [-5.0, -100.0, -torch.inf, 0.0])
def test_delicate_gates(value):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    tokens = HGRN.inputs(L=200)
    for gates in (torch.full_like(tokens["g"], value), torch.where(tokens["g"] < -3, value, -1e-3)):
        tokens["g"] = gates
        want = results(HGRN, tokens, "reference")
        for form in FORMS:
            close(results(HGRN, {name: x.float() for name, x in tokens.items()}, form), want, 5e-6)


def test_is_an_exponential_average():
    """With a constant gate a and inputs (1 - a) x, a constant x is approached from zero as 1 - a^t."""
    g = torch.full((1, 1, 50, 1), 0.9, dtype=torch.float64).log()
    steps = torch.arange(1, 51, dtype=torch.float64)[:, None]
    close([hgrn(torch.full_like(g, 0.1), g)[0, 0]], [1 - 0.9**steps])


def test_bad_input():
    with pytest.raises(ValueError, match=r"hgrn: g is \(B, K, L, D\) with D = 3, got \(1, 1, 4, 2\)"):
        hgrn(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 2))
