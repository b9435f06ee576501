#!/usr/bin/env python
"""Four small models on solar cells: which cells are defective? Trained from scratch on equal terms.

    pip install elpv-dataset
    python tools/solar_cells.py
    python tools/solar_cells.py --models scan_tiny,resnet18 --size 96 --epochs 30

The 2,624 electroluminescence images are those of Buerhop-Lutz et al., "A Benchmark for Visual Identification of
Defective Solar Cells in Electroluminescence Imagery" (EU PVSEC 2018), under CC BY-NC-SA 4.0, from the package of their
authors. A quarter of each kind of cell (mono- or polycrystalline, probability of a defect) is held out, always the same
ones. A cell whose probability is above one half is called defective.

Every model is trained by `linescan train` with the same options, in one process with one thread, and its last weights
are scored by `linescan evaluate`. The same command again goes on where it was stopped. docs/examples/solar-cells.md has
the results.
"""

import csv
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer  # noqa: E402

from linescan.engine.atomic import atomic  # noqa: E402
from linescan.engine.progress import say  # noqa: E402
from linescan.errors import InputError  # noqa: E402

# The models of 224 pixels, small: patches of 10 pixels, and 6 blocks.
SMALL = ("patch_size=10", "depth=6")
MODELS = {
    "scan_tiny": ("scan_tiny", ()),
    "vim_tiny": ("vim_tiny_patch16_224", SMALL),
    "resnet18": ("resnet18", ()),
    "deit_tiny": ("deit_tiny_patch16_224", SMALL),
}
HELD_OUT = 0.25
CLASSES = ("functional", "defective")


def solar_cells(
    models: Annotated[str, typer.Option(help=f"Some of: {', '.join(MODELS)}.")] = ",".join(MODELS),
    epochs: Annotated[int, typer.Option(min=1)] = 16,
    size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 80,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/solar-cells"),
):
    """Train small models on solar cells, and compare them."""
    names = models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise InputError(f"unknown model {unknown[0]!r}; there are: {', '.join(MODELS)}")
    cells = write_cells(to / "cells")
    results = {}
    for name in names:
        run, cost = to / name, to / f"{name}.json"
        train(name, cells, run, cost, epochs, size)
        command = ["evaluate", "--data", cells / "test", "--checkpoint", run / "model.safetensors", "--json"]
        scores = json.loads(linescan(*command, "--out", run / "test", "--device", "cpu")[0])
        results[name] = json.loads(cost.read_text()) | scores
    with atomic(to / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode())
    print(table(results))


def write_cells(folder: Path) -> Path:
    """train/ and test/, with a folder for each class."""
    for source, probability, _, held_out in read_cells():
        place = folder / ("test" if held_out else "train") / CLASSES[probability > 0.5]
        copy_file(source, place)
    return folder


def read_cells() -> list[tuple[Path, float, str, bool]]:
    """Of each cell the file, the probability of a defect, mono or poly, and whether it is held out."""
    try:
        import elpv_dataset
    except ImportError:
        raise InputError("the images are in a package of their own; `pip install elpv-dataset` installs it") from None
    source = Path(elpv_dataset.__file__).parent / "data"
    kinds, cells = defaultdict(list), []
    with open(source / "labels.csv", newline="") as file:
        for path, probability, crystal in csv.reader(file, delimiter=" ", skipinitialspace=True):
            kinds[float(probability), crystal.strip()].append(path)
    for (probability, crystal), paths in sorted(kinds.items()):
        random.Random(f"{probability:.2f} {crystal}").shuffle(paths)
        border = round(len(paths) * HELD_OUT)
        cells += [(source / path, probability, crystal, i < border) for i, path in enumerate(paths)]
    return cells


def copy_file(source: Path, place: Path) -> None:
    """Copies a file into a folder, unless it is there."""
    target = place / source.name
    if not target.exists():
        place.mkdir(parents=True, exist_ok=True)
        with atomic(target) as copy:
            copy.write(source.read_bytes())


def train(name: str, cells: Path, run: Path, cost: Path, epochs: int, size: int) -> None:
    """One run, to its end; `cost` gets the seconds of CPU that it took, and the most memory that it held."""
    model, args = MODELS[name]
    args = (f"img_size={size}", "in_chans=1", *args)
    spent = json.loads(cost.read_text()) if cost.exists() else {"cpu_seconds": 0.0, "peak_mb": 0.0}
    _, used = linescan(
        "train", "--data", cells / "train", "--val", cells / "test", "--out", run, "--model", model,
        *(word for arg in args for word in ("--model-arg", arg)),
        "--epochs", epochs, "--batch", 32, "--lr", 5e-4, "--warmup", 2, "--augment", "light", "--flip", 0.5,
        "--evaluate-every", epochs, "--workers", 0, "--device", "cpu", "--resume",
    )  # fmt: skip
    spent["cpu_seconds"] += used.ru_utime + used.ru_stime
    spent["peak_mb"] = max(spent["peak_mb"], used.ru_maxrss / 1024)
    with atomic(cost) as file:
        file.write(json.dumps(spent).encode())


def linescan(*words) -> tuple[str, "resource.struct_rusage"]:  # noqa: F821
    """Runs a command of linescan; what it printed, and what it used."""
    command = [sys.executable, "-m", "linescan", *map(str, words)]
    say("$ linescan " + " ".join(command[3:]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as job:
        printed = job.stdout.read()
        _, status, used = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise InputError(f"`linescan {words[0]}` ended with status {job.returncode}")
    return printed, used


def table(results: dict[str, dict]) -> str:
    """In Markdown, the highest F1 of defective cells first."""
    lines = ["| model | accuracy | F1 of defective cells | mean F1 | confusion matrix | CPU minutes | peak MB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    scored = {name: {one["class"]: one["f1"] for one in r["classes"]} for name, r in results.items()}
    for name in sorted(results, key=lambda name: -(scored[name]["defective"] or 0)):
        r = results[name]
        matrix = " / ".join(" ".join(map(str, row)) for row in r["confusion"])
        lines.append(
            f"| {name} | {r['accuracy']:.1%} | {scored[name]['defective'] or 0:.3f} | {r['macro_f1']:.3f} | {matrix} "
            f"| {r['cpu_seconds'] / 60:.1f} | {r['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs it; what the user can fix is told in one line."""
    try:
        typer.run(solar_cells)
    except InputError as error:
        sys.exit(f"solar_cells: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
