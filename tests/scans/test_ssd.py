"""SSD: golden data of Mamba-2, and its own limits and groups."""

import pytest
import torch
import torch.nn.functional as F

from linescan.scans import selective_scan, ssd
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, form, results, same

SSD = case("ssd")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("golden", cases("mixer__mamba2_ssd"), ids=str)
@pytest.mark.parametrize("name", ["reference", "chunked", "picked"])
def test_golden(name, golden, dtype):
    def run(x, dt, A, Bm, Cm, D, dt_bias, h0):
        x, dt, Bm, Cm, h0 = (t.unsqueeze(1) for t in (x, dt, Bm, Cm, h0))
        A, D, dt_bias = (t.unsqueeze(0) for t in (A, D, dt_bias))
        y, state = ssd(x, dt, A, Bm, Cm, D, None, dt_bias, True, initial_state=h0, return_final_state=True)
        return y.squeeze(1), state.squeeze(1)

    with form(name):
        check(golden, run, dtype)


@pytest.mark.parametrize("name", FORMS)
def test_is_a_selective_scan_with_one_decay_per_head(name):
    """S6 whose channels of a head share step, decay, D and bias."""
    inputs = SSD.make(length=21)
    heads, channels, d_state = 4, 3, 3
    wide = {key: inputs[key].repeat_interleave(channels, -1) for key in ("dt", "A", "D", "dt_bias")}
    with backend(name):
        got, state = SSD(inputs)
    want, want_state = selective_scan(
        inputs["x"].flatten(-2),
        wide["dt"],
        wide["A"].unsqueeze(-1).expand(-1, -1, d_state),
        inputs["B"],
        inputs["C"],
        wide["D"],
        inputs["z"].flatten(-2),
        wide["dt_bias"],
        True,
        initial_state=inputs["initial_state"].mT.flatten(2, 3),
        return_final_state=True,
    )
    torch.testing.assert_close(got.flatten(-2), want)
    torch.testing.assert_close(state, want_state.unflatten(2, (heads, channels)).mT)


@pytest.mark.parametrize("without", ["D", "z", "dt_bias", "initial_state"])
def test_leaving_an_input_out_is_giving_its_neutral_value(without):
    inputs = SSD.make(length=19)
    output, state = SSD({key: x for key, x in inputs.items() if key != without})
    full = inputs if without == "z" else inputs | {without: torch.zeros_like(inputs[without])}
    want, want_state = SSD(full)
    torch.testing.assert_close(output, want / F.silu(inputs["z"]) if without == "z" else want)
    torch.testing.assert_close(state, want_state)


@pytest.mark.parametrize("name", FORMS)
def test_step_sizes_are_limited(name):
    inputs = SSD.make(length=40)
    steps = F.softplus(inputs["dt"] + inputs["dt_bias"][:, None])
    low, high = steps.quantile(0.3).item(), steps.quantile(0.6).item()
    with backend(name):
        got = ssd(**inputs, dt_softplus=True, dt_limit=(low, high))
        want = ssd(**inputs | {"dt": steps.clamp(low, high), "dt_bias": None})
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", FORMS)
def test_strong_decay_is_finite_and_exact(name):
    """Decays of exp(-5) a step and more: exp of a negated sum over 64 steps would overflow."""
    inputs = SSD.make(length=130)
    inputs |= {"A": inputs["A"] - 5, "dt": inputs["dt"] + 4}
    same(results(SSD, name, bits(inputs, torch.float32)), results(SSD, "reference", inputs), 1e-4)


def test_heads_must_divide_into_groups():
    with pytest.raises(ValueError, match="4 heads do not divide into the 3 groups"):
        SSD(SSD.make() | {key: torch.zeros(2, 2, 7, 3, 3, dtype=torch.float64) for key in "BC"})
