"""The Triton forms of recurrences, called as their layouts say: in Triton's interpreter against the float64 definition,
and compiled for GPUs that are not there. (Those with more to test have files of their own.)"""

from importlib import import_module

import pytest
import torch

from .tools import CASES, bits, results, same, table
from .triton_tools import compiled, in_interpreter, no_stray_access, outside_interpreter  # noqa: F401  (a fixture)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
VECTORS = {"hgrn": {"_scan", "_carry", "_retreat"}, "wkv4": {"_totals", "_carry", "_read", "_gradients"}}
MATRICES = {"_solve", "_walk", "_outputs", "_gradients"}
NAMES = [*VECTORS, "linear_attention", "delta_rule", "gated_delta_rule", "kda", "dplr"]
FORMS = [case for case in CASES if case.public.name in NAMES]
CALLS = [  # every kind of route, merge and dtype, tokens that routes share or not
    ("per_sample", "sum", torch.float32, False),
    ("permutation", None, torch.bfloat16, True),
    ("padded", "sum", torch.float16, True),
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


def compare(case, inputs, route, merge, dtype, of=("output", "state")):
    inputs = bits(inputs, dtype)
    want = results(case, "reference", bits(inputs, torch.float64), route, merge, of)
    got = results(case, "triton", inputs, route, merge, of)
    assert {got["output"].dtype} == {dtype} and {got[f"final {state}"].dtype for state in case.states} == {
        torch.float32
    }
    same(got, want, TOLERANCE[dtype])


@in_interpreter
@pytest.mark.parametrize("kind, merge, dtype, shared", CALLS, ids=str)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_is_the_definition(monkeypatch, case, kind, merge, dtype, shared):
    small(monkeypatch)
    samples = 2 if kind == "per_sample" else 1
    inputs = case.make(samples, length=11, H=3 - samples)
    if shared:
        inputs = {key: x[:, :1] if key in case.tokens else x for key, x in inputs.items()}
    compare(case, inputs, table(kind, 2, 2, 11), merge, dtype)


@in_interpreter
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_the_output_alone(case):
    """In the order of the tokens, from no state, with chunks as users get them; and no gradient of the last state."""
    inputs = case.make(1, 1, 9, without=case.states)
    compare(case, inputs, None, None, torch.float32, of=("output",))


# -- compiled for GPUs that are not there -----------------------------------------------------------------------------


def launches():
    """Every kernel, in float32 along routes and in bfloat16 without."""
    for case in FORMS:
        inputs = case.make(1, 2, 100, D=96, H=2, dk=64, dv=64)
        results(case, "triton", bits(inputs, torch.float32), table("permutation", 1, 2, 100), "sum")
        results(case, "triton", bits(inputs, torch.bfloat16))


@outside_interpreter
@pytest.mark.slow
def test_compiles():
    for _, kernels in compiled("tests.scans.test_triton_forms:launches"):
        assert {kernel["name"] for kernel in kernels} >= MATRICES.union(*VECTORS.values())
