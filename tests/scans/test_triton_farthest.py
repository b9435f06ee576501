"""Farthest point sampling in Triton: in its interpreter against the loop in torch, and compiled for absent GPUs."""

from importlib import import_module

import pytest
import torch

from linescan.layers.points import _farthest_loop

from .triton_tools import LIMITS, compiled, in_interpreter, outside_interpreter


def call(batch, length, count, dtype, limit=float("inf"), step=0.0):
    """The loop's answer and the kernel's; some points are not live, and of the last cloud none is."""
    generator = torch.Generator().manual_seed(length)
    points = torch.randn(batch, length, 3, generator=generator, dtype=dtype)
    points = (points / step).round() * step if step else points
    live = torch.rand(batch, length, generator=generator) > 0.2
    live[-1] = False
    first = torch.randint(0, length, (batch,), generator=generator)
    kernels = import_module("linescan.scans.kernels.triton.farthest")
    return _farthest_loop(points, live, first, count, limit), kernels.farthest(points, live, first, count, limit)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("block", [4096, 16])
def test_is_the_loop(monkeypatch, dtype, step, block):
    monkeypatch.setattr(import_module("linescan.scans.kernels.triton.farthest"), "BLOCK", block)
    for length, limit in ((1, float("inf")), (37, float("inf")), (64, 1.0), (100, 1e10)):
        loop, kernel = call(3, length, 12, dtype, limit, step)
        assert torch.equal(kernel, loop)


def launches():
    call(2, 2048, 128, torch.float32)
    call(2, 100, 8, torch.float64)
    call(1, 120_000, 2, torch.float32)


@outside_interpreter
@pytest.mark.slow
def test_compiles():
    for _, kernels in compiled("tests.scans.test_triton_farthest:launches", tuple(LIMITS)):
        assert len(kernels) >= 3
