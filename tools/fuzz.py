#!/usr/bin/env python
"""Makes damaged and hostile files, seeded, and checks that each is answered or refused in one line, within bounds.

    python tools/fuzz.py checkpoints cards --count 1000
    python tools/fuzz.py videos --count 1000 --seed 3
    python tools/fuzz.py images --only 417               # one case again; its file is kept

Every case runs in a process of its own with a limit of time and of memory. It passes where the file is used, or where
the kind's error is raised with one line that names the file. A crash, another error, running out of a limit or a trace
of code from the file is a failure; the script then names the cases and ends with status 1.
"""

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer
from fuzzing import TRAP, Kind

SECONDS = 20  # of CPU time for one case; ten times that by the clock, for a case that waits
MEMORY = 2**31  # that one case may take beside what the script has

KINDS = {"checkpoints": "checkpoints", "cards": "checkpoints", "images": "media", "videos": "media"}  # their modules


def judge(kind: Kind, path: Path) -> str:
    """What becomes of a file: "used", "refused", or what went wrong."""
    try:
        kind.use(path)
    except kind.errors as error:
        line = str(error)
        if "\n" in line or not 10 < len(line) < 1000:
            return f"not one line: {line[:300]!r}"
        return "refused" if path.name in line else f"does not name the file: {line[:300]!r}"
    except BaseException as error:  # whatever a file can cause
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    return "used"


def run_apart(kind: Kind, path: Path) -> str:
    """`judge` in a process of its own, within limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(10 * SECONDS)
            os.write(writer, judge(kind, path).encode(errors="replace")[:1000])
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"SIGPROF": f"more than {SECONDS} s", "SIGALRM": "waits for ever"}.get(name, f"ended by {name}")
    return said or "ended without an answer"


def fuzz(name: str, count: int, seed: int, only: int | None, seconds: float) -> int:
    """Runs the cases of a kind; returns how many failed."""
    from rich.progress import track

    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    kind, outcomes, failed = import_module(f"fuzzing.{KINDS[name]}").KINDS[name], Counter(), []
    stop = time.monotonic() + seconds if seconds else float("inf")
    for case in track([only] if only is not None else range(count), name, disable=not sys.stderr.isatty()):
        if time.monotonic() > stop:
            break
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{case}-"))
        path = kind.make(random.Random(f"{name} {seed} {case}"), folder)
        outcome = run_apart(kind, path)
        if (folder / TRAP).exists():
            outcome = "code of the file was run"
        outcomes[outcome if outcome in ("used", "refused") else "failed"] += 1
        if outcome not in ("used", "refused"):
            failed.append(case)
            print(f"{name} {case}: {outcome}", flush=True)
        if only is not None:
            print(f"{path}: {outcome}")
        else:
            shutil.rmtree(folder)
    print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())), flush=True)
    return len(failed)


def main(
    kinds: Annotated[list[str], typer.Argument(help=f"What to make: {', '.join(KINDS)}.")],
    count: Annotated[int, typer.Option(min=1, help="Cases of each kind.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the random numbers; a case depends on seed and number alone.")] = 0,
    only: Annotated[int | None, typer.Option(help="Run one case, and keep its file.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop after this time per kind; 0: never.")] = 0,
):
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SystemExit(f"unknown kind {unknown[0]!r}; there are: {', '.join(KINDS)}")
    raise SystemExit(1 if sum(fuzz(kind, count, seed, only, seconds) for kind in kinds) else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
