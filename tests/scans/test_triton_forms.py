"""The Triton forms of recurrences, called as their layouts say: in Triton's interpreter against the float64 definition,
and compiled for GPUs that are not there. (Those with more to test have files of their own.)"""

from importlib import import_module
from math import inf

import pytest
import torch

from linescan.scans.recurrence import backend

from .tools import CASES, bits, case, results, same, table
from .triton_tools import (
    compiled,
    in_interpreter,
    no_stray_access,  # noqa: F401  (a fixture)
    outside_interpreter,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
VECTORS = {"hgrn": {"_scan", "_carry", "_retreat"}, "wkv4": {"_totals", "_carry", "_read", "_gradients"}}
MATRICES = {"_solve", "_walk", "_outputs", "_gradients"}
NAMES = [*VECTORS, "linear_attention", "delta_rule", "gated_delta_rule", "kda", "dplr", "log_linear_attention"]
FORMS = [form for form in CASES if form.public.name in NAMES]
CALLS = [  # routes with padding and dropped visits, and those without; tokens that routes share or not
    ("per_sample", "sum", torch.float32, False),
    ("permutation", None, torch.bfloat16, True),
]


def small(monkeypatch):
    """Two chunks or more in a sequence of 11."""
    module = "linescan.scans.kernels.triton."
    for name in ("TILE", "TILE_BACKWARD"):
        monkeypatch.setattr(import_module(f"{module}bi_wkv"), name, 4)
    hgrn = import_module(f"{module}hgrn")
    monkeypatch.setattr(hgrn, "T", 2)
    monkeypatch.setattr(hgrn, "split", lambda programs, steps, multiple, device: (-(-steps // 4), 4))
    for name in ("CHUNK", "WIDTH", "DEPTH"):
        monkeypatch.setattr(import_module(f"{module}gla"), name, 16)
        monkeypatch.setattr(import_module(f"{module}dplr"), name, 16)


def compare(form, inputs, route, merge, dtype, of=("output", "state")):
    inputs = bits(inputs, dtype)
    want = results(form, "reference", bits(inputs, torch.float64), route, merge, of)
    got = results(form, "triton", inputs, route, merge, of)
    assert got["output"].dtype == dtype and got["final initial_state"].dtype == torch.float32
    same(got, want, TOLERANCE[dtype])


@in_interpreter
@pytest.mark.parametrize("kind, merge, dtype, shared", CALLS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_the_definition(monkeypatch, form, kind, merge, dtype, shared):
    small(monkeypatch)
    samples = 2 if kind == "per_sample" else 1
    inputs = form.make(samples, length=11, H=3 - samples, G=1)
    if shared:
        inputs = {key: x[:, :1] if key in form.tokens else x for key, x in inputs.items()}
    compare(form, inputs, table(kind, 2, 2, 11), merge, dtype)


@in_interpreter
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_output_alone(form):
    """In the order of the tokens, from no state, with chunks as users get them; and no gradient of the last state."""
    inputs = form.make(1, 1, 9, without=form.states)
    compare(form, inputs, None, None, torch.float32, of=("output",))


@in_interpreter
@pytest.mark.parametrize("length", [64, 70])
def test_buckets_of_many_chunks(monkeypatch, length):
    """Four chunks of 16 steps, which fill a bucket, and one more that is not full."""
    small(monkeypatch)
    form = case("log_linear_attention")
    inputs = bits(form.make(1, 1, length, G=1, H=1), torch.float32)
    with torch.no_grad(), backend("triton"):
        got = form(inputs)
    with torch.no_grad(), backend("reference"):
        want = form(bits(inputs, torch.float64))
    for x, exact in zip(got, want):
        torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-5)


@in_interpreter
@pytest.mark.parametrize("name", ["gated_delta_rule", "kda", "dplr", "hgrn"])
def test_gates_of_any_strength(monkeypatch, name):
    """From none at all to forgetting everything; and equal keys that are corrected twice over, which powers of the
    triangular matrix, other than its inverse, would not survive."""
    small(monkeypatch)
    monkeypatch.setattr(import_module("linescan.scans.kernels.triton.dplr"), "CHUNK", 32)
    torch.manual_seed(0)
    inputs = case(name).make(1, 1, 35, H=1)
    strength = torch.tensor([0.0, 1e-3, 100.0, 1e4, inf], dtype=torch.float64)
    inputs["g"] = inputs["g"].clamp_max(-1e-6) * strength[(torch.rand(inputs["g"].shape) ** 3 * 5).long()]
    inputs["g"] = inputs["g"].nan_to_num(0.0, neginf=-inf)
    if "beta" in inputs:
        inputs["k"], inputs["beta"] = inputs["k"][:, :, :1].expand_as(inputs["k"]), torch.full_like(inputs["beta"], 2)
    compare(case(name), inputs, None, None, torch.float32)


@in_interpreter
def test_heads_that_are_too_wide():
    form = case("dplr")
    inputs = bits(form.make(1, 1, 2, H=1, dk=129), torch.float32)
    with backend("triton"), pytest.raises(ValueError, match="dplr: the triton kernel .* at most 128 key channels, got"):
        form(inputs)
    same(results(form, "picked", inputs), results(form, "reference", bits(inputs, torch.float64)), 1e-5)


# -- compiled for GPUs that are not there -----------------------------------------------------------------------------


def _launch(names, dtype, route=None, merge=None, width=64):
    for name in names:
        inputs = case(name).make(1, 2, 100, D=96, H=2, dk=width, dv=width)
        results(case(name), "triton", bits(inputs, dtype), route, merge)


def launches():
    """Every kernel."""
    names = *VECTORS, "dplr", "gated_delta_rule", "log_linear_attention"
    _launch(names, torch.bfloat16, table("permutation", 1, 2, 100), "sum")


def other_launches():
    """In the order of the tokens (wkv4: test_triton_wkv.py); three-part products."""
    _launch(("hgrn",), torch.bfloat16)
    _launch(("kda",), torch.float32, width=32)


def wide_launches():
    """The widest heads there is a kernel for, forward."""
    with torch.no_grad(), backend("triton"):
        case("dplr")(bits(case("dplr").make(1, 1, 64, H=1, dk=128, dv=128), torch.float32))


@outside_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    "function, names",
    [
        ("launches", MATRICES.union(*VECTORS.values(), {"_merge"})),
        ("other_launches", MATRICES | {"_scan", "_retreat"}),
        ("wide_launches", MATRICES - {"_gradients"}),
    ],
)
def test_compiles(function, names):
    for _, kernels in compiled(f"tests.scans.test_triton_forms:{function}"):
        assert {kernel["name"] for kernel in kernels} >= names
