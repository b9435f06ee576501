"""The C++ kernels against the sequential float64 definitions, on every instruction set that this machine has."""

import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from linescan.engine.processes import threads
from linescan.layers.rwkv import QuadShift
from linescan.scans import (
    backend,
    bi_wkv,
    causal_conv1d,
    delta_rule,
    dplr,
    gated_delta_rule,
    gla,
    hgrn,
    kda,
    linear_attention,
    recurrences,
    selective_scan,
    simple_gla,
    ssd,
    visits,
    wkv4,
    wkv6,
)
from linescan.scans.kernels import backend_info, cpu
from linescan.scans.multi_route import ChannelAttention

compiled = pytest.mark.skipif(cpu.missing() is not None, reason=f"CPU kernels {cpu.missing()}")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def dirty_memory():
    """New tensors hold NaN until something is written into them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=list(cpu.LANES))
def instructions(request):
    """Runs a test with the instruction set capped at each level."""
    before = cpu.instruction_set()
    if cpu.instruction_set(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    cpu.instruction_set(before)


@pytest.fixture
def sets():
    """All instruction sets that this processor has, for tests whose expected results take longer than the kernels."""
    before = cpu.instruction_set()
    yield [name for name in cpu.LANES if cpu.instruction_set(name) == name]
    cpu.instruction_set(before)


def orders(routes, length, kind, batch=2):
    """Route tables: permutations, with padding and repeats, or one for every sample."""
    generator = torch.Generator().manual_seed(length)
    shape = (batch, routes) if kind == "per sample" else (routes,)
    table = torch.rand(*shape, length, generator=generator).argsort(-1)
    if kind == "padded":
        table[..., 1 : length // 3] = -1  # tokens that no step writes, steps that read nothing
        again = torch.randint(0, length, (*shape, 3), generator=generator)
        table = torch.cat((-2 - again, table, torch.full((*shape, 2), -1)), -1)
    return None if kind == "none" else table


def scan_inputs(batch, routes, length, channels, groups, state, extras=True, shared=True):
    """Float64 inputs; `shared`: one u, z and C for all routes."""
    generator = torch.Generator().manual_seed(channels + state)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = 1 if shared else routes
    inputs = dict(
        u=normal(batch, own, length, channels),
        delta=normal(batch, routes, length, channels),
        A=-4 * torch.rand(routes, channels, state, generator=generator, dtype=torch.float64),
        B=normal(batch, routes, length, groups, state),
        C=normal(batch, own, length, groups, state),
    )
    if extras:
        inputs |= dict(
            D=normal(routes, channels),
            z=normal(batch, own, length, channels),
            delta_bias=normal(routes, channels) - 1,
            initial_state=normal(batch, routes, channels, state),
        )
    return inputs


def conv_inputs(batch, routes, length, channels, width, extras=True, shared=True):
    generator = torch.Generator().manual_seed(channels + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = dict(x=normal(batch, 1 if shared else routes, length, channels), weight=normal(routes, channels, width))
    if extras:
        inputs |= dict(bias=normal(routes, channels), initial_state=normal(batch, routes, channels, width - 1))
    return inputs


def results(function, inputs, name, dispatcher=False, **options):
    """Output, final state and all gradients with the implementation `name`."""
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    with backend(name, dispatcher=dispatcher):
        output, state = function(**leaves, **options, return_final_state=True)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (output, state)]
        grads = torch.autograd.grad([output, state], list(leaves.values()), weights)
    return dict(zip(("output", "state", *leaves), (output, state, *grads)))


PARAMETERS = ("A", "D", "delta_bias", "delta_weight", "dt_bias", "weight", "bias", "initial_state")


def assert_agrees(function, inputs, dtype=torch.float32, sets=("",), **options):
    """The kernel, with each of the instruction sets, agrees with the definition in float64."""
    parameters = {key for key in inputs if key in PARAMETERS or (key in "uw" and inputs[key].ndim < 4)}
    rounded = {key: x.to(torch.float32 if key in parameters else dtype) for key, x in inputs.items()}
    expected = results(function, {key: x.double() for key, x in rounded.items()}, "reference", **options)
    for name in sets:
        cpu.instruction_set(name)
        for key, got in results(function, rounded, "cpu", **options).items():
            wanted = rounded[key].dtype if key in rounded else torch.float32 if key == "state" else dtype
            assert got.dtype == wanted, key
            error = (got.double() - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-3)
            assert error < TOLERANCE[dtype], f"{name} {key}: relative error {error:.1e}"


def relative_errors(function, inputs, expected, sets):
    """With each of the instruction sets: for every result a name, what the kernel gives, and how far off that is."""
    for name in sets:
        cpu.instruction_set(name)
        for key, got in results(function, inputs, "cpu").items():
            yield name, key, got, (got - expected[key]).abs().max() / expected[key].abs().max()


# -- the selective scan -----------------------------------------------------------------------------------------------

SCANS = [
    # batch, routes, length, channels, groups, state, extras, shared, route, merge
    (1, 1, 1, 1, 1, 1, True, True, "none", None),
    (2, 1, 37, 20, 1, 16, True, True, "none", None),
    (2, 3, 35, 17, 1, 3, True, True, "permuted", "sum"),
    (2, 2, 21, 3, 3, 8, False, False, "padded", None),
    (2, 2, 21, 24, 2, 5, True, False, "per sample", "sum"),
    (2, 2, 19, 70, 1, 16, True, True, "padded", "sum"),
    (1, 2, 140, 40, 1, 64, False, True, "permuted", None),  # long enough for the backward to keep states in segments
    (1, 2, 132, 48, 2, 66, True, False, "padded", "sum"),
    (1, 1, 33, 384, 1, 16, True, True, "none", None),
    (2, 4, 18, 48, 1, 1, True, True, "permuted", "sum"),
    (2, 2, 9, 6, 1, 23, True, True, "none", "sum"),
    (2, 3, 70, 40, 2, 3, True, True, "padded", None),  # a gate that is opened for all routes, in two slabs
    (1, 2, 66, 32, 1, 4, True, True, "permuted", None),  # the same, read where it stands
]


@compiled
@pytest.mark.parametrize("case", SCANS, ids=str)
def test_selective_scan(case, sets):
    *sizes, extras, shared, kind, merge = case
    batch, routes, length = sizes[:3]
    options = dict(route=orders(routes, length, kind, batch), merge=merge, delta_softplus=extras)
    inputs = scan_inputs(*sizes, extras=extras, shared=shared)
    if not extras:
        inputs["delta"] = inputs["delta"].abs()
    assert_agrees(selective_scan, inputs, sets=sets, **options)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, rank, own, weights", [("none", 1, 2, 1), ("permuted", 12, 2, 2), ("padded", 17, 1, 2)])
def test_selective_scan_of_low_rank(kind, rank, own, weights, dtype, sets):
    """Step sizes that the kernel makes: from numbers that routes share or not, by one weight or one per route."""
    inputs = scan_inputs(2, 2, 37, 70, 1, 16)
    generator = torch.Generator().manual_seed(rank)
    low = torch.randn(2, own, 37, 2 * rank, generator=generator, dtype=torch.float64)[..., rank:]
    weight = torch.randn(weights, 70, rank, generator=generator, dtype=torch.float64) / rank
    inputs |= dict(delta=low, delta_weight=weight)
    assert_agrees(selective_scan, inputs, dtype, sets, route=orders(2, 37, kind), merge="sum", delta_softplus=True)


@compiled
@pytest.mark.parametrize("merge", [None, "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selective_scan_half(dtype, merge, sets):
    inputs = scan_inputs(2, 2, 24, 37, 1, 16)
    route = orders(2, 24, "padded").int()
    assert_agrees(selective_scan, inputs, dtype, sets, route=route, merge=merge, delta_softplus=True)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_half_precision_are_read_in_place(dtype, monkeypatch, instructions):
    """As a model in half precision has them; what brings inputs into shape is not called."""
    monkeypatch.setattr(cpu, "_scan_inputs", None)
    monkeypatch.setattr(cpu, "_conv_inputs", None)
    for function, inputs in (
        (partial(selective_scan, delta_softplus=True), scan_inputs(2, 2, 40, 20, 1, 5)),
        (causal_conv1d, conv_inputs(2, 2, 40, 20, 4, shared=False)),
    ):
        half = {key: x.to(dtype) for key, x in inputs.items()}
        wide = half | {key: half[key].float() for key in half if key in PARAMETERS}
        for got, want in zip(function(**half, return_final_state=True), function(**wide, return_final_state=True)):
            assert got.equal(want) and got.isfinite().all()


@compiled
def test_strided_inputs_are_read_in_place():
    """Halves of one tensor, numbers that are not neighbours, a table of int16, one route's gradient spread over all."""
    inputs = {key: x.float() for key, x in scan_inputs(2, 2, 30, 32, 1, 4).items()}
    both = torch.cat((inputs["u"], inputs["z"]), -1)
    views = inputs | dict(
        u=both[..., :32],
        z=both[..., 32:],
        delta=inputs["delta"].mT.contiguous().mT,
        A=inputs["A"].mT.contiguous().mT,
        B=torch.stack((inputs["B"], inputs["B"]), -1)[..., 0],
    )
    route = orders(2, 30, "padded")
    expected = results(selective_scan, inputs, "cpu", delta_softplus=True, route=route)
    for key, got in results(selective_scan, views, "cpu", delta_softplus=True, route=route.short()).items():
        assert torch.equal(got, expected[key]), key
    leaf = inputs["u"].clone().requires_grad_()
    selective_scan(**(inputs | dict(u=leaf)), delta_softplus=True, merge="sum").sum().backward()  # an expanded gradient
    with backend("chunked"):
        other = inputs["u"].clone().requires_grad_()
        selective_scan(**(inputs | dict(u=other)), delta_softplus=True, merge="sum").sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


