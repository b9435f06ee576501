"""The Triton kernels of gla, simple_gla, wkv6 and ssd: in Triton's interpreter against the float64 definition, and
compiled for GPUs that are not there."""

from dataclasses import dataclass
from importlib import import_module
from math import inf
from typing import Callable

import pytest
import torch
import torch.nn.functional as F

from linescan.scans import gla, simple_gla, ssd, wkv6
from linescan.scans.recurrence import backend

from .tools import table
from .triton_tools import CALLS, compiled, in_interpreter, outside_interpreter

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@dataclass
class Op:
    """An operator under test: its function, and its inputs from (B, K of tokens, K, L, H, dk, dv)."""

    name: str
    function: Callable
    inputs: Callable

    def __str__(self):
        return self.name


def gla_inputs(B, Kt, K, L, H, dk, dv):
    g = F.logsigmoid(noise(B, K, L, H, dk))
    return dict(q=noise(B, Kt, L, H, dk), k=noise(B, Kt, L, H, dk), v=noise(B, Kt, L, H, dv), g=g)


def simple_inputs(*sizes):
    inputs = gla_inputs(*sizes)
    return inputs | dict(g=inputs["g"][..., 0])


def wkv6_inputs(B, Kt, K, L, H, dk, dv):
    inputs = gla_inputs(B, Kt, K, L, H, dk, dv)
    return dict(r=inputs["q"], k=inputs["k"], v=inputs["v"], w=inputs["g"], u=noise(K, H, dk))


def ssd_inputs(B, Kt, K, L, H, dk, dv):
    heads = dict(A=-noise(K, 2 * H).exp(), D=noise(K, 2 * H), dt_bias=noise(K, 2 * H))
    groups = dict(B=noise(B, Kt, L, H, dk), C=noise(B, Kt, L, H, dk))
    tokens = dict(x=noise(B, Kt, L, 2 * H, dv), dt=noise(B, Kt, L, 2 * H), z=noise(B, Kt, L, 2 * H, dv))
    return heads | groups | tokens


def ssd_with_softplus(**inputs):
    return ssd(**inputs, dt_softplus=True)


OPS = [
    Op("gla", gla, gla_inputs),
    Op("simple_gla", simple_gla, simple_inputs),
    Op("wkv6", wkv6, wkv6_inputs),
    Op("ssd", ssd_with_softplus, ssd_inputs),
]


def with_state(inputs, B, K, H, dk, dv):
    heads = 2 * H if "x" in inputs else H
    return inputs | dict(initial_state=noise(B, K, heads, dk, dv))


def results(name, op, inputs, route, merge, final=True):
    """Output, final state and the gradients of a mixed loss of both."""
    inputs = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    with backend(name):
        output, state = op.function(**inputs, route=route, merge=merge, return_final_state=True)
        weight = torch.cos(torch.arange(output.numel())).reshape(output.shape)
        loss = (output.double() * weight).sum() + (state.double().square().sum() / 2 if final else 0)
        grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"output": output, "state": state} | {f"gradient of {k}": g for k, g in zip(inputs, grads)}


def compare(op, inputs, route=None, merge=None, dtype=torch.float32, final=True):
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    want = results("reference", op, {key: x.double() for key, x in inputs.items()}, route, merge, final)
    got = results("triton", op, inputs, route, merge, final)
    assert got["output"].dtype == dtype and got["state"].dtype == torch.float32
    for key, exact in want.items():
        assert got[key].shape == exact.shape
        gap = ((got[key].double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)).item()
        assert gap <= (1e-5 if key == "state" else TOLERANCE[dtype]), f"{key} differs by {gap:.1e}"


@in_interpreter
@pytest.mark.parametrize("kind, merge, dtype, shared", CALLS, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_is_the_definition(op, kind, merge, dtype, shared):
    torch.manual_seed(0)
    B, K, L, H, dk, dv = 2 if kind == "per_sample" else 1, 2, 19, 1, 5, 3
    inputs = with_state(op.inputs(B, 1 if shared else K, K, L, H, dk, dv), B, K, H, dk, dv)
    compare(op, inputs, table(kind, B, K, L), merge, dtype)


@in_interpreter
@pytest.mark.parametrize("op", OPS, ids=str)
def test_many_chunks_and_blocks_of_channels(op, monkeypatch):
    """Sizes that no block divides, without a state to begin with."""
    kernels = import_module("linescan.scans.kernels.triton.gla")
    for name in ("CHUNK", "WIDTH", "DEPTH"):  # 16 steps in float32
        monkeypatch.setattr(kernels, name, 16)
    torch.manual_seed(0)
    compare(op, op.inputs(1, 1, 1, 33, 1, 17, 17))


@in_interpreter
@pytest.mark.parametrize("op", OPS[:3], ids=str)
def test_the_output_alone(op):
    torch.manual_seed(0)
    compare(op, op.inputs(1, 1, 1, 5, 1, 2, 3), final=False)


@in_interpreter
@pytest.mark.parametrize("op", OPS[:3], ids=str)
def test_gates_of_any_strength(op):
    """From none at all to forgetting everything, where exponents of the wrong sign would overflow."""
    torch.manual_seed(0)
    inputs = op.inputs(1, 1, 1, 33, 1, 3, 2)
    gate = "w" if "w" in inputs else "g"
    strength = torch.tensor([0.0, 1.0, 100.0, 1e4], dtype=torch.float64)
    inputs[gate] = inputs[gate] * strength[torch.randint(4, inputs[gate].shape)]
    compare(op, inputs)
    inputs[gate][:, :, 7] = -inf
    with backend("triton"):
        got = op.function(**{key: x.float() for key, x in inputs.items()})
    with backend("reference"):
        want = op.function(**inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@in_interpreter
def test_two_directions_share_their_tokens():
    """ViG's bidirectional form: one set of q, k, v, a set of gates each way, one launch."""
    torch.manual_seed(0)
    B, L, H = 1, 21, 2
    inputs = gla_inputs(B, 1, 2, L, H, 4, 6)
    steps = torch.arange(L)
    compare(OPS[0], inputs, torch.stack((steps, steps.flip(0))).int(), "sum")


# -- compiled for GPUs that are not there -----------------------------------------------------------------------------


def _launch(ops, dtype, route=None, merge=None):
    for op in ops:
        inputs = op.inputs(1, 2 if route is None else 1, 2, 100, 2, 32, 64)  # without a table, tokens of two routes
        results("triton", op, {key: x.to(dtype) for key, x in inputs.items()}, route, merge)


def launches():
    """Every kernel, forward and backward, with gates of channels: in bfloat16, and in float32 along routes."""
    _launch(OPS[:1], torch.bfloat16)
    _launch(OPS[2:3], torch.float32, table("permutation", 1, 2, 100), "sum")


def other_launches():
    """The same with gates of heads."""
    _launch(OPS[1:2], torch.bfloat16)
    _launch(OPS[3:], torch.float32, table("permutation", 1, 2, 100), "sum")


@outside_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("function", ["launches", "other_launches"])
def test_compiles(function):
    for _, kernels in compiled(f"tests.scans.test_triton_gla:{function}"):
        assert {kernel["name"] for kernel in kernels} == {"_states", "_carry", "_outputs", "_gradients"}
