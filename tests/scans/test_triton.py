"""The Triton kernels of the selective scan and the causal convolution: in Triton's interpreter against the float64
definition, where every access to memory is checked, and compiled for GPUs that are not there."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from linescan.scans import causal_conv1d, selective_scan
from linescan.scans.recurrence import backend

from .tools import noise, table
from .triton_tools import (
    compiled,
    in_interpreter,
    interpret,
    no_stray_access,  # noqa: F401  (a fixture)
    outside_interpreter,
)

pytest.importorskip("triton")
KERNELS = "linescan.scans.kernels.triton"
HERE = Path(__file__).parent


# -- numbers ----------------------------------------------------------------------------------------------------------


def scan_inputs(B=1, K=2, L=7, D=5, N=3, G=1, shared=True, without=()):
    """Inputs as a Mamba layer makes them: u and z are halves of one tensor; delta, B and C slices of another."""
    u, z = noise(B, 1 if shared else K, L, 2 * D).chunk(2, -1)
    delta, rows, columns = noise(B, K, L, D + 2 * G * N).split((D, G * N, G * N), -1)
    optional = dict(D=noise(K, D), z=z, delta_bias=noise(K, D), initial_state=noise(B, K, D, N))
    given = {key: x for key, x in optional.items() if key not in without}
    rows, columns = (x.unflatten(-1, (G, N)) for x in (rows, columns))
    return dict(u=u, delta=delta - 2, A=-torch.exp(noise(K, D, N)), B=rows, C=columns) | given


def conv_inputs(B=1, K=2, L=7, D=5, W=3, shared=True, without=()):
    x = noise(B, 1 if shared else K, L, 2 * D)[..., :D]
    optional = dict(bias=noise(K, D), initial_state=noise(B, K, D, W - 1))
    return dict(x=x, weight=noise(K, D, W)) | {key: x for key, x in optional.items() if key not in without}


def results(name, function, inputs, dtype, state=True, **options):
    """Output, final state and gradients of all inputs."""
    inputs = {key: x.to(dtype).requires_grad_() for key, x in inputs.items()}
    with backend(name):
        output, final = function(**inputs, **options, return_final_state=True)
        torch.manual_seed(1)
        loss = (output * noise(*output.shape).to(output.dtype)).sum()
        if state:
            loss = loss.double() + (final * noise(*final.shape).to(final.dtype)).sum()
        grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"output": output, "state": final} | dict(zip(inputs, grads))


def compare(function, inputs, dtype=torch.float32, **options):
    """The kernels hold against the definition in float64 of the very same numbers."""
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    got = results("triton", function, inputs, dtype, **options)
    want = results("reference", function, inputs, torch.float64, **options)
    for key, x in want.items():
        kept = torch.float32 if key == "state" else dtype
        assert got[key].dtype == kept and got[key].shape == x.shape
        error = (got[key].double() - x).abs().max() / x.abs().max()
        tolerance = 3e-6 if kept == torch.float32 else torch.finfo(kept).eps
        assert error <= tolerance, f"{key}: {error:.1e}"
    return got


@pytest.fixture
def module():
    """The kernels' modules with fewer steps at a time, so that short sequences cross the borders between."""
    scan, conv = import_module(f"{KERNELS}.selective_scan"), import_module(f"{KERNELS}.causal_conv")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward_tile", "backward_tile"):
            whole = getattr(scan, name)
            patch.setattr(scan, name, lambda *sizes, whole=whole: whole(*sizes) | {"T": 2})
        patch.setattr(conv, "FORWARD_STEPS", 4)
        patch.setattr(conv, "BACKWARD_STEPS", 4)
        yield scan


@in_interpreter
@pytest.mark.parametrize("kind", ["none", "permutation", "padded", "repeated", "per_sample"])
def test_scan_along_routes(module, kind):
    """K routes of shared tokens, added up: for permutations in the kernel, by programs that walk all routes."""
    torch.manual_seed(0)
    batch = 2 if kind == "per_sample" else 1
    compare(selective_scan, scan_inputs(batch, L=5), delta_softplus=True, route=table(kind, batch, 2, 5), merge="sum")


