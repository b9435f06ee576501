"""mLSTM: golden data, and gates at which the exponentials alone would overflow."""

import pytest
import torch

from linescan.scans import mlstm
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", [*cases("mixer__mlstm"), *cases("mixer__mlstm_parallel")], ids=str)
def test_golden(golden, form):
    def run(q, k, v, i, f, h0=None, n0=None, m0=None):
        state = None if h0 is None else (torch.cat((h0, n0[..., None]), -1).unsqueeze(1), m0.unsqueeze(1))
        tokens = (x.unsqueeze(1) for x in (q, k, v, i, f))
        o, (memory, top) = mlstm(*tokens, initial_state=state, return_final_state=True)
        return o.squeeze(1), memory[:, 0, ..., :-1], memory[:, 0, ..., -1], top.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("i, f", [(-200.0, -200.0), (200.0, -200.0), (-200.0, 200.0), (80.0, 0.0), (-1e4, 0.0)])
def test_delicate_gates(i, f):
    """Finite in float32, forward and backward, and the numbers of the definition in float64; with positive queries and
    keys, since a denominator |q . n| that is near 0 by chance enlarges what rounding does."""
    inputs = case("mlstm").make(routes=1, length=70, without=["memory", "top"])
    inputs |= {"i": i * inputs["i"].sigmoid(), "f": f * inputs["f"].sigmoid()}
    inputs |= {key: inputs[key].sigmoid() for key in "qk"}
    want = results(case("mlstm"), "reference", inputs)
    for form in FORMS:
        same(results(case("mlstm"), form, bits(inputs, torch.float32)), want, 1e-4, floor=1)


def test_a_state_in_another_scale_is_the_same_state():
    """Up to the 1e-6 in the denominator."""
    inputs = case("mlstm").make(length=20)
    memory, top = inputs.pop("memory"), inputs.pop("top")
    shift = torch.rand_like(top)
    other = memory * torch.exp(-shift)[..., None, None], top + shift
    got, want = (mlstm(**inputs, initial_state=state) for state in (other, (memory, top)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, want)


def test_an_incomplete_state_is_refused():
    inputs = case("mlstm").make(length=5, without=["memory", "top"])
    with pytest.raises(ValueError, match=r"mlstm: initial_state is a tuple \(memory, top\), got Tensor"):
        mlstm(**inputs, initial_state=torch.zeros(2, 2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"tuple \(memory, top\), got 1 tensors"):
        mlstm(**inputs, initial_state=(torch.zeros(2, 2, 2, 4, 4),))
