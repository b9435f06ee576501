import re

import pytest
import torch
from golden import cases, check
from properties import FORMS, LAWS, Mixer, close, gate, half_precision, operator_is_sound, padding_steps, results
from torch.utils.flop_counter import FlopCounterMode

from linescan.scans import chunks
from linescan.scans.ops import wkv as module
from linescan.scans.ops.wkv import bi_wkv, bi_wkv6, wkv4, wkv6
from linescan.scans.recurrence import backend

H, D = 2, 4
W = torch.tensor([0.0, 0.1, 0.7, 3.0], dtype=torch.float64)
U = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
U6 = torch.stack((U, -U))


def like(tokens, *parameters):
    """Parameters in the dtype that the tokens are computed in."""
    return [x.to(torch.promote_types(tokens.dtype, torch.float32)) for x in parameters]


def no_state(output):
    """What a form to both sides returns, as the laws expect it."""
    return output, output.new_zeros(1, dtype=torch.promote_types(output.dtype, torch.float32))


def channels(make):
    return dict(k=make(D), v=make(D))


def heads(make):
    return dict(r=make(H, 4), k=make(H, 4), v=make(H, 3), w=gate(make(H, 4)))


CAUSAL = [
    Mixer(lambda k, v, **options: wkv4(k, v, *like(k, W, U), **options), "wkv4", channels),
    Mixer(lambda r, k, v, w, **options: wkv6(r, k, v, w, *like(k, U6), **options), "wkv6", heads),
]


def both_sides(k, v, return_final_state=True, **options):
    return no_state(bi_wkv(k, v, *like(k, W - 0.2, U), **options))


def both_sides_6(r, k, v, w, return_final_state=True, **options):
    return no_state(bi_wkv6(r, k, v, w, *like(k, U6), **options))


BOTH = [Mixer(both_sides, "bi_wkv", channels), Mixer(both_sides_6, "wkv6", heads, name="bi_wkv6")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("mixer", CAUSAL, ids=str)
def test_law(mixer, law):
    law(mixer)


@pytest.mark.parametrize("mixer", BOTH, ids=str)
def test_laws_of_both_sides(mixer):
    for law in (padding_steps, half_precision, operator_is_sound):
        law(mixer)


def alone(tokens, b, k, order):
    return {name: x[b : b + 1, [k if x.shape[1] > 1 else 0]][:, :, order] for name, x in tokens.items()}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mixer", BOTH, ids=str)
def test_routes_of_both_sides(mixer, shared):
    """A scan along routes is permute, scan, unpermute; merged, the sum of them."""
    tokens = mixer.inputs(B=2, K=1 if shared else 2, L=11)
    table = torch.stack([torch.stack([torch.randperm(11) for _ in range(2)]) for _ in range(2)])
    for form in FORMS:
        with backend(form):
            for route in (table, table[0]):
                output, _ = mixer(tokens, route=route)
                for b in range(2):
                    for k in range(2):
                        order = route[b, k] if route.ndim == 3 else route[k]
                        close([output[b, k, order]], [mixer(alone(tokens, b, k, order))[0][0, 0]])
                close([mixer(tokens, route=route, merge="sum")[0]], [output.sum(1)])


# -- golden data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__rwkv4"), ids=str)
def test_golden_wkv4(case, form):
    def run(k, v, w, u, num0, den0, max0):
        state = torch.stack((num0, den0, max0), -1).unsqueeze(1)
        options = dict(initial_state=state, return_final_state=True)
        o, state = wkv4(k.unsqueeze(1), v.unsqueeze(1), w.exp(), u, **options)
        return o.squeeze(1), *state.squeeze(1).unbind(-1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__bi_wkv4"), ids=str)
def test_golden_bi_wkv(case, form):
    def run(k, v, w, u):
        return bi_wkv(k.unsqueeze(1), v.unsqueeze(1), w, u).squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__rwkv6"), ids=str)
def test_golden_wkv6(case, form):
    def run(r, k, v, w, u, h0):
        r, k, v, w, h0 = (x.unsqueeze(1) for x in (r, k, v, w, h0))
        o, state = wkv6(r, k, v, w, u, initial_state=h0, return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases("mixer__bi_wkv6"), ids=str)
def test_golden_bi_wkv6(case, form):
    def run(r, k, v, w, u):
        r, k, v, w = (x.unsqueeze(1) for x in (r, k, v, -w.exp()))
        return bi_wkv6(r, k, v, w, u).squeeze(1)

    with backend(form):
        check(case, run)
        check(case, run, torch.float32)


# -- Bi-WKV -----------------------------------------------------------------------------------------------------------


def dense(k, v, w, u):
    """The equation itself: a softmax over all pairs of tokens."""
    steps = torch.arange(k.shape[2])
    distance = (steps[:, None] - steps).abs()[..., None]
    exponent = torch.where(distance == 0, (u + k)[:, :, :, None], k[:, :, None] - (distance - 1) * w)
    return (exponent.softmax(3) * v[:, :, None]).sum(3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 3, 16, 50])
def test_bi_wkv_is_the_equation(form, length):
    """With its gradient, at weights that rise, stay, fall slowly and fall fast with distance."""
    k, v = torch.randn(2, 2, 1, length, 5, dtype=torch.float64).requires_grad_()
    w = torch.tensor([-0.5, 0.0, 0.02, 1.0, 8.0], dtype=torch.float64, requires_grad=True)
    u = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, length, 5, dtype=torch.float64)

    def outcome(function):
        output = function(k, v, w, u)
        return [output, *torch.autograd.grad((output * weight).sum(), (k, v, w, u), materialize_grads=True)]

    with backend(form):
        close(outcome(bi_wkv), outcome(dense))


