"""The Triton kernels of bi_wkv: in Triton's interpreter against the float64 definition, and compiled for GPUs that are
not there. (Those of wkv6 are gla's: test_triton_gla.)"""

from importlib import import_module

import pytest
import torch

from linescan.scans import bi_wkv
from linescan.scans.recurrence import backend

from .tools import noise, table
from .triton_tools import CALLS, compiled, in_interpreter, outside_interpreter

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(B, Kt, K, L, D):
    return dict(k=noise(B, Kt, L, D), v=noise(B, Kt, L, D), w=0.1 * noise(K, D), u=noise(K, D))


def results(name, inputs, route, merge):
    """The output, and the gradients of a mix of it."""
    inputs = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    with backend(name):
        output = bi_wkv(**inputs, route=route, merge=merge)
        weight = torch.cos(torch.arange(output.numel())).reshape(output.shape)
        grads = torch.autograd.grad(
            (output.double() * weight).sum(), list(inputs.values()), allow_unused=True, materialize_grads=True
        )
    return {"output": output} | {f"gradient of {key}": grad for key, grad in zip(inputs, grads)}


def compare(inputs, route=None, merge=None, dtype=torch.float32, tolerance=None):
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    want = results("reference", {key: x.double() for key, x in inputs.items()}, route, merge)
    got = results("triton", inputs, route, merge)
    for key, exact in want.items():
        assert got[key].dtype == dtype and got[key].shape == exact.shape
        gap = ((got[key].double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)).item()
        assert gap <= (tolerance or TOLERANCE[dtype]), f"{key} differs by {gap:.1e}"


@pytest.fixture
def short_tiles(monkeypatch):
    """Several tiles in a short sequence."""
    kernels = import_module("linescan.scans.kernels.triton.bi_wkv")
    monkeypatch.setattr(kernels, "TILE", 2)
    monkeypatch.setattr(kernels, "TILE_BACKWARD", 2)


@in_interpreter
@pytest.mark.parametrize("kind, merge, dtype, shared", CALLS, ids=str)
def test_is_the_definition(short_tiles, kind, merge, dtype, shared):
    torch.manual_seed(0)
    B, K, L = 2 if kind == "per_sample" else 1, 2, 5
    compare(make(B, 1 if shared else K, K, L, 5), table(kind, B, K, L), merge, dtype)


@in_interpreter
def test_a_whole_tile_and_more_channels_than_a_program_has():
    torch.manual_seed(0)
    compare(make(1, 1, 1, 17, 33))


@in_interpreter
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest(short_tiles, length):
    torch.manual_seed(0)
    compare(make(1, 1, 1, length, 2))


@in_interpreter
def test_keys_and_decays_of_any_size(short_tiles):
    """Weights between e^-900 and e^900, decays that grow, vanish or forget all at once."""
    torch.manual_seed(0)
    inputs = make(1, 1, 1, 14, 4)
    inputs["k"] *= 300
    inputs["w"] = torch.tensor([[-3.0, 0.0, 1e-3, 200.0]], dtype=torch.float64)
    compare(inputs, tolerance=1e-3)  # an exponent of 1000 in float32 is good to 6e-5; the definition itself has 4e-3


# -- compiled for GPUs that are not there -----------------------------------------------------------------------------


def launches():
    """Every kernel, forward and backward, without a table. (wkv4, of the same kernels, is compiled with one.)"""
    results("triton", {key: x.bfloat16() for key, x in make(1, 2, 2, 100, 64).items()}, None, None)


@outside_interpreter
@pytest.mark.slow
def test_compiles():
    for _, kernels in compiled("tests.scans.test_triton_wkv:launches"):
        assert {kernel["name"] for kernel in kernels} == {"_totals", "_carry", "_read", "_gradients"}
