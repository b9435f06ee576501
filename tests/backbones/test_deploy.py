"""Compiled and exported models keep each recurrence as one operator, and give the eager result."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

from linescan.engine.packages import SideBySide, _to_onnx, difference, tensors
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


SCALAR = {"cpp.vec_isa_ok": False}  # of Inductor: else it compiles ten files to see what the compiler knows, 30 seconds


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
def test_inductor_trains_like_eager():
    """A mixer: each kernel that Inductor makes is compiled by itself, seconds apiece."""
    torch.manual_seed(0)
    model, x = MambaMixer(16), torch.randn(2, 4, 4, 16)
    eager = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, options=SCALAR)
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

# Small networks, and their sizes, are those of tools/deploy.py, which tries those that take long to trace, too.
spec = spec_from_file_location("deploy", Path(__file__).parents[2] / "tools" / "deploy.py")
deploy = module_from_spec(spec)
spec.loader.exec_module(deploy)
SMALL = {name: small for models in deploy.MODELS.values() for name, small in models.items()}
TWO = {"depths": (1, 1), "dims": (16, 32)}
ONE = {"depths": (1,), "dims": (16,), "num_heads": (2,), "attn_type": "I"}
for name, args in {  # fewer stages: tracing takes a time for each
    "van_b0": TWO | {"mlp_ratios": (2, 2)},
    "care_s0": TWO | {"ratios": ((2, 2), (2, 4)), "head_dims": (4, 8)},
    "vig_h_tiny": TWO | {"num_heads": (1, 2)},
    "scanh_tiny": TWO,
    "segman_tiny": TWO | {"num_heads": (1, 2), "windows": (3, 3), "mlp_ratios": (2, 2)},
    "inline_pvt_tiny": ONE | {"mlp_ratios": (2,), "sr_ratios": (1,)},
    "inline_swin_tiny": ONE,
    "inline_cswin_tiny": ONE | {"stripes": (0,)},
    "mhsvm_vmunet_3h": {"dims": (16,), "depths": (1,), "depths_decoder": (1,)},
    "mambafcs_base": {"depths": (1,), "num_classes": 0},
    "mambavision_tiny": {"stem_dim": 8, "dims": 16, "depths": (1, 1, 2), "num_heads": (1, 1, 2), "windows": (2, 2, 3)},
    "rwkvsam_tiny": {"depths": (1, 1, 1), "dims": (8, 16, 32)},
    "rwkvsam_small_prompt": {"depths": (1, 1, 1), "dims": (8, 16, 32)},
    "mambaad_resnet34": {"depths": (1, 1, 1, 1)},
    "sigma_tiny": {"dim": 8},
    "segman_seg_tiny": {"backbone": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "windows": (3, 3, 3, 3)}},
}.items():
    sizes = {"segman_tiny": ((32, 32), (24, 32)), "segman_seg_tiny": ((96, 96), (96, 128))}.get(name, SMALL[name].sizes)
    SMALL[name] = replace(SMALL[name], args=SMALL[name].args | args, sizes=sizes)
LOOPS = ("vim_tiny_patch16_224", "vig_tiny", "vrwkv_tiny", "vrwkv6_tiny")  # one for each recurrence
KERNELS = (
    ("vim_tiny_patch16_224", "vig_tiny", "vrwkv_tiny", "vrwkv6_tiny", "scan_tiny", "rsmamba_base"),
    ("local_vim_tiny_middle_cls_token", "vmamba_tiny_s1l8", "mamband_small_patch16_224", "inline_deit_tiny"),
    ("local_vssm_tiny", "mamband_video_small_patch16_224", "videomamba_video_tiny_patch16_224", "mambair_v2_light_x2"),
    ("mambavision_tiny", "mambair_light_x2", "rwkvsam_tiny", "rwkvsam_small_prompt"),
    ("van_b0", "care_s0", "vig_h_tiny", "scanh_tiny"),
    ("local_vim_tiny", "vmamba_vanilla_tiny", "videomamba_tiny_patch16_224", "segman_tiny"),
    ("inline_pvt_tiny", "inline_swin_tiny", "inline_cswin_tiny", "mhsvm_vmunet_3h", "mambafcs_base"),
    ("mamband_unetr_small",),  # whose convolutions of volumes have no bias
    ("mambair_unet_dn",),
    ("sigma_tiny", "mambaad_resnet34"),
    ("mamba_yolo_world_small",),
    ("segman_seg_tiny",),
)  # fmt: skip


def in_onnx_runtime(names, sizes, path, kernels):
    """Exports networks, and holds the answers for two batches against theirs.

    All are one graph, which is made and opened once. Torch does not optimise it, since ONNX Runtime does.
    """
    calls = [(name, at) for at in sizes for name in names]
    networks = [SMALL[name].model(name, SMALL[name].sizes[at]) for name, at in calls]

    def inputs(batch):
        return [SMALL[name].inputs(batch, SMALL[name].sizes[at], seed=batch) for name, at in calls]

    def flat(groups):
        return tuple(x for group in groups for x in group)

    batch = torch.export.Dim("batch", min=1)
    examples = flat(inputs(2))
    with functions() if kernels else nullcontext(), torch.no_grad():  # with gradients, some batches are taken for fixed
        program = _to_onnx(
            SideBySide(networks, [len(SMALL[name].shapes) for name, _ in calls]), examples, [],
            (({0: batch},) * len(examples),), optimize=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    if kernels:
        for node in program.model.graph.all_nodes():
            node.attributes.pop("body", None)  # the name of a function that is left out
        program.model.graph.opset_imports[DOMAIN] = 1
        options.register_custom_ops_library(str(cpu.LIBRARY))
    program.save(path)
    session = onnxruntime.InferenceSession(path, options)
    for batch in (1, 3):
        given = {x.name: value.numpy() for x, value in zip(session.get_inputs(), flat(inputs(batch)), strict=True)}
        got = map(torch.from_numpy, session.run(None, given))
        for call, network, group in zip(calls, networks, inputs(batch)):
            with torch.no_grad():
                want = tensors(network(*group))
            assert difference(want, list(islice(got, len(want)))) < 1e-4, (*call, batch)
        assert not list(got)


@pytest.mark.filterwarnings("ignore")
def test_torch_exports_a_mixer_without_linescan():
    torch.manual_seed(0)
    model, batch = MambaMixer(4, d_state=2), torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (torch.randn(2, 2, 3, 4),), dynamo=True, dynamic_shapes=({0: batch},), optimize=False, verbose=False
        )
        for count in (1, 3):
            x = torch.randn(count, 2, 3, 4)
            assert difference(model(x), program(x)[0]) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_standard_operators_give_the_eager_result(tmp_path):
    in_onnx_runtime(LOOPS, (0,), tmp_path / "model.onnx", kernels=False)


@pytest.mark.slow
@pytest.mark.skipif(cpu.missing() is not None, reason="no kernels")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", KERNELS, ids=" ".join)
def test_kernels_in_onnx_runtime_give_the_eager_result(names, tmp_path):
    """At two sizes. The loops in their place are most of what takes time in an export."""
    in_onnx_runtime(names, (0, 1), tmp_path / "model.onnx", kernels=True)
