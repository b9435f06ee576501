"""SSD: golden data of Mamba-2, the promises of every recurrence, and its own limits and groups."""

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, form, noise
from golden import cases, check

from linescan.scans.ops import ssd as module
from linescan.scans.ops.selective_scan import selective_scan
from linescan.scans.ops.ssd import ssd
from linescan.scans.recurrence import backend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases("mixer__mamba2_ssd"), ids=str)
@pytest.mark.parametrize("name", ["reference", "chunked", "picked"])
def test_golden(name, case, dtype):
    def run(x, dt, A, Bm, Cm, D, dt_bias, h0):
        x, dt, Bm, Cm, h0 = (t.unsqueeze(1) for t in (x, dt, Bm, Cm, h0))
        A, D, dt_bias = (t.unsqueeze(0) for t in (A, D, dt_bias))
        y, state = ssd(x, dt, A, Bm, Cm, D, None, dt_bias, True, initial_state=h0, return_final_state=True)
        return y.squeeze(1), state.squeeze(1)

    with form(name):
        check(case, run, dtype)


class TestSSD(Contract):
    recurrence, function = module._ssd, ssd
    tokens = ("x", "dt", "B", "C", "z")
    options = {"dt_softplus": True}

    def inputs(self, batch, routes, length, heads=4, channels=3, d_state=2, groups=2):
        return {
            "x": noise(batch, routes, length, heads, channels),
            "dt": noise(batch, routes, length, heads, offset=-2),
            "A": -torch.exp(noise(routes, heads)),
            "B": noise(batch, routes, length, groups, d_state),
            "C": noise(batch, routes, length, groups, d_state),
            "D": noise(routes, heads),
            "z": noise(batch, routes, length, heads, channels),
            "dt_bias": noise(routes, heads),
            "initial_state": noise(batch, routes, heads, d_state, channels),
        }

    def resize_chunks(self, monkeypatch, size):
        monkeypatch.setattr(module, "CHUNK", size)

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_is_a_selective_scan_with_one_decay_a_head(self, name):
        """S6 whose channels of a head share step, decay, D and bias."""
        inputs = self.make(length=21)
        heads, channels, d_state = 4, 3, 2
        wide = {key: inputs[key].repeat_interleave(channels, -1) for key in ("dt", "A", "D", "dt_bias")}
        with backend(name):
            got, state = self.call(inputs)
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
    def test_optional_inputs(self, without):
        inputs = self.make(length=19)
        given = {key: x for key, x in inputs.items() if key != without}
        got = self.gradients("chunked", given)
        self.same(got, self.gradients("reference", given), 1e-9)
        full = inputs if without == "z" else inputs | {without: torch.zeros_like(inputs[without])}
        output, state = self.call(full)
        torch.testing.assert_close(got.output, output / F.silu(inputs["z"]) if without == "z" else output)
        torch.testing.assert_close(got.state, state)

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_step_sizes_are_limited(self, name):
        inputs = self.make(length=40)
        steps = F.softplus(inputs["dt"] + inputs["dt_bias"][:, None])
        low, high = steps.quantile(0.3).item(), steps.quantile(0.6).item()
        with backend(name):
            got = ssd(**inputs, dt_softplus=True, dt_limit=(low, high))
            want = ssd(**inputs | {"dt": steps.clamp(low, high), "dt_bias": None})
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_strong_decay_is_finite_and_exact(self, name):
        """Decays of exp(-5) a step and more: exp of a negated sum over 64 steps would overflow."""
        inputs = self.make(length=130)
        inputs |= {"A": inputs["A"] - 5, "dt": inputs["dt"] + 4}
        exact = self.gradients("reference", inputs)
        single = self.gradients(name, {key: x.float() for key, x in inputs.items()})
        assert all(x.isfinite().all() for x in (single.output, single.state, *single.grads.values()))
        self.same(single, exact, 1e-4)

    def test_heads_must_divide_into_groups(self):
        with pytest.raises(ValueError, match="4 heads do not divide into the 3 groups"):
            self.call(self.make() | {key: noise(2, 2, 7, 3, 2) for key in "BC"})
