"""MesaNet: golden data, and the regression that it solves."""

import pytest
import torch

from linescan.scans import mesa_net
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__mesa_net"), ids=str)
def test_golden(golden, form):
    def run(q, k, v, g, beta, lamb, h0, hk0):
        tokens = (x.unsqueeze(1) for x in (q, k, v, g, beta))
        state = h0.unsqueeze(1), hk0.unsqueeze(1)
        o, (memory, keys) = mesa_net(*tokens, lamb, initial_state=state, return_final_state=True)
        return o.squeeze(1), memory.squeeze(1), keys.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


def test_answers_are_those_of_ridge_regression():
    """Without decay, with unit weights: the solution of least squares over all tokens so far."""
    inputs = case("mesa_net").make(1, 1, 25, without=["memory", "keys"])
    inputs |= {"g": torch.zeros_like(inputs["g"]), "beta": torch.ones_like(inputs["beta"])}
    q, k, v, lamb = inputs["q"][0, 0], inputs["k"][0, 0], inputs["v"][0, 0], inputs["lamb"]
    for form in FORMS:
        with backend(form):
            o = mesa_net(**inputs)[0, 0]
        for t in (0, 3, 24):
            for h in range(2):
                rows = torch.cat((k[: t + 1, h], lamb[h].sqrt().diag()))
                wanted = torch.cat((v[: t + 1, h], v.new_zeros(4, 3)))
                weights = torch.linalg.lstsq(rows, wanted).solution
                torch.testing.assert_close(o[t, h], q[t, h] @ weights)


@pytest.mark.parametrize("value", [-100.0, 0.0])
def test_delicate_decays(value):
    inputs = case("mesa_net").make(routes=1, length=100, without=["memory", "keys"])
    inputs["g"] = torch.full_like(inputs["g"], value)
    want = results(case("mesa_net"), "reference", inputs)
    for form in FORMS:
        same(results(case("mesa_net"), form, bits(inputs, torch.float32)), want, 1e-4, floor=1)
