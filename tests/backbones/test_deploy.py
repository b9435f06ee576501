"""Compiled and exported models keep each recurrence as one operator, and give the eager result."""

import shutil
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

from linescan.engine.packages import difference
from linescan.layers.mamba import MambaMixer
from linescan.scans.exported import DOMAIN, functions
from linescan.scans.kernels import cpu


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
    """A mixer: each kernel that Inductor makes is compiled by itself, seconds apiece."""
    torch.manual_seed(0)
    model, x = MambaMixer(16), torch.randn(2, 4, 4, 16)
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

# Small networks, and their sizes, are those of tools/deploy.py, which tries all families at both.
spec = spec_from_file_location("deploy", Path(__file__).parents[2] / "tools" / "deploy.py")
deploy = module_from_spec(spec)
spec.loader.exec_module(deploy)
SMALL = {name: small for models in deploy.MODELS.values() for name, small in models.items()}
LOOPS = ("vim_tiny_patch16_224", "vig_tiny", "vrwkv_tiny", "vrwkv6_tiny", "scan_tiny")  # one for each recurrence
KERNELS = (
    *LOOPS, "local_vim_tiny_middle_cls_token", "vmamba_tiny_s1l8", "mambavision_tiny", "mamband_small_patch16_224",
    "videomamba_video_tiny_patch16_224", "inline_deit_tiny", "rwkvsam_tiny", "mambair_light_x2",
)  # fmt: skip


def in_onnx_runtime(name, size, path, kernels):
    """Exports with a dynamic batch, and holds the answers for other batches against the model's."""
    small, options = SMALL[name], onnxruntime.SessionOptions()
    model = small.model(name, size)
    with functions() if kernels else nullcontext(), torch.no_grad():  # with gradients, some batches are taken for fixed
        program = torch.onnx.export(
            model, small.inputs(2, size), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
        )
    if kernels:
        for node in program.model.graph.all_nodes():
            node.attributes.pop("body", None)  # the name of a function that is left out
        program.model.graph.opset_imports[DOMAIN] = 1
        options.register_custom_ops_library(str(cpu.LIBRARY))
    program.save(path)
    session = onnxruntime.InferenceSession(path, options)
    for batch in (1, 3):
        [x] = small.inputs(batch, size, seed=batch)
        with torch.no_grad():
            want = model(x)
        [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert difference(want, torch.from_numpy(got)) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOPS)
def test_standard_operators_give_the_eager_result(name, tmp_path):
    in_onnx_runtime(name, SMALL[name].sizes[0], tmp_path / "model.onnx", kernels=False)


@pytest.mark.slow
@pytest.mark.skipif(cpu.missing() is not None, reason="no kernels")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_in_onnx_runtime_give_the_eager_result(name, tmp_path):
    """At another size. The loops in their place are most of what takes time in an export."""
    in_onnx_runtime(name, SMALL[name].sizes[1], tmp_path / "model.onnx", kernels=True)
