"""What several test folders share: the `linescan` command as a user runs it, and small sets of images."""

import gc
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

if sys.version_info < (3, 11):
    import tomli

    sys.modules["tomllib"] = tomli  # under the name that it has had in Python since

REPOSITORY = Path(__file__).resolve().parents[1]

# Objects of torch and of tests are many and live long: looking through them at Python's pace takes 6 % of the suite.
gc.set_threshold(10_000, 10, 100)

# Modules are compiled once, not by every process that imports them: half of a collection is compiling tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

with suppress(ImportError):
    from yapf.yapflib import yapf_api

    yapf_api.FormatCode = lambda text, **style: (text, True)  # no config that MMEngine writes here has to look well


def pytest_collection_modifyitems(items) -> None:
    """Slow tests first, so the quick ones fill up the end evenly; modules shuffled, so that not all wait at once."""

    def place(item) -> tuple[bool, int]:
        return item.get_closest_marker("slow") is None, crc32(item.nodeid.partition("::")[0].encode())

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One test at a time; the tests of a module with fixtures of its own stay in one worker, which makes them once."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def has_fixtures(module: str) -> bool:
        return 'scope="module"' in (REPOSITORY / module).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if has_fixtures(module) else nodeid

    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker a core: while a test waits, its processes compute. More of them push each other out of the caches."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 2)


def pytest_collection_finish() -> None:
    """Tests and what they import stay to the end: a garbage collection need not look through them each time."""
    gc.collect()
    gc.freeze()


# One thread: sums in the same order everywhere, and tests that share the cores fairly.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}

# A transformer of timm: the engine must not care which model it drives, and this one is quick.
SMALL = ("--model", "vit_tiny_patch16_224") + tuple(
    part
    for arg in ("img_size=16", "patch_size=8", "depth=1", "embed_dim=24", "num_heads=2")
    for part in ("--model-arg", arg)
)


def command(*args, module="linescan") -> list[str]:
    """The arguments that start `linescan ARGS`."""
    return [sys.executable, "-m", *module.split(), *map(str, args)]


@pytest.fixture
def linescan_command(tmp_path):
    """Runs the command in a process of its own, in an empty folder; returns what subprocess.run does."""
    from .runs import linescan

    def run(*args, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        return linescan(tmp_path, *args, **environment).end(timeout)

    return run


@pytest.fixture
def linescan_here(monkeypatch, capsys):
    """Runs the command in this process, which spares the imports; returns (exit status, stdout, stderr)."""
    from linescan import cli

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["linescan", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def one_thread():
    """Torch computes in one thread, as every process of a training does."""
    from linescan.engine.processes import threads

    with threads(1):
        yield


def write_images(root: Path, classes=("circle", "square", "stripe"), each=8, size=20, seed=0) -> Path:
    """ROOT/CLASS/N.png: noise around a colour of the class's own."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        colour = np.eye(3)[label % 3] * 180 + 30
        for i in range(each):
            pixels = (colour + random.normal(0, 30, (size, size, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three classes with eight images each."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run: a small model that has seen the digits for an epoch."""
    from linescan.engine import train
    from linescan.tasks import ClassificationRecipe

    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2)
    out = tmp_path_factory.mktemp("runs") / "digits"
    recipe = ClassificationRecipe("digits", model="vit_tiny_patch16_224", model_args=args, epochs=1, lr=3e-3, warmup=0)
    train(recipe, out, device="cpu")
    return out