# -- the causal convolution -------------------------------------------------------------------------------------------

CONVS = [
    # batch, routes, length, channels, width, extras, shared, route, merge, activation
    (1, 1, 1, 1, 4, True, True, "none", None, "silu"),
    (2, 1, 70, 17, 4, True, True, "none", None, "silu"),
    (2, 3, 35, 3, 3, True, True, "permuted", "sum", None),
    (2, 2, 66, 64, 4, False, False, "padded", None, "silu"),
    (2, 2, 21, 130, 2, True, False, "per sample", "sum", "silu"),
    (1, 2, 5, 20, 9, True, False, "none", "sum", "silu"),  # the window reaches back before the first token
    (1, 1, 140, 384, 5, False, True, "none", None, None),
    (1, 2, 20, 420, 4, True, True, "permuted", None, "silu"),  # blocks of channels of two widths
    (1, 2, 258, 20, 4, True, False, "permuted", None, "silu"),  # the last slab of time is shorter than the window
]


@compiled
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_causal_conv1d(case, sets):
    *sizes, extras, shared, kind, merge, activation = case
    batch, routes, length = sizes[:3]
    options = dict(route=orders(routes, length, kind, batch), merge=merge, activation=activation)
    assert_agrees(causal_conv1d, conv_inputs(*sizes, extras=extras, shared=shared), sets=sets, **options)


