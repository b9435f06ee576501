"""Mamba-3: golden data, rotations over long sequences, and what it is without its new parts."""

from dataclasses import replace
from math import pi

import pytest
import torch

from linescan.scans import mamba3, mamba3_mimo, ssd
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", [*cases("mixer__mamba3_siso"), *cases("mixer__mamba3_mimo")], ids=str)
def test_golden(golden, form):
    mimo = golden.stem == "mixer__mamba3_mimo"

    def run(q, k, v, a, dt, trap, q_bias, k_bias, angle, D, z, angle0, h0, k0, v0, **parameters):
        tokens = (x.unsqueeze(1) for x in (q, k, v, a, dt, trap, angle))
        o, states = (mamba3_mimo if mimo else mamba3)(
            *tokens, q_bias, k_bias, D, z.unsqueeze(1), **parameters,
            initial_state=tuple(x.unsqueeze(1) for x in (h0, angle0, k0, v0)), return_final_state=True,
        )  # fmt: skip
        return o.squeeze(1), *(x.squeeze(1) for x in states)

    if mimo:  # the original's angles are not brought back to one turn
        golden = replace(golden, outputs=golden.outputs | {"anglet": golden.outputs["anglet"] % (2 * pi)})
    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


def test_without_its_new_parts_it_is_mamba_2():
    """No rotation, all of an input at its own step, no biases."""
    inputs = case("mamba3").make(length=40, without=["memory", "turned", "last_key", "last_value"])
    inputs |= {key: torch.zeros_like(inputs[key]) for key in ("angle", "q_bias", "k_bias")}
    inputs["trap"] = torch.full_like(inputs["trap"], 100.0)
    q, k, v, a, dt, D, z = (inputs[key] for key in ("q", "k", "v", "a", "dt", "D", "z"))
    A = -torch.rand(2, 2, dtype=torch.float64)
    got = mamba3(**inputs | {"a": A[:, None].expand_as(a)})
    torch.testing.assert_close(got, ssd(v, dt, A, k, q, D.expand(2, -1), z))


def test_one_rank_is_the_form_without_ranks():
    inputs = case("mamba3").make(length=20, without=["memory", "turned", "last_key", "last_value"])
    ranked = inputs | {key: inputs[key].unsqueeze(3) for key in "qk"}
    ranked |= {key: inputs[key].unsqueeze(1) for key in ("q_bias", "k_bias")}
    torch.testing.assert_close(mamba3_mimo(**ranked), mamba3(**inputs))


def test_angles_stay_exact_over_long_sequences():
    """In float32, after 5,000 turns or so."""
    inputs = case("mamba3").make(1, 1, 4000, without=["memory", "turned", "last_key", "last_value"])
    inputs["angle"], inputs["dt"] = torch.full_like(inputs["angle"], 2.0), torch.full_like(inputs["dt"], 2.7)
    inputs = bits(bits(inputs, torch.float32), torch.float64)
    with backend("chunked"):
        want = case("mamba3")(inputs)
        got = case("mamba3")(bits(inputs, torch.float32))
    turn = (got[2].double() - want[2] + pi) % (2 * pi) - pi
    assert turn.abs().max() < 1e-3
    assert (got[0] - want[0]).abs().max() < 2e-3 * want[0].abs().max()


@pytest.mark.parametrize("rate", [-1e3, -30.0, 0.0])
def test_delicate_decays(rate):
    inputs = case("mamba3_mimo").make(routes=1, length=70)
    inputs["a"] = torch.full_like(inputs["a"], rate)
    want = results(case("mamba3_mimo"), "reference", inputs)
    for form in FORMS:
        same(results(case("mamba3_mimo"), form, bits(inputs, torch.float32)), want, 2e-4, floor=1)


def test_more_angles_than_pairs_are_refused():
    with pytest.raises(ValueError, match="3 angles turn 6 of q's channels, it has 4"):
        mamba3(**case("mamba3").make(length=5, without=case("mamba3").states, A=3))
