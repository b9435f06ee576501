"""Delta rules and diagonal plus low rank: golden data, hard cases of the triangular system, one family."""

import pytest
import torch

from linescan.scans import (
    comba,
    delta_rule,
    dplr,
    gated_delta_product,
    gated_delta_rule,
    gated_delta_rule_2,
    kda,
    rwkv7,
)
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, results, same

STEMS = {f.__name__: f for f in (delta_rule, gated_delta_rule, kda, dplr, rwkv7, comba, gated_delta_product)}
STEMS["gdn2"] = gated_delta_rule_2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stem", STEMS)
def test_golden(stem, form):
    function = STEMS[stem]

    def run(h0, **tokens):
        if function is gated_delta_product:
            length = tokens["q"].shape[1]
            tokens |= {name: tokens[name].unflatten(1, (length, -1)) for name in ("k", "v", "beta")}
        tokens = {name: x.unsqueeze(1) for name, x in tokens.items()}
        o, state = function(**tokens, initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    for golden in cases(f"mixer__{stem}"):
        with backend(form):
            check(golden, run)
            check(golden, run, torch.float32)


@pytest.mark.parametrize("decay", [-5.0, -100.0, -torch.inf, 0.0, "mixed"])
@pytest.mark.parametrize("name", ["gated_delta_rule", "kda", "rwkv7"])
def test_delicate_decays(name, decay):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    inputs = case(name).make(routes=1, length=150)
    gate = "w" if name == "rwkv7" else "g"
    g = inputs[gate]
    inputs[gate] = torch.where(g < g.median(), -torch.inf, -1e-3) if decay == "mixed" else torch.full_like(g, decay)
    want = results(case(name), "reference", inputs)
    for form in FORMS:
        same(results(case(name), form, bits(inputs, torch.float32)), want, 2e-5, floor=1)


@pytest.mark.parametrize("beta, tolerance", [(1.0, 1e-5), (2.0, 1e-4)])
@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "kda"])
def test_same_key_again_and_again(name, beta, tolerance):
    """The worst case of the triangular system: every token corrects, or overcorrects, the one before.

    With beta 2 and keys that are not quite of norm 1, rounding the inputs to float32 alone moves the results by 2e-5.
    """
    inputs = case(name).make(routes=1, length=150, without=["initial_state"])
    inputs["k"] = inputs["k"][:, :, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    if "g" in inputs:
        inputs["g"] = 1e-3 * inputs["g"]
    want = results(case(name), "reference", inputs)
    same(results(case(name), "chunked", bits(inputs, torch.float32)), want, tolerance, floor=1)


def test_a_key_is_answered_with_its_last_value():
    """With unit keys and beta 1 the state answers the key just written with exactly that value."""
    inputs = case("delta_rule").make(length=20)
    inputs |= {"beta": torch.ones_like(inputs["beta"]), "q": inputs["k"]}
    for form in FORMS:
        with backend(form):
            torch.testing.assert_close(delta_rule(**inputs, scale=1.0), inputs["v"])


def test_they_are_one_family():
    """gated_delta_rule without decay is delta_rule, kda with one decay per head gated_delta_rule, and kda is dplr."""
    inputs = case("kda").make(length=30)
    plain = {name: x for name, x in inputs.items() if name != "g"}
    g, beta = inputs["g"], inputs["beta"]
    torch.testing.assert_close(gated_delta_rule(**plain, g=torch.zeros_like(beta)), delta_rule(**plain))
    one = g[..., 0]
    torch.testing.assert_close(kda(**plain, g=one[..., None].expand_as(g)), gated_delta_rule(**plain, g=one))
    written = beta[..., None] * inputs["k"]
    as_dplr = dplr(
        inputs["q"], written, inputs["v"], inputs["k"] * g.exp(), -written, g, initial_state=inputs["initial_state"]
    )
    torch.testing.assert_close(as_dplr, kda(**inputs))
    erased, wrote = beta[..., None].expand_as(inputs["k"]), beta[..., None].expand_as(inputs["v"])
    unnamed = {name: x for name, x in inputs.items() if name != "beta"}
    torch.testing.assert_close(gated_delta_rule_2(**unnamed, b=erased, w=wrote), kda(**inputs))
    early = one.exp()[..., None] * inputs["k"]  # what the decayed state answers, the state before its decay answers too
    torch.testing.assert_close(comba(**plain, p=early, g=one), gated_delta_rule(**plain, g=one))


def test_two_reflections_are_a_rotation():
    """DeltaProduct with beta 2: a state in the plane of the two keys turns by twice the angle between them."""
    angle = 0.3
    k = torch.tensor([[1.0, 0.0], [torch.tensor(angle).cos(), torch.tensor(angle).sin()]], dtype=torch.float64)
    state = torch.eye(2, dtype=torch.float64).expand(1, 1, 1, 2, 2)
    q, g = torch.zeros(1, 1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    keys, beta = k[None, None, None, :, None], torch.full((1, 1, 1, 2, 1), 2.0, dtype=torch.float64)
    _, turned = gated_delta_product(
        q, keys, torch.zeros_like(keys), g, beta, initial_state=state, return_final_state=True
    )
    c, s = torch.tensor(2 * angle).cos(), torch.tensor(2 * angle).sin()
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
