"""Measuring models side by side, and reading a search: the library part and the commands."""

import json
import mmap
import platform
import subprocess
import sys

import pytest
import timm
import torch

from linescan.backbones.localmamba import searched_directions
from linescan.cli import app
from linescan.engine import benchmark as module
from linescan.engine.benchmark import Measurement, benchmark, crossover
from linescan.errors import InputError

from ..conftest import ENVIRONMENT
from ..runs import python


def timed(model, *milliseconds):
    return [Measurement(model, 224 * 2**i, m / 1e3, 1e3 / m, None) for i, m in enumerate(milliseconds)]


def test_crossover_is_where_two_power_laws_meet():
    linear, quadratic = timed("a", 16, 64, 256), timed("b", 4, 64, 1024)
    assert crossover(linear + quadratic, "a", "b") == pytest.approx(448)
    assert crossover(linear + quadratic, "b", "a") is None
    assert crossover(timed("a", 1, 4) + timed("b", 2, 9), "a", "b") == 224
    half = timed("a", 8, 32) + timed("b", 4, 64)  # 2x behind, then 2x ahead: halfway in the logarithm
    assert crossover(half, "a", "b") == pytest.approx(224 * 2**0.5)


@pytest.mark.parametrize("train", [False, True])
def test_measures_every_model_at_every_size(train):
    seen = []
    progress = lambda n, **_: seen.append(n)  # noqa: E731
    results = list(
        benchmark(["scan_tiny", "vit_tiny_patch16_224"], [32, 64], train=train, budget=0.01, progress=progress)
    )
    assert [(r.model, r.size) for r in results] == [
        ("scan_tiny", 32), ("vit_tiny_patch16_224", 32), ("scan_tiny", 64), ("vit_tiny_patch16_224", 64)
    ]  # fmt: skip
    assert all(r.seconds > 0 and r.images_per_second == pytest.approx(1 / r.seconds) for r in results)
    assert sum(seen) == 4


def test_memory_grows_with_the_image():
    small, large = (r.memory_mb for r in benchmark(["vmamba_tiny_s1l8"], [64, 512], budget=0.01))
    if small is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert large > small and 5 < large < 2000


def test_the_command_writes_table_numbers_and_picture(tmp_path, capsys):
    args = ["benchmark", "scan_tiny", "--against", "vit_tiny_patch16_224", "--sizes", "64,32", "--out"]
    app([*args, str(tmp_path / "deep" / "b")], standalone_mode=False)
    report = json.loads((tmp_path / "deep" / "b.json").read_text())
    assert report["against"] == "vit_tiny_patch16_224" and len(report["results"]) == 4
    assert set(report["crossover_px"]) == {"scan_tiny"}
    assert (tmp_path / "deep" / "b.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "time ratio" in printed and "scan_tiny: " in printed


def fails_after(count, error):
    """Measures so many times, then raises."""
    measure, done = module._measure, []

    def until_then(*args):
        if len(done) == count:
            raise error
        done.append(args)
        return measure(*args)

    return until_then


def test_what_was_measured_is_shown_when_the_rest_fails(tmp_path, linescan_here, monkeypatch):
    """A model cannot take the larger size, the device is lost, the report cannot be written."""
    args = ("benchmark", "scan_tiny", "vit_tiny_patch16_224", "--against", "vit_tiny_patch16_224", "--sizes")
    (tmp_path / "file").touch()
    status, stdout, stderr = linescan_here(*args, "32", "--out", tmp_path / "file" / "b")
    assert status == 2 and "vit_tiny_patch16_224" in stdout and len(stderr.splitlines()) == 1

    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", fails_after(3, ValueError("too large")))
        status, stdout, stderr = linescan_here(*args, "32,64", "--out", tmp_path / "b", "--json")
    report = json.loads(stdout)
    assert status == 2 and stderr == "linescan: vit_tiny_patch16_224 at 64 pixels: too large\n"
    assert [r["size"] for r in report["results"]] == [32, 32, 64] and report["crossover_px"] == {}

    lost = torch.AcceleratorError("CUDA error: the device is lost\nCompile with TORCH_USE_CUDA_DSA")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", fails_after(1, lost))
        status, stdout, stderr = linescan_here(*args, "32", "--out", tmp_path / "b")
    assert status == 2 and "scan_tiny" in stdout and stderr == "linescan: CUDA error: the device is lost\n"
    assert not list(tmp_path.glob("b.*"))


def test_without_matplotlib_there_is_no_picture(tmp_path, linescan_here, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    status, _, stderr = linescan_here("benchmark", "scan_tiny", "--sizes", "32", "--out", tmp_path / "b")
    assert status == 0 and stderr.splitlines() == [str(tmp_path / "b.json")]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("args, message", [
    (["scan_tiny", "--sizes", "big"], "--sizes is numbers"),
    (["no_such_model"], "unknown model"),
    (["vim_tiny_patch16_224", "--sizes", "8"], "at 8 pixels"),
])  # fmt: skip
def test_bad_requests_give_one_line(args, message):
    with pytest.raises(InputError, match=message) as error:
        app(["benchmark", *args], standalone_mode=False)
    assert "\n" not in str(error.value)


def test_directions_of_a_searched_model(tmp_path, capsys):
    torch.manual_seed(0)
    options = dict(embed_dim=16, depth=3, img_size=32, patch_size=8, num_classes=3)
    supernet = timm.create_model("local_vim_tiny_search", **options)
    for block in supernet.blocks:
        torch.nn.init.normal_(block.mixer.along.merge.weights)
    table, _ = searched_directions(supernet)
    torch.save(supernet.state_dict(), tmp_path / "search.pth")
    given = [x for k, v in options.items() for x in ("--model-arg", f"{k}={v}")]
    args = ["directions", str(tmp_path / "search.pth"), "--model", "local_vim_tiny_search", *given]
    capsys.readouterr()
    app([*args, "--out", str(tmp_path / "t.json")], standalone_mode=False)
    assert json.loads((tmp_path / "t.json").read_text()) == table
    assert "M parameters" in capsys.readouterr().out
    model = timm.create_model("local_vim_tiny", directions=table, **options)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    torch.save(timm.create_model("scan_tiny", depth=1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="no LocalMamba super-net"):
        app(
            ["directions", str(tmp_path / "other.pth"), "-m", "scan_tiny", "--model-arg", "depth=1"],
            standalone_mode=False,
        )


GROWTH = """
import os, sys
if sys.argv[1:]:
    os.environ |= dict.fromkeys(("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), sys.argv[1])
import linescan, timm
from linescan.engine.benchmark import growth
model = timm.create_model("vmamba_tiny_s1l8", depths=(1, 1, 1)).eval()
print(growth(model, [(32 * h, 32 * w) for h in range(3, 9) for w in range(3, 11)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_memory_is_bounded_at_changing_sizes(tmp_path):
    """torch's caches of compiled products hold a few sizes, not all that there have been."""

    def held(*entries) -> float:
        done = python(tmp_path, GROWTH, *entries)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    bounded, default = held(), held("1024")
    assert bounded < 150 and bounded < 0.7 * default


FAULTS = """
import resource, torch
from linescan.engine.processes import pick_device

pick_device("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    held = [torch.ones(1 << 20) for _ in range(8)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by other rules")
def test_the_memory_of_a_forward_is_kept_for_the_next():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    pages = 8 * (4 << 20) // mmap.PAGESIZE
    assert int(done.stdout) < 2 * pages  # of ten forwards the first has cleared them
