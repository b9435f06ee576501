"""WKV of RWKV-4 and RWKV-6, causal and to both sides: golden data, equations, keys and decays of any size."""

import pytest
import torch

from linescan.scans import bi_wkv, bi_wkv6, wkv4, wkv6
from linescan.scans.ops import wkv4 as module
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, bits, case, error, results, same

# -- golden data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__rwkv4"), ids=str)
def test_golden_wkv4(golden, form):
    def run(k, v, w, u, num0, den0, max0):
        state = torch.stack((num0, den0, max0), -1).unsqueeze(1)
        options = dict(initial_state=state, return_final_state=True)
        o, state = wkv4(k.unsqueeze(1), v.unsqueeze(1), w.exp(), u, **options)
        return o.squeeze(1), *state.squeeze(1).unbind(-1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__bi_wkv4"), ids=str)
def test_golden_bi_wkv(golden, form):
    def run(k, v, w, u):
        return bi_wkv(k.unsqueeze(1), v.unsqueeze(1), w, u).squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__rwkv6"), ids=str)
def test_golden_wkv6(golden, form):
    def run(r, k, v, w, u, h0):
        r, k, v, w, h0 = (x.unsqueeze(1) for x in (r, k, v, w, h0))
        o, state = wkv6(r, k, v, w, u, initial_state=h0, return_final_state=True)
        return o.squeeze(1), state.squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", cases("mixer__bi_wkv6"), ids=str)
def test_golden_bi_wkv6(golden, form):
    def run(r, k, v, w, u):
        r, k, v, w = (x.unsqueeze(1) for x in (r, k, v, -w.exp()))
        return bi_wkv6(r, k, v, w, u).squeeze(1)

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


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
        for got, want in zip(outcome(bi_wkv), outcome(dense)):
            torch.testing.assert_close(got, want)


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
    assert error(output, want, floor=1) < 1e-5


def test_scans_of_any_chunk_size():
    k, v, w, u = case("wkv4").make(length=50, without=["initial_state"]).values()
    (state,) = module._without_terms(torch.zeros(2, 2, 4, 3, dtype=torch.float64))
    for core, rest in ((module._wkv4_chunked, [state]), (module._bi_wkv_chunked, [])):
        want = core(k, v, w, u, *rest)[0]
        for chunk in (1, 3, 16, 50, 64):
            torch.testing.assert_close(core(k, v, w, u, *rest, chunk=chunk)[0], want)


@pytest.mark.parametrize(
    "function, parameters", [(wkv4, ["w", "u"]), (bi_wkv, ["w", "u"]), (wkv6, ["u"]), (bi_wkv6, ["u"])]
)
@pytest.mark.parametrize("form", FORMS)
def test_one_set_of_parameters_for_all_routes(function, parameters, form):
    """(D,) or (1, D) is the same set for every route, with one gradient."""
    inputs = case(function.__name__).make()
    for shape in (lambda x: x[0], lambda x: x[:1]):
        shared = {key: shape(x) if key in parameters else x for key, x in inputs.items()}
        full = {key: x[:1].expand_as(x) if key in parameters else x for key, x in inputs.items()}
        got, want = (results(case(function.__name__), form, x) for x in (shared, full))
        for key in parameters:
            want[f"gradient of {key}"] = want[f"gradient of {key}"].sum(0).reshape(shared[key].shape)
        same(got, want, 1e-9)


# -- WKV of RWKV-6 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-5.0, -100.0, -torch.inf, 0.0, "mixed"])
@pytest.mark.parametrize("name", ["wkv6", "bi_wkv6"])
def test_delicate_decays(name, decay):
    """Finite in float32, forward and backward, and the numbers of the definition in float64."""
    inputs = case(name).make(routes=1, length=150)
    w = inputs["w"]
    inputs["w"] = torch.where(w < -1.5, -torch.inf, -1e-3) if decay == "mixed" else torch.full_like(w, decay)
    want = results(case(name), "reference", inputs)
    for form in FORMS:
        same(results(case(name), form, bits(inputs, torch.float32)), want, 1e-5, floor=1)


def test_bi_wkv6_is_the_equation():
    """Between two tokens lie the decays of those strictly between them."""
    inputs = case("bi_wkv6").make(1, 1, 9)
    r, k, v, w = (inputs[key][0, 0] for key in "rkvw")
    want = torch.zeros_like(v)
    for t in range(9):
        for j in range(9):
            between = w[min(t, j) + 1 : max(t, j)].sum(0).exp() if j != t else inputs["u"][0]
            want[t] += (r[t] * between * k[j]).sum(-1, keepdim=True) * v[j]
    torch.testing.assert_close(bi_wkv6(**inputs)[0, 0], want)
