#!/usr/bin/env python
"""Compiles the Triton kernels for a GPU that need not be there, and writes what they take into docs/benchmarks.

    python tools/kernels.py             for an H100 or H200 (sm_90)
    python tools/kernels.py --arch 120

The shapes are those that the tests compile: published models' where there are any (tests/scans/test_triton*.py).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "README.md"
BEGIN, END = "<!-- Written by tools/kernels.py. -->\n", "<!-- End of what tools/kernels.py wrote. -->\n"
LAUNCHES = (
    "test_triton:launches",
    "test_triton_gla:launches",
    "test_triton_wkv:launches",
    "test_triton_forms:launches",
)


def compiled(arch: int) -> list[dict]:
    """What `tests.scans.triton_tools` prints of every kernel."""
    kernels = []
    for name in LAUNCHES:
        command = [sys.executable, "-m", "tests.scans.triton_tools", f"tests.scans.{name}", str(arch)]
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        kernels += map(json.loads, done.stdout.splitlines())
    return kernels


def table(kernels: list[dict]) -> str:
    """One row a kernel: the most that any of its variants takes."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for kernel in kernels:
        groups.setdefault((kernel["module"], kernel["name"].strip("_")), []).append(kernel)
    head = ("kernels of", "kernel", "variants", "warps", "registers", "stack, bytes", "shared memory, kB")
    rows = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head))]
    for (module, name), variants in sorted(groups.items()):
        warps = max(int(x["options"].get("num_warps", 4)) for x in variants)
        most = [max(x[key] for x in variants) for key in ("registers", "stack", "shared")]
        cells = module, name, len(variants), warps, most[0], most[1], f"{most[2] / 1024:.0f}"
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="80, 90, 120 (default: 90)")
    arch = parser.parse_args().arch
    before, _, rest = PAGE.read_text().partition(BEGIN)
    text = f"Compiled for sm_{arch}, the most that any variant takes; a stack is what registers had no room for.\n"
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{table(compiled(arch))}\n{END}{rest.partition(END)[2]}")
    print(PAGE)


if __name__ == "__main__":
    main()
