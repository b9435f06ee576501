"""Linear attention, causal and global, and feature maps: golden data, and what the normaliser means."""

import pytest
import torch

from linescan.scans import based, global_linear_attention, hedgehog, hedgehog_window, linear_attention
from linescan.scans.ops.linear_attention import _taylor, hedgehog_features
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, case


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__linear_attn"), ids=str)
def test_golden(golden, form):
    def run(q, k, v, h0):
        q, k, v, h0 = (x.unsqueeze(1) for x in (q, k, v, h0))
        o, state = linear_attention(q, k, v, initial_state=h0, return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__linear_attn_normalized"), ids=str)
def test_golden_normalized(golden, form):
    def run(q, k, v):
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        o, state = linear_attention(q, k, v, normalize=True, return_final_state=True)
        return o.squeeze(1), state[:, 0, ..., :-1], state[..., -1]

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("golden", cases("mixer__noncausal_linear_attn"), ids=str)
def test_golden_global(golden):
    def run(q, k, v):
        return global_linear_attention(*(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)

    check(golden, run)
    check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", [*cases("mixer__based"), *cases("mixer__based_unnormalized")], ids=str)
def test_golden_based(golden, form):
    def run(q, k, v):
        tokens = (x.unsqueeze(1) for x in (q, k, v))
        return based(*tokens, normalize=golden.stem == "mixer__based").squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", [*cases("mixer__hedgehog"), *cases("mixer__hedgehog_fla")], ids=str)
def test_golden_hedgehog(golden, form):
    def run(q, k, v, wq, wk, bq=None, bk=None):
        heads, joint = q.shape[2], bq is not None
        if joint:  # one map for all heads, with the weights of a Linear
            wq, wk = (w.mT.expand(heads, -1, -1) for w in (wq, wk))
            bq, bk = (b.expand(heads, -1) for b in (bq, bk))
        tokens = (x.unsqueeze(1) for x in (q, k, v))
        o, state = hedgehog(*tokens, wq, wk, bq, bk, joint, eps=1e-10 if joint else 1e-12, return_final_state=True)
        return o.squeeze(1), state[:, 0, ..., :-1], state[:, 0, ..., -1]

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__lolcats_window"), ids=str)
def test_golden_window(golden, form):
    def run(q, k, v, wq, wk, factor, h0, z0):
        width = q.shape[-1] + wq.shape[-1] * 2 + v.shape[-1] + 1
        nothing = h0.new_zeros(len(q), 1, q.shape[2], golden.dims["W"], width)
        state = torch.cat((h0, z0[..., None]), -1).unsqueeze(1), nothing
        tokens = (x.unsqueeze(1) for x in (q, k, v))
        return hedgehog_window(*tokens, wq, wk, factor, golden.dims["W"], initial_state=state).squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


def test_a_window_over_everything_is_softmax_attention():
    inputs = case("hedgehog_window").make(length=20, without=["memory", "recent"])
    q, k, v = (inputs[key].transpose(2, 3) for key in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(2, 3)
    for form in FORMS:
        with backend(form):
            torch.testing.assert_close(hedgehog_window(**inputs, window=20), want)


def test_features_have_the_products_of_their_kernels():
    """Based's are those of the Taylor series; Hedgehog's halves sum to 1 each, or both together."""
    x, y = torch.randn(2, 50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = (x * y).sum(-1) * 5**-0.5
    torch.testing.assert_close((_taylor(x) * _taylor(y)).sum(-1), 1 + s + s.square() / 2)
    weight = torch.eye(5, dtype=torch.float64)[None]
    for joint in (False, True):
        features = hedgehog_features(9 * x[:, None], weight, joint=joint)
        torch.testing.assert_close(features.sum(-1), torch.full_like(features[..., 0], 2 - joint), rtol=1e-9, atol=0)
    far = torch.tensor([[[40.0, 0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    features = hedgehog_features(far, weight)
    assert features.min() == 1e-12  # e^-40 is less, and has no gradient
    assert torch.autograd.grad(features[..., 1].sum(), far)[0].eq(0).all()


def test_a_state_that_fits_without_normalization_is_refused_with_it():
    """The same shapes, another layout: that they were right before must not count."""
    q, v, state = torch.randn(1, 1, 5, 2, 4), torch.randn(1, 1, 5, 2, 3), torch.randn(1, 1, 2, 4, 3)
    linear_attention(q, q, v, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state is \(.*, dv\+normalize\) with dv\+normalize = 4, got"):
        linear_attention(q, q, v, initial_state=state, normalize=True)


def test_normalized_weights_sum_to_one():
    inputs = case("linear_attention").make(length=70, without=["initial_state"])
    q, k, ones = inputs["q"], inputs["k"], torch.ones_like(inputs["v"])
    torch.testing.assert_close(linear_attention(q, k, ones, normalize=True), ones)
    torch.testing.assert_close(global_linear_attention(q, k, ones), ones)


@pytest.mark.parametrize("normalize", [False, True])
def test_global_is_the_last_causal_token(normalize):
    """The last token of a causal pass reads the whole sequence, as every token of the global form does."""
    inputs = case("linear_attention").make(length=30, without=["initial_state"])
    whole = global_linear_attention(**inputs, normalize=normalize)
    torch.testing.assert_close(whole[:, :, -1], linear_attention(**inputs, normalize=normalize)[:, :, -1])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = {name: x[:, :, order] for name, x in inputs.items()}
    torch.testing.assert_close(global_linear_attention(**permuted, normalize=normalize), whole[:, :, order])


def test_global_half_precision():
    """Sums are taken in float32: 4096 ones, which bfloat16 could only count to 256."""
    ones = torch.ones(1, 1, 4096, 1, 1, dtype=torch.bfloat16)
    output = global_linear_attention(ones, ones, ones, normalize=False, scale=1.0)
    assert output.dtype == torch.bfloat16 and (output == 4096).all()


def test_an_empty_window_is_refused():
    inputs = case("hedgehog_window").make(length=5, without=["memory", "recent"])
    with pytest.raises(ValueError, match="hedgehog_window: window is at least 1, got 0"):
        hedgehog_window(**inputs, window=0)
