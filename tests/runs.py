"""Runs of `linescan train` as processes: finished, killed, compared; and small clips to train on."""

import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from linescan.engine.image_sets import Digits
from linescan.engine.metrics import read_metrics

from .conftest import ENVIRONMENT, command


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
    done = subprocess.run(
        command(*args, "-o", out, "--resume"), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def kill_and_resume(folder: Path, args: tuple, out: str, times: int, rows: int) -> None:
    """kill -9, again and again, whenever it falls within about `rows` rows of the log; then to the end."""
    run, dice, killed = folder / out, random.Random(), 0
    for _ in range(times):
        target = rows_of(run) + dice.randint(1, rows)
        process = subprocess.Popen(
            command(*args, "-o", out, "--resume"), cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and rows_of(run) < target:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
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
