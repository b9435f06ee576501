"""Runs of `linescan train` as processes: finished, killed, compared; and small clips to train on.

The processes are forked from one that has imported linescan: torch and timm take seconds to import, a fork takes none.
"""

import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image

from linescan.engine.image_sets import Digits
from linescan.engine.metrics import read_metrics

from .conftest import ENVIRONMENT

METHOD = multiprocessing.get_start_method()
os.environ["PYTHONPATH"] = ENVIRONMENT["PYTHONPATH"]  # the server finds `tests`, from whatever folder it is started
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])
FORKS.set_forkserver_preload = lambda names: None  # linescan's own trainings fork from the same one, with less in it


def _begin(folder: Path, log: Path, environment: dict[str, str], target: Callable, args: tuple) -> None:
    os.chdir(folder)
    os.environ.update(ENVIRONMENT | environment)
    multiprocessing.set_start_method(METHOD, force=True)  # of its own workers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    target(*args)


def be_linescan(*args: str) -> None:
    """All that `linescan ARGS` does, in this process."""
    from linescan import cli

    sys.argv = ["linescan", *args]
    cli.main()


def be_code(code: str, *args: str) -> None:
    """All that `python -c CODE ARGS` does, in this process."""
    sys.argv = ["-c", *args]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def be_script(path: Path, *args: str) -> None:
    """All that `python PATH ARGS` does, in this process."""
    sys.argv = [str(path), *args]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


class Forked:
    """A process that has begun: `target(*args)` in a folder, with environment variables of its own."""

    def __init__(self, folder: Path, target: Callable, *args, **environment: str):
        self.log = folder / f".log{time.monotonic_ns()}"
        self.process = FORKS.Process(target=_begin, args=(folder, self.log, environment, target, args))
        self.process.start()

    def end(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Waits for its end, and kills it where that takes longer."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        files = [Path(f"{self.log}{suffix}") for suffix in (".out", ".err")]
        said = [file.read_text() for file in files if file.exists()] or ["", ""]
        for file in files:
            file.unlink(missing_ok=True)
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *said)


def linescan(folder: Path, *args, **environment: str) -> Forked:
    """`linescan ARGS` in a folder, begun."""
    return Forked(folder, be_linescan, *map(str, args), **environment)


def python(folder: Path, code: str, *args, **environment: str) -> subprocess.CompletedProcess:
    """`python -c CODE ARGS` in a folder, where what linescan is made of has been imported; ended."""
    return Forked(folder, be_code, code, *map(str, args), **environment).end()


def in_two(folder: Path, target: Callable, *args) -> list[subprocess.CompletedProcess]:
    """`target(*args)` in two processes that find each other as those of torchrun do; both end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two = [Forked(folder, target, *args, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(2)]
    done = [process.end() for process in two]
    assert done[0].returncode == done[1].returncode == 0, done[0].stderr + done[1].stderr
    return done


def train_as_two(folder: Path, *args) -> subprocess.CompletedProcess:
    """`linescan ARGS` in two processes; returns what the first says."""
    return in_two(folder, be_linescan, *map(str, args))[0]


def same(a, b) -> bool:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(run: Path) -> dict:
    """All that a run's state has, but for the time it took."""
    return {k: v for k, v in torch.load(run / "state.pt", weights_only=True).items() if k != "seconds"}


def contents(run: Path) -> tuple:
    """All that a run has come to, but for the time it took."""
    rows = read_metrics(run / "metrics.csv")
    for row in rows:
        del row["seconds"]
    return state_of(run), rows, (run / "model.safetensors").read_bytes(), (run / "best.safetensors").read_bytes()


def rows_of(run: Path) -> int:
    """How many rows a run has logged so far."""
    try:
        return (run / "metrics.csv").read_text().count("\n") - 1
    except FileNotFoundError:
        return 0


def finish(folder: Path, args: tuple, out: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs the command in `folder` to its end, resuming what there is."""
    done = linescan(folder, *args, "-o", out, "--resume").end(timeout)
    assert done.returncode == 0, done.stderr
    return done


def kill_and_resume(folder: Path, args: tuple, out: str, times: int, rows: int) -> None:
    """kill -9, again and again, whenever it falls within about `rows` rows of the log; then to the end."""
    run, dice, killed = folder / out, random.Random(), 0
    for _ in range(times):
        target = rows_of(run) + dice.randint(1, rows)
        process = linescan(folder, *args, "-o", out, "--resume")
        while process.process.is_alive() and rows_of(run) < target:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.05)
        process.process.kill()
        killed += process.end().returncode == -signal.SIGKILL
    assert killed
    finish(folder, args, out)


COLOURS = {"blue": (0, 0, 1), "green": (0, 1, 0), "red": (1, 0, 0), "white": (1, 1, 1)}


def write_clips(root: Path, each: int = 6, size: int = 32, seed: int = 0, files: bool = True) -> Path:
    """ROOT/COLOUR/...: eight frames of a coloured digit that moves, half of the clips video files, half folders."""
    digits, dice = Digits(False), np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        for i in range(each):
            digit = np.asarray(digits.image(int(dice.integers(len(digits))), 1).resize((16, 16)))
            canvas = np.zeros((size, size, 3), np.uint8)
            canvas[:16, :16] = digit[:, :, None] * np.array(colour)
            place, step = dice.integers(0, size, 2), dice.integers(-3, 4, 2)
            clip = [np.roll(canvas, tuple(place + t * step), (0, 1)) for t in range(8)]
            _write_clip(root / name, f"clip{i}", clip, files and i % 2 == 0)
    return root


def _write_clip(folder: Path, name: str, clip: list[np.ndarray], as_file: bool) -> None:
    if not as_file:
        (folder / name).mkdir(parents=True)
        for t, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / name / f"{t}.png")
        return
    import av

    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(folder / f"{name}.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height = clip[0].shape[1::-1]
        stream.pix_fmt = "bgr0"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