@compiled
def test_the_state_of_one_tap_has_no_numbers():
    inputs = {key: x.float() for key, x in conv_inputs(1, 1, 3, 5, 1, extras=False).items()}
    got, expected = (results(causal_conv1d, inputs, name) for name in ("cpu", "reference"))
    for key in ("output", "x", "weight"):
        torch.testing.assert_close(got[key], expected[key])


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causal_conv1d_half(dtype, sets):
    inputs = conv_inputs(2, 2, 40, 37, 4)
    assert_agrees(causal_conv1d, inputs, dtype, sets, route=orders(2, 40, "padded"), merge="sum", activation="silu")


# -- matrix states ----------------------------------------------------------------------------------------------------


def heads(name, batch=2, routes=2, length=37, heads=2, keys=16, values=32, shared=True, decay=-1.0):
    """A recurrence and its float64 inputs; `shared`: one set of queries, keys and values for all routes.

    Log decays lie between 0 and `decay`; keys of the delta rules have norm 1.
    """
    generator = torch.Generator().manual_seed(keys + values)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def token(*shape, own=not shared):
        return normal(batch, routes if own else 1, length, *shape)

    def unit():
        return F.normalize(token(heads, keys), dim=-1)

    def gate(*shape):
        return decay * torch.rand(batch, routes, length, heads, *shape, generator=generator, dtype=torch.float64)

    normalize = name == "linear_attention, normalised"
    inputs = {
        "q": token(heads, keys),
        "k": token(heads, keys),
        "v": token(heads, values, own=True),
        "initial_state": normal(batch, routes, heads, keys, values + normalize),
    }
    if name == "gla":
        return gla, inputs | {"g": gate(keys)}
    if name == "simple_gla":
        return simple_gla, inputs | {"g": gate()}
    if name == "wkv6":
        inputs["r"] = inputs.pop("q")
        return wkv6, inputs | {"w": gate(keys), "u": normal(routes, heads, keys)}
    if name == "delta_rule":
        return delta_rule, inputs | {"k": unit(), "beta": gate() / decay}
    if name == "gated_delta_rule":
        return gated_delta_rule, inputs | {"k": unit(), "g": gate(), "beta": gate() / decay}
    if name == "kda":
        return kda, inputs | {"k": unit(), "g": gate(keys), "beta": gate() / decay}
    if name == "dplr":
        return dplr, inputs | {"a": unit() / 2, "b": unit() / 2, "g": gate(keys)}
    if normalize:
        positive = {key: x.abs() + 0.1 if key != "v" else x for key, x in inputs.items()}
        return partial(linear_attention, normalize=True), positive
    if name == "linear_attention":
        return linear_attention, inputs
    groups = max(1, heads // 2)
    inputs = {
        "x": token(heads, values),
        "dt": token(heads, own=True),
        "A": gate()[0, :, 0] * 2,
        "B": token(groups, keys),
        "C": token(groups, keys),
        "D": normal(routes, heads),
        "dt_bias": normal(routes, heads) - 1,
        "initial_state": inputs["initial_state"],
    }
    if name == "ssd, gated":
        inputs["z"] = token(heads, values)
    return partial(ssd, dt_softplus=True, dt_limit=(0.01, 2.0)), inputs


MATRICES = [
    "gla",
    "simple_gla",
    "ssd",
    "ssd, gated",
    "linear_attention",
    "linear_attention, normalised",
    "wkv6",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "dplr",
]
SHAPES = [
    # batch, routes, length, heads, keys, values, shared, route, merge
    (1, 1, 1, 1, 2, 1, True, "none", None),
    (2, 2, 37, 2, 16, 32, True, "none", "sum"),
    (2, 3, 35, 4, 17, 33, True, "padded", "sum"),
    (2, 2, 131, 2, 32, 32, False, "permuted", None),  # more than a piece of time
    (2, 2, 70, 4, 5, 16, True, "per sample", "sum"),
    (1, 1, 66, 2, 70, 270, True, "padded", None),  # more than a tile of coefficients, and small pieces of time
    (1, 2, 3, 1, 32, 48, False, "none", None),  # less than a block
]


@compiled
@pytest.mark.parametrize("name", MATRICES)
def test_matrix_states(name, sets):
    for *sizes, shared, kind, merge in SHAPES:
        function, inputs = heads(name, *sizes, shared=shared)
        route = orders(sizes[1], sizes[2], kind, sizes[0])
        assert_agrees(function, inputs, sets=sets, route=route, merge=merge)


@compiled
@pytest.mark.parametrize("name", MATRICES)
def test_matrix_states_half(name, sets):
    function, inputs = heads(name, length=24, keys=20)
    for dtype in (torch.bfloat16, torch.float16):
        assert_agrees(function, inputs, dtype, sets, route=orders(2, 24, "padded").int(), merge="sum")


@compiled
@pytest.mark.parametrize("name", ["gla", "simple_gla", "wkv6", "gated_delta_rule", "kda", "dplr"])
def test_delicate_decays_of_matrix_states(name, sets):
    """Long memories and strong decays, over a long sequence: exp of a negated sum of 64 of them would overflow."""
    for decay in (-1e-4, -5.0, -50.0, -1e4):
        function, inputs = heads(name, 1, 1, 300, 2, 16, 16, decay=decay)
        assert_agrees(function, inputs, sets=sets)


@compiled
@pytest.mark.parametrize("function", [gla, simple_gla])
def test_a_slow_decay_of_many_tokens_is_exact(function, instructions):
    """All roundings of a constant decay have one sign, and would add up to a hundred times the last digit."""
    tokens = torch.zeros(1, 1, 4096, 1, 16)
    gate = torch.full_like(tokens if function is gla else tokens[..., 0], -3e-5)
    state = torch.ones(1, 1, 1, 16, 16)
    with backend("cpu"):
        _, last = function(tokens, tokens, tokens, gate, initial_state=state, return_final_state=True)
    exact = (4096 * gate.double().flatten()[0]).exp()
    assert (last / exact - 1).abs().max() < 1e-6


@compiled
@pytest.mark.parametrize("name", ["gla", "simple_gla", "wkv6", "kda", "dplr"])
def test_small_gradients_of_decays_have_their_digits(name, sets):
    """Of a gate that lets nearly nothing through, too, though what is read and written beside it is large."""
    function, inputs = heads(name, 1, 1, 40, 1, 16, 16)
    gate = "w" if name == "wkv6" else "g"
    inputs[gate] = (
        torch.where(torch.arange(40) % 5 == 2, -14.0, -0.1).double()[:, None, None].expand(40, 1, 16)[None, None]
    )
    if name == "simple_gla":
        inputs[gate] = inputs[gate][..., 0]
    inputs = {key: x.float() for key, x in inputs.items()}
    expected = results(function, {key: x.double() for key, x in inputs.items()}, "reference")[gate][0, 0, 2::5]
    for instructions in sets:
        cpu.instruction_set(instructions)
        got = results(function, inputs, "cpu")[gate][0, 0, 2::5]
        assert expected.abs().max() < 1e-3 and (got - expected).abs().max() < 1e-5 * expected.abs().max()


@compiled
@pytest.mark.parametrize("name", ["gla", "wkv6", "kda", "dplr"])
def test_a_decay_of_minus_infinity_forgets(name, instructions):
    function, inputs = heads(name, 1, 1, 9, 1, 16, 16)
    inputs = {key: x.float() for key, x in inputs.items()}
    gate = "w" if name == "wkv6" else "g"
    inputs[gate][:, :, 4] = -torch.inf
    got = results(function, inputs, "cpu")
    assert all(x.isfinite().all() for x in got.values())
    if name != "dplr":  # which writes what it read before the decay
        tail = {key: x[:, :, 4:] if key not in ("initial_state", "u") else x for key, x in inputs.items()}
        empty = torch.zeros_like(inputs["initial_state"])
        again = results(function, tail | {"initial_state": empty}, "cpu")
        assert torch.equal(again["state"], got["state"])


@compiled
def test_matrix_states_are_read_in_place():
    """Queries, keys and values out of one tensor, gates with the routes among the channels, a gradient of one row."""
    _, inputs = heads("gla", 2, 2, 30, 2, 16, 16)
    inputs = {key: x.float() for key, x in inputs.items()} | {"v": inputs["v"][:, :1].float()}
    packed = torch.cat([inputs[key] for key in "qkv"], -1).flatten(3)
    q, k, v = packed.unflatten(3, (2, 48)).split(16, -1)
    gates = inputs["g"].transpose(1, 2).contiguous().transpose(1, 2)
    route = orders(2, 30, "padded")
    expected = results(gla, inputs, "cpu", route=route)
    for key, got in results(gla, inputs | {"q": q, "k": k, "v": v, "g": gates}, "cpu", route=route.short()).items():
        assert torch.equal(got, expected[key]), key
    leaf, other = (inputs["q"].clone().requires_grad_() for _ in range(2))
    gla(**inputs | {"q": leaf}, merge="sum").sum().backward()  # an expanded gradient
    with backend("chunked"):
        gla(**inputs | {"q": other}, merge="sum").sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("name", ["gla", "linear_attention, normalised", "kda"])
def test_pieces_of_a_long_sequence(name, sets):
    function, inputs = heads(name, 1, 1, 4200, 1, 4, 4)
    expected = results(function, inputs, "chunked")
    inputs = {key: x.float() for key, x in inputs.items()}
    for name, key, _, error in relative_errors(function, inputs, expected, sets):
        assert error < 1e-5, f"{name} {key}: relative error {error:.1e}"


S6 = partial(selective_scan, delta_softplus=True), scan_inputs(1, 2, 140, 40, 1, 64)
# Of each recurrence a call of several pieces of time, and the shapes of what its forward leaves to its backward.
LEFT = {
    "selective_scan": (*S6, [(1, 2, 2, 40, 64)]),
    "linear_attention": (
        *heads("linear_attention, normalised", 1, 2, 140, 2, 32, 33),
        [(1, 2, 2, 1, 32, 34), (1, 2, 2, 0, 0)],
    ),
    "gated_delta_rule": (*heads("kda", 1, 2, 140, 2, 32, 33), [(1, 2, 2, 1, 32, 33), (1, 2, 2, 144, 48)]),
    "ssd": (*heads("ssd, gated", 1, 2, 140, 2, 32, 33), []),  # whose backward makes the outputs before their gate again
}


@compiled
@pytest.mark.parametrize("name", LEFT)
def test_what_a_forward_leaves_to_its_backward(name, monkeypatch):
    function, inputs, shapes = LEFT[name]
    inputs = {key: x.float().requires_grad_() for key, x in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        function(**inputs)
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    assert [tuple(x.shape) for x in saved if x.untyped_storage().data_ptr() not in given] == shapes
    eager = results(function, inputs, "cpu")
    for key, got in results(function, inputs, "cpu", dispatcher=True).items():  # operators of graphs leave nothing
        assert torch.equal(got, eager[key]), key

    def no_room(*args):
        raise AssertionError("room for nothing")

    monkeypatch.setattr(recurrences()[name].implementations["cpu"], "room", no_room)
    function(**{key: x.detach() for key, x in inputs.items()})
    for mode in torch.no_grad(), torch.inference_mode():
        with mode:
            function(**inputs)
    with pytest.raises(AssertionError, match="room for nothing"):
        function(**inputs)


# -- vector states ----------------------------------------------------------------------------------------------------


def both_sides(return_final_state, **inputs):
    y = bi_wkv(**inputs)
    return y, y.sum(dtype=torch.promote_types(y.dtype, torch.float32))


def from_nothing(return_final_state, **inputs):
    """WKV-4 whose states have no gradient: what does without them has shorter ways."""
    y, state = wkv4(**inputs, return_final_state=True)
    return y, state.detach() + 0 * y.sum()


def channels(name, batch=2, routes=2, length=37, dim=20, shared=True, size=1.0):
    """A recurrence and its float64 inputs; gates and keys are of the given size."""
    generator = torch.Generator().manual_seed(dim + length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = 1 if shared else routes
    if name == "hgrn":
        inputs = {"x": normal(batch, own, length, dim), "g": -size * normal(batch, routes, length, dim).abs()}
        return hgrn, inputs | {"initial_state": normal(batch, routes, dim)}
    tokens = {"k": size * normal(batch, own, length, dim), "v": normal(batch, routes, length, dim)}
    rates = {"w": 0.3 * normal(routes, dim).exp(), "u": normal(own, dim)}
    if name == "bi_wkv":
        return both_sides, tokens | rates
    if name == "wkv4 from nothing":
        return from_nothing, tokens | rates
    state = normal(batch, routes, dim, 3)
    state[..., 1].exp_()
    return wkv4, tokens | rates | {"initial_state": state}


WKV = ["wkv4", "wkv4 from nothing", "bi_wkv"]
VECTORS = ["hgrn", *WKV]


@compiled
@pytest.mark.parametrize("name", VECTORS)
def test_vector_states(name, sets):
    for *sizes, kind, merge in [
        # batch, routes, length, channels, shared, route, merge
        (1, 1, 2, 1, True, "none", None),
        (2, 2, 37, 20, True, "none", "sum"),
        (2, 3, 70, 130, True, "padded", "sum"),
        (2, 2, 131, 17, False, "permuted", None),
        (2, 2, 30, 64, False, "per sample", "sum"),
    ]:
        function, inputs = channels(name, *sizes)
        assert_agrees(function, inputs, sets=sets, route=orders(sizes[1], sizes[2], kind, sizes[0]), merge=merge)


@compiled
@pytest.mark.parametrize("name", VECTORS)
def test_vector_states_half(name, sets):
    function, inputs = channels(name, length=24)
    for dtype in (torch.bfloat16, torch.float16):
        assert_agrees(function, inputs, dtype, sets, route=orders(2, 24, "padded").int(), merge="sum")


@compiled
def test_delicate_gates_of_vector_states(sets):
    for size in (1e-4, 50.0, 1e4):
        function, inputs = channels("hgrn", 1, 1, 300, 16, size=size)
        assert_agrees(function, inputs, sets=sets)


@compiled
@pytest.mark.parametrize("name", WKV)
def test_keys_of_any_size(name, sets):
    """Their exponentials overflow; and sums that decay for long do not drift, be the exponent beside them large."""
    for size in (50.0, 1e4):
        function, inputs = channels(name, 1, 1, 300, 16, size=size)
        inputs = {key: x.float() for key, x in inputs.items()}
        expected = results(function, {key: x.double() for key, x in inputs.items()}, "reference")
        for instructions in sets:
            cpu.instruction_set(instructions)
            got = results(function, inputs, "cpu")
            assert all(x.isfinite().all() for x in got.values())
            for key in ("output", "state", "u", *("v" if size == 50 else "")):
                error = (got[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-3)
                assert error < 1e-6, f"{instructions} {size} {key}: relative error {error:.1e}"


@compiled
@pytest.mark.parametrize("name", WKV[1:])
@pytest.mark.parametrize("token", [3, 40, 99])
def test_sums_that_can_and_cannot_be_plain(name, token, sets):
    """In one tensor: exponents on either side of the border, from the first chunk on, in the middle or at the end."""
    function, inputs = channels(name, 1, 1, 100, 112)
    k, w, u = (inputs[key] for key in "kwu")
    inputs["v"] += 1
    for channel, exponent in ((5, 29.9), (20, -29.9), (40, 30.1), (60, -30.1), (61, 700.0), (62, -700.0)):
        k[..., token, channel] = exponent
    u[0, [70, 80]] = torch.tensor([-95.0, 45.0], dtype=u.dtype)  # 70: a first token that has nothing but itself
    u[0, 100], w[0, [90, 110]] = -26.0, torch.tensor([-0.12, -0.18], dtype=w.dtype)
    inputs = {key: x.float() for key, x in inputs.items()}
    expected = results(function, {key: x.double() for key, x in inputs.items()}, "reference")
    for name, key, got, error in relative_errors(function, inputs, expected, sets):
        limit = 2e-5 if key == "w" else 3e-6  # of sums that are differences
        assert got.isfinite().all() and error < limit, f"{name} {key}: relative error {error:.1e}"


@compiled
@pytest.mark.parametrize("name", WKV[1:])
def test_sums_of_many_tokens_do_not_drift(name, sets):
    """The decay of a token is rounded, and thousands of them pile up."""
    function, inputs = channels(name, 1, 1, 4096, 16)
    inputs["v"] += 5 * torch.linspace(-1, 1, 4096, dtype=torch.float64)[:, None]
    inputs["w"] = torch.logspace(-5, -2, 16, dtype=torch.float64)[None]
    inputs = {key: x.float() for key, x in inputs.items()}
    expected = results(function, {key: x.double() for key, x in inputs.items()}, "chunked")
    for name, key, _, error in relative_errors(function, inputs, expected, sets):
        assert key not in ("output", "v") or error < 2e-6, f"{name} {key}: relative error {error:.1e}"


# -- promises ---------------------------------------------------------------------------------------------------------


@compiled
def test_threads_do_not_change_a_bit():
    """Enough work that two threads share it; and a second run gives the same bits."""
    scan = {key: x.float() for key, x in scan_inputs(1, 2, 100, 200, 2, 40).items()}
    conv = {key: x.float() for key, x in conv_inputs(1, 2, 300, 200, 4, shared=False).items()}
    others = {name: heads(name, 1, 2, 132, 4, 32, 64) for name in MATRICES}  # two pieces of time
    others |= {name: channels(name, 1, 2, 132, 240) for name in VECTORS}
    outcomes = []
    for count in (1, 2, 3, 16, 1):
        with threads(count):
            outcomes.append(
                results(selective_scan, scan, "cpu", route=orders(2, 100, "padded"), merge="sum", delta_softplus=True)
                | {f"conv {k}": v for k, v in results(causal_conv1d, conv, "cpu", route=orders(2, 300, "none")).items()}
            )
            for name, (function, inputs) in others.items():
                inputs = {key: x.float() for key, x in inputs.items()}
                got = results(function, inputs, "cpu", route=orders(2, 132, "padded"), merge="sum")
                outcomes[-1] |= {f"{name} {key}": x for key, x in got.items()}
    for other in outcomes[1:]:
        for key, expected in outcomes[0].items():
            assert torch.equal(other[key], expected), key


@compiled
def test_accuracy_of_exp_softplus_sigmoid(instructions):
    x = torch.cat((torch.linspace(-87, 88, 200_001), torch.randn(50_000) * 1e-3, torch.tensor([0.0, -0.0])))
    for which, function, ulps in ((0, torch.exp, 1.5), (1, torch.nn.functional.softplus, 4), (2, torch.sigmoid, 3)):
        got = torch.empty_like(x)
        torch.ops.linescan_cpu.unary(which, x, got)
        exact = torch.log1p(x.double().exp()) if which == 1 else function(x.double())
        ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
        assert ((got.double() - exact).abs() / ulp).max() < ulps, function.__name__
    below = x[x <= 0]
    got = torch.empty_like(below)
    torch.ops.linescan_cpu.unary(3, below, got)
    assert (got.double() - below.double().exp()).abs().max() < 2e-7 and (got[below == 0] == 1).all()


def final_state(initial, delta, A):
    """The states (D, N) after the tokens of delta (L, D), which bring nothing in."""
    (channels, states), length = A.shape, len(delta)
    nothing, none = torch.zeros(1, 1, length, channels), torch.zeros(1, 1, length, states)
    inputs = dict(u=nothing, delta=delta[None, None], A=A[None], B=none, C=none, initial_state=initial[None, None])
    return selective_scan(**inputs, return_final_state=True)[1][0, 0]


@compiled
def test_accuracy_of_the_decays(instructions):
    torch.manual_seed(0)
    fast, slow = torch.rand(20_000), 10 ** (-6 * torch.rand(20_000))
    delta, initial = torch.cat((fast, slow))[None], 1 + torch.rand(40_000, 1)
    exact = initial.double() * torch.exp(-delta.double()).mT
    # 1.5e-7 for the product, 0.6e-7 for the result's rounding, 0.5e-7 for that of the exponent and of log2(e)
    assert (final_state(initial, delta, -torch.ones(40_000, 1)) / exact - 1).abs().max() < 2.6e-7


@compiled
def test_errors_of_many_decays_cancel(instructions):
    """A state lasts for thousands of tokens: what the decay of one is off by must have either sign."""
    rates, A = torch.logspace(-4, -1, 96), -torch.arange(1.0, 17).expand(96, 16)
    exact = torch.exp(4096 * rates.double()[:, None] * A.double())
    errors = final_state(torch.ones(96, 16), rates.expand(4096, 96), A) / exact - 1
    assert errors[exact > 1e-20].mean().abs() < 2e-5


@compiled
def test_a_state_whose_steps_are_0_stays(instructions):
    torch.manual_seed(0)
    initial = 1 + torch.rand(64, 16)
    after = final_state(initial, torch.zeros(3000, 64), -torch.rand(64, 16))
    assert (after / initial - 1).abs().max() < 1.2e-7  # one unit in the last place


@compiled
@pytest.mark.parametrize("delta, A, decay", [(3.0, -1e38, 0), (1e38, -1e38, 0), (1.0, -torch.inf, 0), (0.0, -1e38, 1)])
def test_decays_at_the_ends(instructions, delta, A, decay):
    after = final_state(torch.ones(20, 2), torch.full((1, 20), delta), torch.full((20, 2), A))
    assert (after - decay).abs().max() < 1e-36


@compiled
def test_nan_and_infinity_are_not_hidden(instructions):
    special = torch.tensor([torch.nan, -torch.inf, torch.inf, -1000.0, 1000.0])
    got = torch.empty_like(special)
    torch.ops.linescan_cpu.unary(0, special, got)
    assert got[0].isnan() and got[[1, 3]].max() < 1e-37 and got[[2, 4]].min() > 3e38
    inputs = {key: x.float() for key, x in scan_inputs(1, 1, 5, 3, 1, 2, extras=False).items()}
    inputs["delta"][0, 0, 2, 1] = torch.nan
    y = selective_scan(**inputs)[0, 0]
    assert y[2:, 1].isnan().all() and y[:2].isfinite().all() and y[:, [0, 2]].isfinite().all()


@compiled
def test_numbers_too_small_to_be_normal(instructions):
    """x86 takes long for them: kernels give 0. Torch's own stay, in all threads, and what is small in float16, too."""
    with threads(2):
        after = final_state(torch.full((2048, 16), 1e-37), torch.ones(64, 2048), -torch.full((2048, 16), 0.15))
        assert (torch.full((1 << 20,), 1e-38) * 0.1 > 0).all()
    assert (after == 0).all() or platform.machine() not in ("x86_64", "AMD64")
    small = torch.full((1, 1, 4, 16), 1e-6, dtype=torch.float16)
    assert (causal_conv1d(small, torch.ones(1, 16, 1)) == small).all()


@compiled
@pytest.mark.parametrize("entry", [5, -7])
def test_a_route_beyond_the_tokens_is_refused(entry):
    inputs = {key: x.float() for key, x in scan_inputs(1, 1, 5, 3, 1, 2).items()}
    route = torch.tensor([[0, 1, entry]])
    with pytest.raises(ValueError, match=f"entry {entry} of the route table is none of the 5 tokens"):
        selective_scan(**inputs, route=route)
    visits.declare(route, 5)  # should something say of a table what is not so, the kernel still looks
    with pytest.raises(RuntimeError, match="1 entries of a route table lie outside the 5 tokens"):
        selective_scan(**inputs, route=route)


@compiled
def test_the_kernel_is_what_serves():
    assert "C++" in backend_info()["cpu"] and "cpu: C++," in backend_info()["selective_scan"]
    inputs = {key: x.float() for key, x in scan_inputs(1, 1, 40, 8, 1, 2).items()}
    with backend("cpu"):
        forced = selective_scan(**inputs, delta_softplus=True)
    assert torch.equal(selective_scan(**inputs, delta_softplus=True), forced)
    with backend("cpu"), pytest.raises(ValueError, match="float32, bfloat16 or float16 .* got float64"):
        selective_scan(**{key: x.double() for key, x in inputs.items()})


@compiled
def test_the_kernel_serves_where_it_was_measured_to_be_faster():
    """The table is what `tools/benchmark.py kernels` measured: the chunked form's time over the kernel's."""
    measured = json.loads(Path(__file__).with_name("data").joinpath("kernels.json").read_text())["rows"]
    assert {row[0] for row in measured} == {name for name, op in recurrences().items() if "cpu" in op.implementations}
    for name, length, heads, keys, values, *ratios in measured:
        op = recurrences()[name]
        sizes = {
            "H": heads,
            "dk": keys,
            "gates": keys,
            "dv": values,
            "P": values,
            "D": heads * values,
            "N": keys,
            "G": 1,
        }
        tensors = op.layout.example(1, 1, length, without=op.layout.states, dtype=torch.float32, **sizes)
        served = op.pick("", *map(tensors.get, op.parameters), None, False)
        assert (served is op.implementations["cpu"]) == (min(ratios) > 1), (name, length, heads, keys, values)


def run(code, setting):
    environment = os.environ | {"LINESCAN_CPU_KERNELS": setting}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


CALLS = """
import torch
from linescan.scans import backend, causal_conv1d, kernels
x, weight = torch.randn(1, 1, 5, 3), torch.randn(1, 3, 4)
for _ in range(3):
    causal_conv1d(x, weight)
print(kernels.backend_info()["cpu"])
try:
    with backend("cpu"):
        causal_conv1d(x, weight)
except RuntimeError as error:
    print(error)
"""


def test_missing_kernels_are_said_once():
    outcome = run(CALLS, "off")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.count("CPU kernels are turned off") == 1
    info, error = outcome.stdout.splitlines()
    assert "chunked torch serves" in info and error == (
        "causal_conv1d: the CPU kernels are turned off by LINESCAN_CPU_KERNELS=off"
    )


@compiled
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    assert cpu._load() is None
    monkeypatch.setattr(cpu, "VERSION", cpu.VERSION + 1)
    assert "other sources" in cpu._load()


@compiled
def test_the_environment_caps_the_instruction_set(monkeypatch):
    before = cpu.instruction_set()
    monkeypatch.setenv("LINESCAN_CPU_KERNELS", "baseline")
    assert cpu._load() is None and cpu.info() == "C++, baseline"
    cpu.instruction_set(before)
    monkeypatch.setenv("LINESCAN_CPU_KERNELS", "best")
    with pytest.raises(ValueError, match="one of off, avx512, avx2, baseline; got 'best'"):
        cpu._load()


# -- between products and recurrences ---------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (1, 1)])
@pytest.mark.parametrize(
    "dim, heads, gamma, pixels, classes",
    [(22, 1, 0.25, 1, 0), (22, 2, 0.3, 1, 1), (128, 2, 0.25, 1, 1), (20, 1, 0.2, 2, 0)],
)  # fmt: skip
def test_shifts_and_blends(grid, dim, heads, gamma, pixels, classes, instructions):
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1] + classes, dim)
    mixes, added = torch.randn(3, 1, dim), torch.randn(3, *x.shape)
    near = QuadShift(heads, gamma, pixels)(x, grid)
    wanted = near + mixes[:, None] * (x - near), x + (mixes[:, None] + added) * (near - x)
    shift = grid, heads, gamma, pixels
    got = cpu.shift_blend(x, mixes, *shift, True), cpu.shift_blend(x, mixes, *shift, False, added)
    assert got[1] is added
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        x, mixes, added = (t.to(dtype) for t in (x, mixes, torch.randn(3, *x.shape)))
        exact = x.float(), mixes.float(), *shift
        wide = cpu.shift_blend(*exact, True), cpu.shift_blend(*exact, False, added.float())
        got = cpu.shift_blend(x, mixes, *shift, True), cpu.shift_blend(x, mixes, *shift, False, added)
        torch.testing.assert_close(got, tuple(blend.to(dtype) for blend in wide), rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("centred, gated", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("heads, channels", [(3, 64), (1, 80)])
def test_norms(centred, gated, heads, channels, instructions):
    torch.manual_seed(0)
    dim = heads * channels
    x, gate, (weight, bias) = torch.randn(2, 5, dim) + 3, torch.randn(2, 5, dim), torch.randn(2, dim)
    y = x.double().unflatten(-1, (heads, channels))
    y = y - y.mean(-1, keepdim=True) if centred else y
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * weight + (bias if centred else 0)
    y = y * F.silu(4 * gate.double()) if gated else y
    given = bias if centred else None, 1e-3, heads, 4 * gate if gated else None
    torch.testing.assert_close(cpu.norm(x, weight, *given).double(), y, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):  # of the result; weights as the layer has them
        torch.testing.assert_close(cpu.norm(x, weight, *given, dtype=dtype), y.to(dtype))
        half, of_bias = weight.to(dtype), bias.to(dtype) if centred else None
        wide = cpu.norm(x, half.float(), None if of_bias is None else of_bias.float(), *given[1:])
        assert cpu.norm(x, half, of_bias, *given[1:]).equal(wide)
        rows, gates = x.to(dtype), None if given[-1] is None else given[-1].to(dtype)
        exact = cpu.norm(rows.float(), weight, *given[:-1], None if gates is None else gates.float())
        got = cpu.norm(rows, weight, *given[:-1], gates)
        assert got.dtype is dtype and got.equal(exact.to(dtype))


@compiled
@pytest.mark.parametrize("spread", [0, 1e-3, 1])
def test_a_norm_of_rows_far_from_zero_is_exact(spread, instructions):
    torch.manual_seed(0)
    x, (weight, bias) = 300 + spread * torch.randn(40, 96), torch.randn(2, 96)
    exact = F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(cpu.norm(x, weight, bias, 1e-5).double(), exact, rtol=0, atol=5e-6)


@compiled
def test_rotations_and_gates_of_channels(instructions):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(2, 5, 3, 48)[..., 16:], torch.randn(2, 5, 1, 32)
    a, b = x[..., ::2], x[..., 1::2]
    turned = torch.stack((a * cos[..., ::2] - b * sin[..., ::2], b * cos[..., 1::2] + a * sin[..., 1::2]), -1)
    torch.testing.assert_close(cpu.rotate(x, cos, sin), turned.flatten(-2))
    y, merge = torch.randn(2, 3, 37, 144) + 3, ChannelAttention(144)
    with torch.no_grad():
        got = merge.gates(y)
    torch.testing.assert_close(got, merge.gates(y))


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_channel_attention(dtype, instructions):
    torch.manual_seed(0)
    y, merge = (torch.randn(2, 3, 37, 144) + 3).to(dtype), ChannelAttention(144).to(dtype)
    with torch.no_grad():
        got = merge(y)
    wanted = merge.double()(y.double())
    assert got.dtype is dtype
    assert (got - wanted).abs().max() / wanted.abs().max() < TOLERANCE[dtype] / 2


@compiled
def test_kernels_between_products_leave_the_rest_to_torch():
    x, weight = torch.randn(2, 5, 24), torch.randn(24)
    assert cpu.norm(x, weight, None, 1e-5) is None, "channels in part vectors"
    whole, of_whole = torch.randn(2, 5, 32), torch.randn(32)
    assert cpu.norm(whole, of_whole, None, 1e-5, gate=whole.bfloat16()) is None, "two dtypes"
    assert cpu.norm(whole.long(), of_whole, None, 1e-5) is None, "integers"
    assert cpu.shift_blend(x.double(), weight.double()[None, None], (1, 5), 1, 0.25, 1, True) is None
    assert cpu.shift_blend(x.bfloat16(), weight[None, None], (1, 5), 1, 0.25, 1, True) is None, "two dtypes"
    assert cpu.rotate(x.repeat(1, 1, 2), *torch.randn(2, 3, 48)) is None, "tables of other places"