@in_interpreter
@pytest.mark.parametrize("states, channels", [(1, 67), (16, 40), (20, 33), (64, 9)])
def test_scan_of_any_width(states, channels):
    """All layouts of tiles, more than one block of channels, with the steps at a time that users get."""
    torch.manual_seed(0)
    inputs = scan_inputs(K=1, L=3, N=states, D=channels)
    compare(selective_scan, inputs, delta_softplus=True, route=table("permutation", 1, 1, 3))


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scan_in_half_precision(module, dtype):
    torch.manual_seed(0)
    compare(selective_scan, scan_inputs(), dtype, delta_softplus=True, route=table("permutation", 1, 2, 7), merge="sum")


@in_interpreter
@pytest.mark.parametrize("weights", [1, 2])
def test_scan_of_steps_of_low_rank(module, weights):
    torch.manual_seed(0)
    inputs = scan_inputs() | {"delta": noise(1, weights, 7, 2), "delta_weight": noise(weights, 5, 2)}
    compare(selective_scan, inputs, delta_softplus=True, route=table("permutation", 1, 2, 7), merge="sum")


@in_interpreter
def test_scan_of_groups_without_options(module):
    torch.manual_seed(0)
    inputs = scan_inputs(D=6, G=2, shared=False, without=("D", "z", "delta_bias", "initial_state"))
    inputs["delta"] = inputs["delta"].abs()
    compare(selective_scan, inputs, state=False)


@in_interpreter
@pytest.mark.parametrize("kind, merge", [("repeated", None), ("none", "sum")])
def test_scan_cut_in_time(module, monkeypatch, kind, merge):
    """Chunks of time at once are the whole, with a last chunk that is shorter."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "split", lambda programs, steps, multiple, device: (-(-steps // 4), 4))
    compare(selective_scan, scan_inputs(L=10), delta_softplus=True, route=table(kind, 1, 2, 10), merge=merge)


@in_interpreter
def test_scan_with_strong_decay(module):
    """Steps for which softplus is 0, linear, and the decay underflows."""
    torch.manual_seed(0)
    inputs = scan_inputs(without=("delta_bias",))
    inputs["delta"] = torch.linspace(-60, 60, inputs["delta"].numel(), dtype=torch.float64).view_as(inputs["delta"])
    compare(selective_scan, inputs, delta_softplus=True)


@in_interpreter
@pytest.mark.parametrize("kind", ["none", "permutation", "padded", "repeated", "per_sample"])
def test_conv_along_routes(module, kind):
    torch.manual_seed(0)
    batch = 2 if kind == "per_sample" else 1
    inputs = conv_inputs(batch, shared=kind != "none")
    compare(causal_conv1d, inputs, activation="silu", route=table(kind, batch, 2, 7), merge="sum")


@in_interpreter
@pytest.mark.parametrize("length, taps, channels", [(1, 4, 3), (2, 4, 40), (9, 2, 64)])
def test_conv_of_any_size(length, taps, channels):
    """Sequences shorter than the window, more than one block of channels; as many steps at a time as users get."""
    torch.manual_seed(0)
    compare(causal_conv1d, conv_inputs(K=1, L=length, W=taps, D=channels), route=table("permutation", 1, 1, length))


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_in_half_precision(module, dtype):
    torch.manual_seed(0)
    inputs = conv_inputs(without=("bias", "initial_state"))
    compare(causal_conv1d, inputs, dtype, activation="silu", route=table("permutation", 1, 2, 7), state=False)


@outside_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("files", ["test_triton.py", "test_triton_*.py"])
def test_in_the_interpreter(files):
    interpret(*sorted(HERE.glob(files)))


# -- what surrounds the kernels ---------------------------------------------------------------------------------------


@outside_interpreter
def test_time_is_cut_only_where_programs_are_few(monkeypatch):
    common = import_module(f"{KERNELS}.common")
    monkeypatch.setattr(common, "processors", lambda device: 100)
    assert common.split(400, 5000, 8, None) == (1, 5000)
    chunks, size = common.split(10, 5000, 8, None)
    assert 64 <= size and size % 8 == 0 and 10 * chunks >= 400 and (chunks - 1) * size < 5000 <= chunks * size
    assert common.split(10, 100, 8, None) == (1, 104)


@outside_interpreter
def test_linescan_imports_without_triton():
    code = f"""
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from linescan.scans import backend, causal_conv1d
from linescan.scans.kernels import backend_info
x = torch.ones(1, 1, 2, 3)
causal_conv1d(x, torch.ones(1, 3, 2))
assert "{KERNELS}.common" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@outside_interpreter
def test_a_forced_kernel_says_what_it_takes():
    x = torch.ones(1, 1, 2, 3)
    with backend("triton"), pytest.raises(ValueError, match="tensors on a CUDA device.*got float32 on cpu"):
        causal_conv1d(x, torch.ones(1, 3, 2))


