#!/usr/bin/env python
"""Compiles the Triton kernels for GPUs that need not be there, and writes what they take into docs/benchmarks:
registers, shared memory, and the bytes that they ask of global memory.

    python tools/kernels.py             for H100 or H200 (sm_90) and B200 (sm_100)
    python tools/kernels.py --arch 120
    python tools/kernels.py --record    after a change of kernels: what the tests need not compile again

What kernels take is of the shapes that the tests compile: published models' where there are any (tests/scans/
test_triton*.py). Bytes are those of the operators in tools/gpu_check.py.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterable

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "README.md"
BEGIN, END = "<!-- Written by tools/kernels.py. -->\n", "<!-- End of what tools/kernels.py wrote. -->\n"
LAUNCHES = (
    "test_triton:launches",
    "test_triton_gla:launches",
    "test_triton_gla:other_launches",
    "test_triton_wkv:launches",
    "test_triton_forms:launches",
    "test_triton_more:launches",
    "test_triton_more:other_launches",
)
TESTED = (  # besides, for the smallest shared memory
    "test_triton:other_launches",
    "test_triton_forms:other_launches",
    "test_triton_forms:wide_launches",
)
NOT_COMPILED = {("test_triton_more:launches", 100)}  # by Triton 3.6
SIDE = 16  # of the map whose bytes are counted: 256 tokens

# The same count for the kernels of other packages, from their sources: the tokens that a program of one channel reads
# and writes, and B and C, which it reads for itself. (name, bytes forward, floor, backward, floor), bfloat16.
PEERS = (
    # u, delta, z in, y and gated y out; 2 N numbers of B and C; backwards 2 N float32 atomic sums as well
    ("mamba-ssm, S6 as Vim has it (D 384, N 16)", 6 + 4 + 64, 8, 10 + 6 + 64 + 128, 14),
    # y in float32; delta and u are read twice backwards
    ("VMamba's oflex, S6 as VMamba has it (N 1)", 2 + 2 + 4 + 4, 8, 14 + 4 + 8, 12),
    # with its kernels that copy four routes out and add them up again, for each route
    ("the same with cross-scan and cross-merge", 12 + 7.5, 8, 26 + 7.5, 12),
)


def lines(command: list[str]) -> list[dict]:
    """The JSON lines that a command prints."""
    print(*command[1:], file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return list(map(json.loads, done.stdout.splitlines()))


def compiled(archs: Iterable[int], launches: Iterable[str] = LAUNCHES) -> list[dict]:
    """What `tests.scans.triton_tools` prints of every kernel."""
    command = [sys.executable, "-m", "tests.scans.triton_tools"]
    pairs = [(name, arch) for arch in archs for name in launches if (name, arch) not in NOT_COMPILED]
    return [x for name, arch in pairs for x in lines([*command, f"tests.scans.{name}", str(arch)])]


def record() -> Path:
    """Writes what the tests' kernels take into the file that they look into before they compile any."""
    sys.path.insert(0, str(ROOT))
    from tests.scans.triton_tools import LIMITS, RECORD, TIGHTEST

    kernels = compiled([TIGHTEST], LAUNCHES + TESTED) + compiled(LIMITS, ["test_triton_farthest:launches"])
    rows = {x["key"]: {key: x[key] for key in ("name", "shared", "registers", "stack")} for x in kernels}
    RECORD.write_text("{\n" + ",\n".join(f'"{key}": {json.dumps(row)}' for key, row in sorted(rows.items())) + "\n}\n")
    return RECORD


# -- bytes ------------------------------------------------------------------------------------------------------------


def _parameters(values, types) -> list[int]:
    """Arguments of a launch as the compiled kernel takes them, pointers and numbers."""
    found = []
    for value, kind in zip(values, types):
        if isinstance(kind, (tuple, list)):
            found += _parameters(value, kind)
        elif kind != "constexpr":
            found.append(value.data_ptr() if hasattr(value, "data_ptr") else value if isinstance(value, int) else 0)
    return found


