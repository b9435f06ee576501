import pytest
import torch
from golden import cases, check
from properties import FORMS, LAWS, Mixer, close, results

from linescan.scans import chunks
from linescan.scans.ops.linear_attention import global_linear_attention, linear_attention
from linescan.scans.recurrence import backend

H = 2


def normalized(**options):
    return linear_attention(**options, normalize=True)


def positive(make):
    return dict(q=make(H, 4).sigmoid(), k=make(H, 4).sigmoid(), v=make(H, 3))


MIXERS = [
    Mixer(linear_attention, "linear_attention", lambda make: dict(q=make(H, 4), k=make(H, 4), v=make(H, 3))),
    Mixer(normalized, "linear_attention", positive, name="normalized"),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_law(mixer, law):
    law(mixer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__linear_attn"), ids=str)
def test_golden(case, form):
    def run(q, k, v, h0):
        q, k, v, h0 = (x.unsqueeze(1) for x in (q, k, v, h0))
        o, state = linear_attention(q, k, v, initial_state=h0, return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__linear_attn_normalized"), ids=str)
def test_golden_normalized(case, form):
    def run(q, k, v):
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        o, state = linear_attention(q, k, v, normalize=True, return_final_state=True)
        return o.squeeze(1), state[:, 0, ..., :-1], state[..., -1]

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("case", cases("mixer__noncausal_linear_attn"), ids=str)
def test_golden_global(case):
    def run(q, k, v):
        return global_linear_attention(*(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)

    check(case, run)
    check(case, run, torch.float32)


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_chunk_size_does_not_matter(mixer, monkeypatch):
    tokens = mixer.inputs(L=100)
    want = results(mixer, tokens, "chunked")
    for size in (1, 8, 32, 128):
        monkeypatch.setattr(chunks, "CHUNK", size)
        close(results(mixer, tokens, "chunked"), want)


def test_a_state_that_fits_without_normalization_is_refused_with_it():
    """The same shapes, another layout: that they were right before must not count."""
    q, v, state = torch.randn(1, 1, 5, H, 4), torch.randn(1, 1, 5, H, 3), torch.randn(1, 1, H, 4, 3)
    linear_attention(q, q, v, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state is \(B, K, H, dk, 4\)"):
        linear_attention(q, q, v, initial_state=state, normalize=True)


def test_normalized_weights_sum_to_one():
    tokens = MIXERS[1].inputs(L=70)
    ones = torch.ones_like(tokens["v"])
    close([linear_attention(tokens["q"], tokens["k"], ones, normalize=True)], [ones])
    close([global_linear_attention(tokens["q"], tokens["k"], ones)], [ones])


@pytest.mark.parametrize("normalize", [False, True])
def test_global_is_the_last_causal_token(normalize):
    """The last token of a causal pass reads the whole sequence, as every token of the global form does."""
    tokens = MIXERS[1].inputs(K=2, L=30)
    whole = global_linear_attention(**tokens, normalize=normalize)
    close([whole[:, :, -1]], [linear_attention(**tokens, normalize=normalize)[:, :, -1]])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = {name: x[:, :, order] for name, x in tokens.items()}
    close([global_linear_attention(**permuted, normalize=normalize)], [whole[:, :, order]])


def test_global_half_precision():
    """Sums are taken in float32: 4096 ones, which bfloat16 could only count to 256."""
    ones = torch.ones(1, 1, 4096, 1, 1, dtype=torch.bfloat16)
    output = global_linear_attention(ones, ones, ones, normalize=False, scale=1.0)
    assert output.dtype == torch.bfloat16 and (output == 4096).all()


def test_bad_input():
    tokens = MIXERS[0].inputs(L=5)
    state = torch.zeros(2, 1, H, 4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"linear_attention: initial_state .* got \(2, 1, 2, 4, 3\)"):
        linear_attention(**tokens, normalize=True, initial_state=state)
    with pytest.raises(ValueError, match=r"global_linear_attention: v .* L = 5, got \(2, 1, 4, 2, 3\)"):
        global_linear_attention(tokens["q"], tokens["k"], tokens["v"][:, :, :4])