# -- compiled ---------------------------------------------------------------------------------------------------------


def _run(function, inputs, dtype, **options):
    parameters = ("A", "D", "delta_bias", "initial_state", "weight", "bias")
    inputs = {key: x.to(torch.float32 if key in parameters else dtype).requires_grad_() for key, x in inputs.items()}
    with backend("triton"):
        output, state = function(**inputs, **options, return_final_state=True)
        torch.autograd.grad((output.sum(), state.sum()), list(inputs.values()))


def launches():
    """What Vim (16 states) and VMamba (one) run."""
    route = torch.stack([torch.arange(64), torch.arange(64).flip(0)]).int()
    for states, without in ((16, ("initial_state",)), (1, ("initial_state", "z"))):
        inputs = scan_inputs(2, 2, 64, 192, states, without=without)
        _run(selective_scan, inputs, torch.bfloat16, delta_softplus=True, route=route, merge="sum")
    inputs = conv_inputs(2, 2, 64, 192, 4, without=("initial_state",))
    _run(causal_conv1d, inputs, torch.bfloat16, activation="silu", route=route)


def other_launches():
    """float32, any table, time cut in chunks; many states; nothing that is optional."""
    torch.manual_seed(0)
    route = table("repeated", 1, 2, 55).long()
    scan = import_module(f"{KERNELS}.selective_scan")
    bare = scan_inputs(1, 2, 55, 48, 16, G=2, without=("D", "z", "delta_bias", "initial_state"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "split", lambda programs, steps, multiple, device: (2, 32))
        _run(selective_scan, bare, torch.float32, route=route)
    _run(selective_scan, scan_inputs(1, 1, 64, 48, 64), torch.float16, merge="sum")
    _run(causal_conv1d, conv_inputs(1, 1, 55, 24, 2, without=("bias", "initial_state")), torch.float16, merge="sum")
    _run(causal_conv1d, conv_inputs(1, 2, 55, 48, 4), torch.float32, route=route)


@outside_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("function", ["launches", "other_launches"])
def test_compiles(function):
    for _, kernels in compiled(f"tests.scans.test_triton:{function}"):
        names = {kernel["name"] for kernel in kernels}
        assert names >= {"_scan", "_retreat", "_forward", "_backward"}
        assert names >= {"_carry", "_adjoint"} or function == "launches"


# -- tools/gpu_check.py -----------------------------------------------------------------------------------------------

TOOL = HERE.parents[1] / "tools" / "gpu_check.py"


@outside_interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    done = subprocess.run([sys.executable, TOOL, "--out", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: no CUDA GPU here, so nothing was checked or measured\n"
    assert not list(tmp_path.iterdir())


@outside_interpreter
def test_gpu_check_without_timm():
    """It checks the scans where timm, which the backbones need, is missing; here with the torch form for a kernel."""
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "timm" else find(name, *rest)
sys.modules["timm"] = None  # importing it raises
sys.path.insert(0, {str(TOOL.parent)!r})
import torch, gpu_check
rows = gpu_check.correctness(torch.device("cpu"), 1, "chunked")
assert {{row["operator"] for row in rows}} >= {{o.name for o in gpu_check.OPERATORS}} | {{"comba", "rg_lru", "based"}}
kernels = {{o.name for o in gpu_check.operators_with("triton")}}
assert all(row["repeats"] and (row["passed"] or row["operator"] not in kernels) for row in rows), rows
page = gpu_check.markdown(dict(machine=dict(chip="C", date="D", copy_bandwidth=1e12), correctness=rows))
assert page.count("1 of 1 | 1 of 1") == sum(row["passed"] for row in rows) >= len(kernels) > 5
"""
    subprocess.run([sys.executable, "-c", code], check=True)