@pytest.mark.parametrize("function", [wkv4, bi_wkv])
@pytest.mark.parametrize("axes", [(3,), (2, 3)])
def test_gradients_of_parameters(function, axes):
    """w and u of one set, or one set a route; twice in the definition."""
    k, v = torch.randn(2, 1, 2, 6, 3, dtype=torch.float64)
    w, u = torch.randn(2, *axes, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (k, v, w, u)]
    for form in FORMS:
        with backend(form):
            assert torch.autograd.gradcheck(function, inputs)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("function", [wkv6, bi_wkv6])
@pytest.mark.parametrize("axes", [(H, 2), (2, H, 2)])
def test_gradients_of_bonus(function, axes):
    tokens = torch.randn(4, 1, 2, 5, H, 2, dtype=torch.float64)
    inputs = [*tokens[:3], gate(tokens[3]), torch.randn(axes, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    for form in FORMS:
        with backend(form):
            assert torch.autograd.gradcheck(function, inputs)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("length", [16, 200, 3000])
@pytest.mark.parametrize("function", [wkv4, bi_wkv])
def test_large_keys(function, length):
    """Keys of +-60 and any decay: finite in float32, forward and backward, and the numbers of float64."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 1, length, 8, dtype=torch.float64, generator=generator)
    k = 60 * k.sign() + k
    w = torch.tensor([-5 / length, 0.0, 1 / length, 5 / length, 0.1, 1.0, 10.0, 60.0], dtype=torch.float64)
    u = torch.randn(8, dtype=torch.float64, generator=generator)
    inputs = [x.float() for x in (k, v, w, u)]

    def outcome(form, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        with backend(form):
            output = function(*leaves)
        grads = torch.autograd.grad(output.sum(), leaves)
        return [output, *grads]

    got, want = outcome("chunked", torch.float32), outcome("reference", torch.float64)
    for a, b in zip(got, want):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()
    assert (got[0] - want[0]).abs().max() <= 2e-5


def test_bi_wkv_of_a_long_sequence():
    """20000 tokens whose weights span e^120, against float64."""
    k, v = torch.randn(2, 1, 1, 20000, 4, generator=torch.Generator().manual_seed(0))
    k = k + 60 * torch.sin(torch.arange(20000) / 7)[:, None]
    w, u = torch.tensor([-10.0, 0.0, 5.0, 20000.0]) / 20000, torch.zeros(4)
    k.requires_grad_()
    output = bi_wkv(k, v, w, u)
    (gradient,) = torch.autograd.grad(output.sum(), k)
    with backend("reference"):
        want = bi_wkv(*(x.detach().double() for x in (k, v, w, u)))
    assert gradient.isfinite().all()
    close([output], [want], 1e-5)


def test_chunk_size_does_not_matter(monkeypatch):
    tokens = CAUSAL[0].inputs(L=50)
    for core, rest in ((module._wkv4_chunked, [None]), (module._bi_wkv_chunked, [])):
        want = core(*tokens.values(), W[None], U[None], *rest)[0]
        for chunk in (1, 3, 16, 50, 64):
            close([core(*tokens.values(), W[None], U[None], *rest, chunk=chunk)[0]], [want], 1e-12)
    tokens = CAUSAL[1].inputs(L=100)
    want = results(CAUSAL[1], tokens, "chunked")
    for size in (1, 8, 32, 128):
        monkeypatch.setattr(chunks, "CHUNK", size)
        close(results(CAUSAL[1], tokens, "chunked"), want)


@pytest.mark.parametrize("mixer", CAUSAL, ids=str)
def test_pieces_of_time_do_not_matter(mixer, monkeypatch):
    """States go from one piece to the next, and gradients back."""
    tokens = mixer.inputs(L=100)
    want = results(mixer, tokens, "chunked")
    monkeypatch.setattr("linescan.scans.chunks.numbers_at_a_time", lambda device: 1)
    close(results(mixer, tokens, "chunked"), want)


# -- WKV of RWKV-6 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-5.0, -100.0, -torch.inf, 0.0, "mixed"])
@pytest.mark.parametrize("mixer", [CAUSAL[1], BOTH[1]], ids=str)
def test_delicate_decays(mixer, decay):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    tokens = mixer.inputs(L=150)
    w = tokens["w"]
    tokens["w"] = torch.where(w < -3, -torch.inf, -1e-3) if decay == "mixed" else torch.full_like(w, decay)
    want = results(mixer, tokens, "reference")
    for form in FORMS:
        close(results(mixer, {name: x.float() for name, x in tokens.items()}, form), want, 1e-5)


def test_bi_wkv6_is_the_equation():
    """Between two tokens lie the decays of those strictly between them."""
    tokens = BOTH[1].inputs(B=1, L=9)
    r, k, v, w = (x[0, 0] for x in tokens.values())
    want = torch.zeros_like(v)
    for t in range(9):
        for j in range(9):
            between = w[min(t, j) + 1 : max(t, j)].sum(0).exp() if j != t else U6
            want[t] += (r[t] * between * k[j]).sum(-1, keepdim=True) * v[j]
    close([BOTH[1](tokens)[0][0, 0]], [want])


# -- bad input, cost --------------------------------------------------------------------------------------------------


def test_flops():
    tokens = CAUSAL[0].inputs(L=10)
    counts = {}
    for mixer in (CAUSAL[0], BOTH[0]):
        with FlopCounterMode(display=False) as counter:
            mixer(tokens)
        counts[mixer.op] = counter.get_total_flops()
    assert counts == {"wkv4": 2 * 10 * D * 14, "bi_wkv": 2 * 10 * D * 27}
    with FlopCounterMode(display=False) as counter:
        CAUSAL[1](CAUSAL[1].inputs(L=10))
    assert counter.get_total_flops() == 2 * 10 * H * (5 * 4 * 3 + 3 * 4 + 2 * 3)


@pytest.mark.parametrize(
    "function, changed, message",
    [
        (bi_wkv, dict(v=torch.zeros(2, 1, 5, 3)), "bi_wkv: v is (B, K, L, D) with D = 4, got (2, 1, 5, 3)"),
        (bi_wkv, dict(w=torch.zeros(3)), "bi_wkv: w is (K, D) with D = 4, got (1, 3)"),
        (bi_wkv, dict(k=torch.zeros(2, 5, 4)), "bi_wkv: k is (B, K, L, D), got 3 axes (2, 5, 4)"),
        (wkv4, dict(u=torch.zeros(2, 4)), "wkv4: u is (K, D) with K = 1, got (2, 4)"),
        (wkv4, dict(initial_state=torch.zeros(2, 1, 4, 2)), "wkv4: initial_state is (B, K, D, 3) with 3 = 3, got"),
        (wkv4, dict(merge="mean"), "wkv4: merge is None (one output a route) or 'sum', got 'mean'"),
    ],
)
def test_bad_input(function, changed, message):
    good = dict(k=torch.zeros(2, 1, 5, 4), v=torch.zeros(2, 1, 5, 4), w=torch.zeros(4), u=torch.zeros(4))
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**{**good, **changed})
