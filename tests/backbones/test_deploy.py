"""Compiled and exported models keep each recurrence as one operator, and give the eager result."""

import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from linescan.layers.mamba import MambaMixer


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


CASES = {
    "vim_tiny_patch16_224": (dict(depth=2, img_size=64), {"selective_scan": 2, "causal_conv1d": 2}),
    "vmamba_tiny_s1l8": (dict(depths=(1, 1, 1, 1)), {"selective_scan": 4}),
    "vig_tiny": (dict(depth=2, img_size=64), {"gla": 2}),
    "vrwkv_tiny": (dict(depth=2), {"bi_wkv": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_exported_graphs_hold_one_operator_a_scan(name):
    kwargs, expected = CASES[name]
    model, x = small(name, **kwargs), torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for op, count in expected.items():
        assert called.count(f"linescan.{op}.default") == count
    gathers = [c for c in called if c.startswith(("aten.gather", "aten.index", "aten.flip", "aten.roll"))]
    assert not gathers or name == "vrwkv_tiny", "features are not permuted for a route"
    with torch.no_grad():
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
def test_inductor_trains_like_eager():
    """The mixer with a norm: each kernel that Inductor makes is compiled by itself, seconds apiece."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(16), MambaMixer(16)), torch.randn(2, 4, 4, 16)
    eager = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for a, b in zip(eager, got):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_capture_a_forward():
    model, x = small("vim_tiny_patch16_224", depth=2).cuda(), torch.randn(1, 3, 224, 224, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            want = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(x)
        graph.replay()
        assert torch.allclose(got, want, atol=1e-4)


# -- ONNX -------------------------------------------------------------------------------------------------------------

# One block (a stage), an image that is not square, and what is small.
FAMILIES = {
    "vim_tiny_patch16_224": dict(depth=1, img_size=(32, 48), embed_dim=32),
    "local_vim_tiny_middle_cls_token": dict(depth=1, img_size=(32, 48), embed_dim=32),
    "vmamba_tiny_s1l8": dict(depths=(1, 1), dims=16),
    "local_vssm_tiny": dict(depths=(1,), dims=16),
    "vig_tiny": dict(depth=1, img_size=(32, 48)),
    "vrwkv_tiny": dict(depth=1, img_size=(32, 48)),
    "vrwkv6_tiny": dict(depth=1, img_size=(32, 48)),
    "mambavision_tiny": dict(depths=(1, 1, 1, 1)),
    "rsmamba_base": dict(depth=1, img_size=(32, 48), embed_dim=32),
    "scan_tiny": dict(depth=1, img_size=(32, 48), embed_dim=32),
}


def in_onnx_runtime(model, path, *shapes, batches=(1, 3), tolerance=1e-4):
    """Exports with a dynamic batch, and holds the answers for other batches against the model's."""
    inputs = tuple(torch.randn(2, *shape) for shape in shapes)
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with torch.no_grad():  # else torch takes the batch of some models for fixed
        torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=batch, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    for batch in batches:
        inputs = [torch.randn(batch, *shape) for shape in shapes]
        with torch.no_grad():
            want = model(*inputs).numpy()
        [got] = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)})
        assert got.shape == want.shape and np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_runtime_gives_the_eager_result(name, tmp_path):
    size = (64, 64) if name == "mambavision_tiny" else (32, 48)  # a grid of 2 would be taken for the batch
    in_onnx_runtime(small(name, **FAMILIES[name]), tmp_path / "model.onnx", (3, *size))