def count(name: str, arch: int) -> None:
    """Prints what the kernels of an operator of `gpu_check` ask for, as one JSON line: bytes of forward and backward,
    and their floors, for each token, route and channel of the output. Tokens are bfloat16, in their stored order, each
    route's its own."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    import gpu_check
    import torch
    from traffic import Traffic, traffic

    from tests.scans.triton_tools import pretend

    asked = Traffic(0, 0)

    def launched(function, kernel, args, options, grid):
        nonlocal asked
        types, bound = kernel.src.signature, dict(zip(function.arg_names, args)) | options
        parameters = _parameters([bound[name] for name in types], types.values())
        asked += traffic(kernel.asm["ptx"], [*parameters, 0, 0], grid)  # Triton's own scratch comes last

    pretend(arch, launched)
    (operator,) = [x for x in gpu_check.OPERATORS if x.name == name]
    routes = len(gpu_check.parse(operator.routes))
    inputs = operator.inputs(1, SIDE, torch.bfloat16, torch.device("cpu"))
    inputs = {
        key: (x.expand(-1, routes, *x.shape[2:]).contiguous() if key in operator.tokens else x).requires_grad_()
        for key, x in inputs.items()
    }
    with gpu_check.backend("triton"):
        output = operator.call(inputs, None, None)
        forward = asked
        torch.autograd.grad(output.float().sum(), list(inputs.values()), allow_unused=True)
    asked = Traffic(asked.loaded - forward.loaded, asked.stored - forward.stored)
    tokens, results = (gpu_check.size(*x) for x in ([inputs[key] for key in operator.tokens], [output]))
    found = dict(forward=sum(forward), forward_floor=tokens + results)
    found |= dict(backward=sum(asked), backward_floor=2 * tokens + results)
    print(json.dumps(dict(name=name) | {key: x / output.numel() for key, x in found.items()}))
    sys.stdout.flush()
    os._exit(0)  # LLVM's own clean-up may crash where no driver is


def bytes_asked(arch: int) -> str:
    """The table of bytes: ours, then those of other packages."""
    sys.path.insert(0, str(ROOT / "tools"))
    import gpu_check

    names = [operator.name for operator in gpu_check.operators_with("triton") if operator.cases]
    rows = []
    for name in names:
        (x,) = lines([sys.executable, __file__, "--count", name, "--arch", str(arch)])
        rows.append((name, *(x[key] for key in ("forward", "forward_floor", "backward", "backward_floor"))))
    cells = [
        (name, f"{forward:.1f}", f"{least:.1f}", f"{forward / least:.1f}", f"{back:.1f}", f"{back_least:.1f}",
         f"{back / back_least:.1f}")
        for name, forward, least, back, back_least in [*rows, *PEERS]
    ]  # fmt: skip
    head = ("kernels of", "forward, bytes", "floor", "ratio", "backward, bytes", "floor", "ratio")
    return markdown(head, cells)


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(head, rows) -> str:
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in (head, ["---"] * len(head), *rows))


def table(kernels: list[dict], archs: list[int]) -> str:
    """One row a kernel: the most that any of its variants takes, for each architecture."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for kernel in kernels:
        name = kernel["name"].strip("_")
        if "True" in (kernel["options"].get("REVERSED"), kernel["options"].get("TRANSPOSED")):
            name += ", backward"
        groups.setdefault((kernel["module"], name), []).append(kernel)
    rows = []
    for (module, name), variants in sorted(groups.items()):
        warps = max(int(x["options"].get("num_warps", 4)) for x in variants)

        def most(key, unit=1):
            of = [[x[key] / unit for x in variants if x["arch"] == arch] for arch in archs]
            return ", ".join(f"{max(x):.0f}" if x else "–" for x in of)

        count = max(sum(x["arch"] == arch for x in variants) for arch in archs)
        rows.append((module, name, count, warps, most("registers"), most("stack"), most("shared", 1024)))
    return markdown(
        ("kernels of", "kernel", "variants", "warps", "registers", "stack, bytes", "shared memory, kB"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100], help="80, 90, 100, 120 (default: 90 100)")
    parser.add_argument("--record", action="store_true", help="write tests/scans/compiled.json alone")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count(options.count, options.arch[0])
    print(record())
    if options.record:
        return
    archs = ", ".join(f"sm_{arch}" for arch in options.arch)
    kernels = compiled(options.arch)
    text = f"""Compiled for {archs}, one number for each, the most that any variant takes; a stack is what
registers had no room for.

{table(kernels, options.arch)}
Bytes for each token, route and channel of the output, in bfloat16: what the compiled code asks of global memory,
counted for {SIDE**2} tokens in their stored order (a route table adds 4 bytes for each step and program). What goes
from kernel to kernel is in it, plain torch around the kernels is not. The floor is every token tensor moved once. Other
packages are counted from their sources, with tokens that were copied out for each route.

{bytes_asked(options.arch[0])}"""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    print(PAGE)


if __name__ == "__main__":
    main()
