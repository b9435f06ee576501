#!/usr/bin/env python
"""Measures linescan against its peers on this machine: a table, a JSON file and a plot.

    python tools/benchmark.py scan          the selective scan on the CPU
    python tools/benchmark.py recurrences   every recurrence in the same model, beside S6, softmax and its own bound
    python tools/benchmark.py kernels       the CPU kernels against the chunked torch forms, over shapes
    python tools/benchmark.py points        sampling, neighbours and sparse convolution beside the alternatives
    python tools/benchmark.py clouds        models of point clouds against the number of points
    python tools/benchmark.py groups        LION's layers against a dense transformer layer on the same groups
    python tools/benchmark.py models        whole models against timm's DeiT-Ti and Swin-T
    python tools/benchmark.py precision     models in bfloat16 beside float32, and the bound that their products set
    python tools/benchmark.py memory        what stays in memory after images of changing sizes

Peers run as their authors publish them: installed packages where there is one, else the published algorithm written
again from its description, each in its own memory layout. Numbers are medians over many runs on one thread, in CPU time
of the process, which other processes lengthen little; what is compared is measured in turns, so that it meets the same
disturbances. Several threads are timed by the wall clock, the best of turns.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Callable

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(width=None if sys.stdout.isatty() else 120)  # room for the tables in a file
Out = Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")]


@app.callback()
def main() -> None:
    """Sections are commands; each writes OUT/NAME.json and OUT/NAME.png."""


# -- what all sections share -------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], budget: float = 1.5, pick=median, clock=time.process_time) -> float:
    """Median time of a run over about `budget` seconds, after one run to warm up; of a longer run, the time of one."""
    start = clock()
    run()
    first = clock() - start
    if first > budget:
        return first
    together = max(1, int(2e-3 / max(first, 1e-6)))  # runs in a measurement: reading the clock takes time too
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < budget:
        start = clock()
        for _ in range(together):
            run()
        times.append((clock() - start) / together)
    return pick(times)


def keep_memory() -> None:
    """Makes glibc keep what is freed: fresh pages, of which the kernel clears each, would be half of a peer's time.

    The first large block to be freed decides how large the blocks are that go back to the system.
    """
    torch.empty(31 << 20, dtype=torch.uint8).fill_(0)


def side_by_side(runs: dict[str, Callable[[], object]], budget: float, turns: int = 5) -> dict[str, float]:
    """Seconds of runs that are compared: the median of `turns` turns of `seconds`, `budget` seconds each in all."""
    times = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run, budget / turns))
    return {name: median(several) for name, several in times.items()}


def machine() -> dict[str, object]:
    """Where and when; goes into every JSON file."""
    from linescan.scans.kernels import backend_info

    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "processor": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": backend_info()["cpu"],
    }


def save(out: Path, name: str, results: dict, draw: Callable) -> None:
    """Writes the JSON file and the plot; `draw(axes)` fills the latter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    draw(axes)
    figure.savefig(out / f"{name}.png", dpi=160)
    console.print(f"{out / name}.json, {out / name}.png")


# -- the selective scan -----------------------------------------------------------------------------------------------


class SequentialLoop:
    """The algorithm of mamba-ssm's `selective_scan_ref`: decays and inputs of all steps at once, then a Python loop
    over time that takes one step's slice of each. Its backward is quadratic in L: each slice's gradient has full size.
    """

    longest_backward = 256  # more takes minutes

    @staticmethod
    def prepare(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> list[Tensor]:
        """From tokens (1, L, D) and (1, L, N) to the layout that the peer is called with: here channels first."""
        u, delta, B, C = (x.mT.contiguous() for x in (u, delta, B, C))
        return [u, delta, A, B, C, D]

    @staticmethod
    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
        inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
        state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            state = decay[:, :, t] * state + inputs[:, :, t]
            outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
        return torch.stack(outputs, 2) + u * D[:, None]


class MambaPy:
    """The parallel scan of the installed package mambapy."""

    longest_backward = None

    def __init__(self):
        from mambapy.mamba import MambaBlock

        self.scan = MambaBlock.selective_scan

    @staticmethod
    def prepare(*arguments: Tensor) -> list[Tensor]:
        return list(arguments)

    def run(self, *arguments: Tensor) -> Tensor:
        return self.scan(None, *arguments)


class Linescan:
    """The public function, with one implementation forced, or the fastest for ""."""

    longest_backward = None

    def __init__(self, name: str = ""):
        from linescan import scans

        self.name, self.scans = name, scans

    @staticmethod
    def prepare(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> list[Tensor]:
        return [u[:, None], delta[:, None], A[None], B[:, None], C[:, None], D[None]]

    def run(self, *arguments: Tensor) -> Tensor:
        if not self.name:
            return self.scans.selective_scan(*arguments)
        with self.scans.backend(self.name):
            return self.scans.selective_scan(*arguments)


def multiply_add_bound(states: int) -> float:
    """Seconds a token and channel that the multiply-adds of a plain kernel take at the pace this core reaches just now.

    Nine a state: five of an exp2 of degree five, delta A, delta u B, and one each for the state and the output.
    (Ours makes do with seven.)
    """
    rounds = 200_000
    lanes = torch.ops.linescan_cpu.multiply_add(0)
    pace = seconds(lambda: torch.ops.linescan_cpu.multiply_add(rounds), budget=0.3) / (rounds * 16 * lanes)
    return 9 * states * pace


@app.command()
def scan(
    out: Out = Path("runs/benchmark"),
    lengths: Annotated[str, typer.Option(help="Numbers of tokens.")] = "197,1024,4096",
    channels: int = 384,
    states: int = 16,
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 1.5,
    threads: Annotated[int, typer.Option(help="Threads for the scaling row; 1 leaves it out.")] = 2,
):
    """The selective scan, float32, one sample, against the sequential loop of mamba-ssm and the scan of mamba.py."""
    from linescan.scans.kernels import cpu

    torch.set_num_threads(1)
    keep_memory()
    sizes = [int(length) for length in lengths.split(",")]
    forms = {"linescan": Linescan(), "linescan, chunked torch": Linescan("chunked")}
    if find_spec("mambapy"):
        forms["mamba.py, parallel scan"] = MambaPy()
    forms["mamba-ssm, its loop"] = SequentialLoop()

    def calls(form, length: int) -> dict[str, Callable]:
        torch.manual_seed(0)
        u, delta, B, C = (torch.randn(1, length, n) for n in (channels, channels, states, states))
        A = -torch.arange(1.0, states + 1).repeat(channels, 1)
        inputs = form.prepare(u, torch.nn.functional.softplus(delta - 3), A, B, C, torch.ones(channels))
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.no_grad():
            weight = torch.randn_like(form.run(*inputs))

        def forward():
            with torch.no_grad():
                return form.run(*inputs)

        kinds = {"forward": forward}
        if length <= (form.longest_backward or length):
            kinds["forward + backward"] = lambda: torch.autograd.grad(form.run(*leaves), leaves, weight)
        return kinds

    results = {
        "machine": machine(),
        "shape": {"batch": 1, "channels": channels, "states": states},
        "unit": "ns per token and channel",
    }
    rows: dict[str, dict[str, float]] = {name: {} for name in forms}
    for length in sizes:
        ready = {name: calls(form, length) for name, form in forms.items()}
        for kind in ("forward", "forward + backward"):
            with console.status(f"{kind}, {length} tokens"):
                runs = {name: kinds[kind] for name, kinds in ready.items() if kind in kinds}
                for name, taken in side_by_side(runs, budget).items():
                    rows[name][f"{kind} {length}"] = 1e9 * taken / (length * channels)
    results["rows"] = rows

    ours, ratios = rows["linescan"], {}
    for name, row in rows.items():
        ratios |= {f"{name} / linescan, {key}": value / ours[key] for key, value in row.items() if name != "linescan"}
    if cpu.missing() is None:
        bound = 1e9 * multiply_add_bound(states)
        results["multiply_add_bound"] = bound
        ratios |= {f"linescan / multiply-add bound, forward {n}": ours[f"forward {n}"] / bound for n in sizes}
    if threads > 1:
        length = sizes[len(sizes) // 2]
        for kind, run in calls(forms["linescan"], length).items():
            best = {1: float("inf"), threads: float("inf")}
            for count in [1, threads] * 5:  # in turns, and the best: other processes disturb both
                torch.set_num_threads(count)
                best[count] = min(best[count], seconds(run, budget / 10, pick=min, clock=time.perf_counter))
            torch.set_num_threads(1)
            ratios[f"1 thread / {threads} threads, {kind} {length}"] = best[1] / best[threads]
    results["ratios"] = ratios

    columns = [f"{kind} {length}" for kind in ("forward", "forward + backward") for length in sizes]
    table = Table("ns per token and channel", title=f"Selective scan, 1 thread, D = {channels}, N = {states}")
    for column in columns:
        table.add_column(column, justify="right", min_width=8)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.2f}" if c in row else "-" for c in columns))
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"  {name}: [bold]{ratio:.2f}[/]", highlight=False)

    def draw(axes):
        for name, row in rows.items():
            for kind, style in (("forward", "-"), ("forward + backward", "--")):
                points = [(n, row[f"{kind} {n}"]) for n in sizes if f"{kind} {n}" in row]
                colour = f"C{list(rows).index(name)}"
                axes.loglog(*zip(*points), style, marker="o", color=colour, label=name if style == "-" else None)
        axes.set_xticks(sizes, sizes)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="tokens", ylabel="ns per token and channel (dashed: with backward)")
        axes.legend()

    save(out, "scan", results, draw)


# -- the other recurrences --------------------------------------------------------------------------------------------


# Multiply-adds (or multiplications or additions alone) that the equations cost for a token, a route and an element of
# the state: forward, and forward and backward together. An exponential counts as the five of a polynomial. Of a matrix
# state only what is done to every element counts, not what is done to a row.
#
# Forward, with a state S (keys x values): its decay 1, if it has one; k v^T 1; the readout S^T q 1. The delta rules add
# what S answers to k, 1; DPLR what it answers to a, 1, and the write with b, 1.
#
# Backward, with the gradient R of S: S again without its readout; R = decay R + q do^T, 2, or 1 without a decay;
# dv = R^T k, dk = R v and dq = S do, 3; the gradient of a decay that is learned, S R, 1. The delta rules add three for
# their answer z = S^T k: R z and S dz, which are parts of dk, and R += k dz^T. DPLR adds four: dz = R^T b, db = R z,
# R += a dz^T and da = S dz.
#
# S6: the 9 of `multiply_add_bound`; backward its decays and states again, 7, the gradient of the state, 3, and those of
# A, delta, B, C and u, 6. HGRN: an exponential and the state, 6; backward both again, the gradient of the state, 1, and
# that of the gate, 1. WKV-4: two exponentials and two decayed sums, 10 + 4, then two exponentials and a quotient of two
# sums, 10 + 2; backward the same again, and 12 for the gradients of both sums, k and v. Bi-WKV has sums on both sides,
# 28, and one quotient with three exponentials, 17; backward the same again, and 24.
EQUATIONS: dict[str, tuple[int, int]] = {
    "selective_scan": (9, 25),
    "linear_attention": (2, 7),
    "simple_gla": (3, 11),
    "gla": (3, 11),
    "ssd": (3, 11),
    "wkv6": (3, 11),
    "gated_delta_rule": (4, 15),
    "dplr": (5, 19),
    "hgrn": (6, 14),
    "wkv4": (26, 64),
    "bi_wkv": (45, 114),
}
# Mixers whose recurrence needs less than the operator that serves it.
CHEAPER: dict[str, tuple[int, int]] = {"retention": (3, 10), "delta": (3, 11)}


def elements(name: str, inputs: list) -> int:
    """Elements of the states that a call of a recurrence updates: batch, routes, steps, and a state's own."""
    from linescan.scans import recurrences

    *inputs, route = inputs
    layout = recurrences()[name].layout
    output, states = layout.shapes(inputs, route)
    steps = output[2] if route is None else route.shape[-1]
    last = states[0] if states else (*output[:2], output[3])
    return steps * math.prod(last[:3] if name == "wkv4" else last)


MIXERS = (
    "s6 softmax ssd gla simple_gla retention hgrn2 linear delta gated_delta kda dplr wkv6 wkv7 hgrn rg_lru wkv4 bi_wkv4"
)


@app.command()
def recurrences(
    out: Out = Path("runs/benchmark"),
    lengths: Annotated[str, typer.Option(help="Numbers of tokens, squares.")] = "196,1024",
    mixers: Annotated[
        str, typer.Option(help="Mixers of scan_tiny; s6 and softmax are what the others are held to.")
    ] = MIXERS,
    depth: int = 4,
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 1.0,
):
    """scan_tiny with each mixer, forward and a training step, beside S6 and softmax; and each recurrence by itself.

    The latter beside the multiply-adds of its equation, at the pace that this core reaches in the same run, and beside
    its chunked torch form.
    """
    import linescan
    from linescan.scans import backend
    from linescan.scans.recurrence import Recurrence

    torch.set_num_threads(1)
    keep_memory()
    sizes = [int(length) for length in lengths.split(",")]
    rows: dict[str, dict[str, float]] = {}
    pace = multiply_add_bound(1) / 9

    def prepare(mixer: str, length: int):
        """The model's forward and training step, and the calls of recurrences in its first block."""
        torch.manual_seed(0)
        side = 16 * math.isqrt(length)
        model = linescan.create_model("scan_tiny", mixer=mixer, depth=depth, img_size=side)
        images, calls, call = torch.randn(1, 3, side, side), [], Recurrence.__call__

        def forward():
            with torch.inference_mode():
                model(images)

        def train():
            model(images).square().mean().backward()
            model.zero_grad(set_to_none=True)

        def recorded(self, *inputs, route=None, merge=None, **options):
            calls.append((self, inputs, route, merge))
            return call(self, *inputs, route=route, merge=merge, **options)

        Recurrence.__call__ = recorded
        try:
            with torch.no_grad():
                model(images)
        finally:
            Recurrence.__call__ = call
        return forward, train, calls[: len(calls) // depth]

    def alone(recurrence, inputs, route, merge) -> dict[str, Callable]:
        leaves = [
            x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs
        ]
        wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
        weight = torch.randn_like(recurrence(*leaves, route=route, merge=merge))

        def forward():
            with torch.no_grad():
                recurrence(*leaves, route=route, merge=merge)

        def both():
            torch.autograd.grad(recurrence(*leaves, route=route, merge=merge), wanted, weight)

        return {"forward": forward, "training": both}

    def in_form(form: str, run: Callable) -> None:
        with backend(form):
            run()

    for length in sizes:
        ready = {mixer: prepare(mixer, length) for mixer in mixers.split()}
        for at, kind in enumerate(("forward", "training")):
            with console.status(f"{kind}, {length} tokens"):
                taken = side_by_side({mixer: parts[at] for mixer, parts in ready.items()}, budget)
            for mixer, several in taken.items():
                row = rows.setdefault(mixer, {})
                row[f"{kind} {length}"] = 1e3 * several
                row |= {
                    f"{kind} {length} / {peer}": several / taken[peer] for peer in ("s6", "softmax") if peer in taken
                }
        for mixer, (*_, calls) in ready.items():
            if len(calls) != 1 or calls[0][0].name not in EQUATIONS:
                continue
            recurrence, inputs, route, merge = calls[0]
            count = elements(recurrence.name, [*recurrence.layout.check(inputs, route).fill(inputs), route])
            for kind, run in alone(*calls[0]).items():
                with console.status(f"{mixer} alone, {kind}, {length} tokens"):
                    taken = side_by_side({form: partial(in_form, form, run) for form in ("", "chunked")}, budget)
                cost = CHEAPER.get(mixer, EQUATIONS[recurrence.name])[kind == "training"]
                rows[mixer] |= {
                    f"{kind} {length}, recurrence": 1e3 * taken[""],
                    f"{kind} {length}, recurrence / bound": taken[""] / (cost * pace * count),
                    f"{kind} {length}, chunked / recurrence": taken["chunked"] / taken[""],
                }

    kinds = [f"{kind} {length}" for kind in ("forward", "training") for length in sizes]
    whole = Table("scan_tiny", *(heading for kind in kinds for heading in (f"{kind}, ms", "/ s6", "/ softmax")))
    single = Table("recurrence", *(h for kind in kinds for h in (f"{kind}, ms", "/ bound", "chunked /")))
    for mixer, row in rows.items():
        ends = ("", " / s6", " / softmax")
        whole.add_row(
            mixer, *(f"{row.get(kind + end, math.nan):.{2 if end else 1}f}" for kind in kinds for end in ends)
        )
        ends = (", recurrence", ", recurrence / bound", ", chunked / recurrence")
        if kinds[0] + ends[0] in row:
            single.add_row(mixer, *(f"{row[kind + end]:.2f}" for kind in kinds for end in ends))
    console.print(whole, single)

    def draw(axes):
        axes.axvline(1, color="grey", linewidth=0.8)
        for i, kind in enumerate(kinds):
            at = [j + 0.2 * (i - 1.5) for j in range(len(rows))]
            axes.barh(at, [row.get(f"{kind} / s6", math.nan) for row in rows.values()], 0.2, label=kind)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.set(xlabel=f"time of scan_tiny (depth {depth}) / that with s6, 1 thread")
        axes.legend()

    results = {"machine": machine(), "unit": "ms", "depth": depth, "multiply_add_ns": 1e9 * pace, "rows": rows}
    save(out, "recurrences", results, draw)


# Tokens, heads and the sides of a head's state, or the channels; what a kernel serves must be faster in all of them.
SHAPES = [(16, 6, 32, 32), (64, 1, 4, 4), (196, 6, 32, 32), (256, 2, 128, 128), (256, 1, 256, 256), (1024, 4, 64, 64)]


@app.command()
def kernels(
    out: Out = Path("runs/benchmark"),
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 0.5,
):
    """Every C++ kernel against the chunked torch form, float32, one thread, one sample and route: chunked / kernel.

    What serves a call must follow from this table: `tests/scans/data/kernels.json` and a test hold it.
    """
    from linescan.scans import backend
    from linescan.scans import recurrences as registered

    torch.set_num_threads(1)
    keep_memory()
    rows = []
    table = Table("chunked / kernel", *(f"{n}, {h} x {k} x {v}" for n, h, k, v in SHAPES))
    for name, recurrence in sorted(registered().items()):
        if "cpu" not in recurrence.implementations:
            continue
        layout, cells = recurrence.layout, []
        options = {key: 0.5 if key == "scale" else layout.sizes.get(key, 0) for key in layout.options}
        for length, heads, keys, values in SHAPES:
            sizes = {"H": heads, "dk": keys, "gates": keys, "dv": values, "P": values, "D": heads * values, "W": 4}
            sizes |= {"N": keys if "H" in layout.sizes else 16, "G": 1, "rank": 12}
            torch.manual_seed(0)
            tensors = layout.example(1, 1, length, without=layout.states, dtype=torch.float32, **sizes)
            leaves = {key: x.requires_grad_() for key, x in tensors.items()}
            inputs = [(options | leaves).get(key) for key in recurrence.parameters]

            def run(form: str, train: bool, recurrence=recurrence, inputs=inputs, leaves=leaves):
                with backend(form), torch.set_grad_enabled(train):
                    y = recurrence(*inputs)
                if train:
                    torch.autograd.grad(y.sum(), list(leaves.values()))

            row = {"recurrence": name, "length": length, "heads": heads, "keys": keys, "values": values}
            with console.status(f"{name}, {length} tokens"):
                for kind, train in (("forward", False), ("training", True)):
                    taken = side_by_side({form: partial(run, form, train) for form in ("chunked", "cpu")}, budget)
                    row[kind] = taken["chunked"] / taken["cpu"]
            rows.append(row)
            cells.append(f"{row['forward']:.1f} {row['training']:.1f}")
        table.add_row(name, *cells)
    console.print(table, "Each forward, then forward and backward.")

    def draw(axes):
        names = list(dict.fromkeys(row["recurrence"] for row in rows))
        for kind, marker in (("forward", "o"), ("training", "x")):
            axes.plot([row[kind] for row in rows], [names.index(row["recurrence"]) for row in rows], marker, label=kind)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(xscale="log", xlabel="chunked torch form / C++ kernel, 1 thread")
        axes.legend()

    save(out, "kernels", {"machine": machine(), "rows": rows}, draw)


# -- points and voxels -------------------------------------------------------------------------------------------------


def street(count: int, shape: tuple[int, int, int] = (32, 400, 400)) -> Tensor:
    """(N, 3) cells z, y, x of a hilly surface one or two cells thick, as of a scanner: about 6 neighbours each."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.randint(0, shape[1], (2, 4 * count), generator=generator)
    height = 8 + 4 * torch.sin(x / 20) + 4 * torch.cos(y / 15) + 1.5 * torch.rand(4 * count, generator=generator)
    cells = torch.stack((height.long(), y, x), 1).unique(dim=0)
    return cells[torch.randperm(len(cells), generator=generator)[:count]].contiguous()


def sampling(count: int, chosen: int) -> dict[str, Callable]:
    """Farthest point sampling, and the packages that have it; among points almost equally far they choose others."""
    from linescan.layers import points as ours
    from linescan.scans.kernels import cpu

    cloud = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))

    def loop():
        missing, cpu.missing = cpu.missing, lambda: "turned off"
        try:
            return ours.farthest_points(cloud, chosen)
        finally:
            cpu.missing = missing

    runs = {"linescan": lambda: ours.farthest_points(cloud, chosen), "linescan, torch loop": loop}
    if find_spec("torch_quickfps"):
        import torch_quickfps

        runs["torch-quickfps"] = lambda: torch_quickfps.sample_idx(cloud, chosen, h=7, start_idx=0)[None]
    if find_spec("fpsample"):
        import fpsample

        array = cloud.numpy()
        for name, sample in {
            "fpsample": fpsample.fps_sampling, "fpsample, in buckets": partial(fpsample.bucket_fps_kdline_sampling, h=7)
        }.items():  # fmt: skip
            runs[name] = partial(sample, array, chosen, start_idx=0)
    assert torch.equal(runs["linescan"](), loop()), "samplings differ"
    return runs


def neighbours(count: int, asked: int, k: int) -> dict[str, Callable]:
    """The k nearest of `count` points to `asked` of them."""
    from linescan.layers import points as ours

    cloud = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    queries = cloud[:asked]

    def all_distances():
        tree, ours._tree = ours._tree, lambda: None
        try:
            return ours.knn(cloud, queries, k)
        finally:
            ours._tree = tree

    def by_cdist():
        exact = "donot_use_mm_for_euclid_dist"
        return [torch.cdist(part, cloud, compute_mode=exact).topk(k, largest=False) for part in queries.split(64)]

    runs = {"linescan": lambda: ours.knn(cloud, queries, k), "linescan, all distances": all_distances}
    runs["torch.cdist and topk"] = by_cdist
    if find_spec("scipy"):
        from scipy.spatial import cKDTree

        runs["SciPy's k-d tree alone"] = lambda: cKDTree(cloud.numpy()).query(queries.numpy(), k)
    return runs


def convolution(count: int, channels: int) -> dict[str, Callable]:
    """A submanifold 3x3x3 convolution of `count` voxels: its parts, and other ways to compute the same."""
    from linescan.layers.sparse import Sites, SparseTensor, SubmanifoldConv

    torch.manual_seed(0)
    shape = (32, 400, 400)
    cells = street(count, shape)
    coords = torch.cat((torch.zeros_like(cells[:, :1]), cells), 1)
    conv = SubmanifoldConv(channels, channels)
    x = SparseTensor(torch.randn(len(coords), channels), Sites(coords, shape, 1))
    weight = conv.weight.detach().flatten(1, 3).transpose(0, 1).mT.flatten(0, 1)  # (27 in, out)
    neighbours = x.sites.neighbours((3, 3, 3), (1, 1, 1))
    table = torch.full((len(coords), 27), len(coords))  # one more row holds zeros
    everywhere = torch.arange(len(coords))
    for offset, (read, write) in enumerate(zip(neighbours.reads, neighbours.writes)):
        table[everywhere if write is None else write, offset] = everywhere if read is None else read

    def forward():
        with torch.no_grad():
            return conv(x).features

    def both():
        features = x.features.requires_grad_()
        return torch.autograd.grad(conv(x.replace(features)).features.sum(), (features, conv.weight))

    def gathered():
        rows = torch.cat((x.features.detach(), x.features.new_zeros(1, channels)))
        return torch.cat([rows[part].flatten(1) @ weight for part in table.split(4096)])

    def dense():
        with torch.no_grad():
            grid = x.dense()
            return torch.nn.functional.conv3d(grid, conv.weight.movedim(-1, 1), padding=1)

    assert torch.allclose(gathered(), forward(), atol=1e-3)
    return {
        "linescan, table of neighbours": lambda: Sites(coords, shape, 1).neighbours((3, 3, 3), (1, 1, 1)),
        "linescan, forward": forward,
        "linescan, forward + backward": both,
        "all 27 neighbours gathered, one product": gathered,
        "dense conv3d over the grid": dense,
    }


@app.command()
def points(
    out: Out = Path("runs/benchmark"),
    cloud: Annotated[int, typer.Option(help="Points of a cloud.")] = 120_000,
    chosen: Annotated[int, typer.Option(help="Points that are sampled, and that ask for neighbours.")] = 8_192,
    k: Annotated[int, typer.Option(help="Neighbours.")] = 32,
    voxels: int = 100_000,
    channels: int = 64,
    budget: Annotated[float, typer.Option(help="Seconds for each number; what takes longer is run three times.")] = 3.0,
):
    """Farthest point sampling, nearest neighbours and submanifold convolution beside the alternatives, one thread.

    torch-quickfps and fpsample are measured where they are installed.
    """
    torch.set_num_threads(1)
    keep_memory()
    sections = {
        f"{chosen:,} farthest of {cloud:,} points": sampling(cloud, chosen),
        f"{k} nearest of {cloud:,} points to {chosen:,}": neighbours(cloud, chosen, k),
        f"submanifold 3x3x3, {voxels:,} voxels, {channels} channels": convolution(voxels, channels),
    }
    rows: dict[str, dict[str, float]] = {}
    for title, runs in sections.items():
        with console.status(title):
            once = {name: run for name, run in runs.items() if name.startswith("dense")}  # half a minute
            taken = side_by_side({name: run for name, run in runs.items() if name not in once}, budget, turns=3)
            taken |= {name: seconds(run, budget) for name, run in once.items()}
        rows[title] = {name: 1e3 * several for name, several in taken.items()}
        table = Table(title, "ms", "/ linescan")
        first = next(value for name, value in rows[title].items() if name in ("linescan", "linescan, forward"))
        for name, value in rows[title].items():
            table.add_row(name, f"{value:.1f}", f"{value / first:.2f}")
        console.print(table)

    def draw(axes):
        names = [(title, name) for title, row in rows.items() for name in row][::-1]
        colours = [f"C{list(rows).index(title)}" for title, _ in names]
        axes.barh(range(len(names)), [rows[title][name] for title, name in names], color=colours)
        axes.set_yticks(range(len(names)), [name for _, name in names], fontsize=7)
        axes.set(xscale="log", xlabel="ms, one thread")

    save(out, "points", {"machine": machine(), "unit": "ms", "rows": rows}, draw)


def cloud_runs(name: str, batch: int, count: int) -> dict[str, Callable]:
    """A model of clouds of `count` points, and what of it makes groups or voxels of them.

    A detector ends with its backbone here: what is dense over the ground costs the same whatever the points.
    """
    import linescan
    from linescan.zoo import find

    torch.manual_seed(0)
    task = find(name).task
    if task == "point-classification":
        model = linescan.create_model(name, groups=min(max(count // 16, 64), 512), together=False).eval()
        points = torch.nn.functional.normalize(torch.randn(batch, count, 3), dim=-1)
        return {name: lambda: model(points), f"{name}, groups": lambda: model.group(points)}
    model = linescan.create_model(name).eval()
    low, high = torch.tensor(model.low), torch.tensor(model.high)
    ground = low[2] + 0.3 * (high[2] - low[2]) * torch.rand(batch, count, 1)  # a scan is a surface
    flat = low[:2] + (high[:2] - low[:2]) * torch.rand(batch, count, 2) ** 2
    points = torch.cat([flat, ground, torch.rand(batch, count, model.in_chans - 3)], -1)
    if task == "point-occupancy":
        return {name: lambda: model(points), f"{name}, voxels": lambda: model.levels(points)}
    return {name: lambda: model.backbone(model.encoder(points)), f"{name}, voxels": lambda: model.encoder(points)}


@app.command()
def clouds(
    out: Out = Path("runs/benchmark"),
    names: Annotated[str, typer.Option(help="Classifiers, LION's detectors and OccRWKV, with commas.")] = (
        "pointmamba_modelnet40,mamba3d_modelnet40,lion_mamba_kitti,occrwkv_semantickitti"
    ),
    sizes: Annotated[str, typer.Option(help="Numbers of points, with commas.")] = "1024,2048,4096,8192,16384,32768",
    batch: Annotated[int, typer.Option(help="Clouds in one forward pass.")] = 1,
    budget: Annotated[float, typer.Option(help="Seconds for each number; what takes longer is run three times.")] = 1.0,
):
    """Clouds per second of backbones against the number of points, one thread; groups are 1 of 16 points, 64 to 512.

    Beside each model the time of sampling and grouping alone, or of voxels, which is a part of it.
    """
    torch.set_num_threads(1)
    keep_memory()
    counts = [int(size) for size in sizes.split(",")]
    rows: dict[str, dict[int, float]] = {}
    for name in names.split(","):
        for count in counts:
            with torch.inference_mode(), console.status(f"{name}, {count:,} points"):
                taken = side_by_side(cloud_runs(name, batch, count), budget, turns=3)
            for what, several in taken.items():
                rows.setdefault(what, {})[count] = batch / several
    table = Table("clouds per second", *(f"{count:,} points" for count in counts))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    console.print(table)

    def draw(axes):
        for i, (name, row) in enumerate(rows.items()):
            axes.loglog(*zip(*row.items()), "--" if "," in name else "-", marker="o", color=f"C{i // 2}",
                        label=name)  # fmt: skip
        axes.set_xticks(counts, counts)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="points of a cloud", ylabel="clouds per second, one thread")
        axes.legend(fontsize=7)

    results = {"machine": machine(), "unit": "clouds per second", "batch": batch, "rows": rows}
    save(out, "clouds", results, draw)


def group_layers(names: list[str], groups: int, size: int, dim: int) -> dict[str, Callable]:
    """LION's operators, and a dense transformer layer (that of ViT), on the same groups."""
    from linescan.backbones.points.lion import OPERATORS
    from linescan.layers.rwkv import Place

    torch.manual_seed(0)
    x = torch.randn(groups, size, dim)
    dense = torch.nn.TransformerEncoderLayer(
        dim, dim // 32, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    layers = {"dense transformer": dense} | {name: OPERATORS[name](dim, Place(1, 34), 0.0).eval() for name in names}

    def forward(layer):
        def run():
            with torch.no_grad():
                return layer(x)

        return run

    return {name: forward(layer) for name, layer in layers.items()}


@app.command()
def groups(
    out: Out = Path("runs/benchmark"),
    names: Annotated[str, typer.Option(help="Operators of LION, with commas.")] = "mamba,retnet,rwkv,xlstm,ttt",
    sizes: Annotated[str, typer.Option(help="Voxels of a group, with commas.")] = "256,512,1024,2048,4096",
    voxels: Annotated[int, typer.Option(help="In all groups together.")] = 8_192,
    dim: int = 128,
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 3.0,
):
    """LION's operators beside a dense transformer layer on the same groups, forward, one thread."""
    torch.set_num_threads(1)
    keep_memory()
    rows: dict[str, dict[int, float]] = {}
    for size in map(int, sizes.split(",")):
        with console.status(f"groups of {size:,}"):
            taken = side_by_side(group_layers(names.split(","), max(voxels // size, 1), size, dim), budget)
        for name, several in taken.items():
            rows.setdefault(name, {})[size] = 1e3 * several
    table = Table(f"ms for {voxels:,} voxels", *(f"groups of {size}" for size in next(iter(rows.values()))))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
    console.print(table)

    def draw(axes):
        for i, (name, row) in enumerate(rows.items()):
            axes.loglog(*zip(*row.items()), "-" if i else "--", marker="o", color=f"C{i}" if i else "0.4", label=name)
        axes.set(xlabel="voxels of a group", ylabel=f"ms for {voxels:,} voxels, one thread")
        axes.legend()

    save(out, "groups", {"machine": machine(), "unit": "ms", "rows": rows}, draw)


# -- whole models -----------------------------------------------------------------------------------------------------


PLAIN = ("vim_tiny_patch16_224", "vig_tiny", "vrwkv_tiny", "vrwkv6_tiny", "local_vim_tiny")
HIERARCHICAL = ("vmamba_tiny_s1l8", "vig_h_tiny", "local_vssm_tiny", "segman_small")
PRODUCTS = ("linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn_convolution")  # that oneDNN computes


@app.command()
def models(
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    out: Out = Path("runs/benchmark"),
):
    """Plain models against timm's DeiT-Ti with SDPA, hierarchical ones against Swin-T, one image, one thread."""
    from linescan.cli import app as command

    for name, ours, peer, sizes in (
        ("plain", PLAIN, "deit_tiny_patch16_224", "224,512,1024"),
        ("hierarchical", HIERARCHICAL, "swin_tiny_patch4_window7_224", "224,512"),
    ):
        how = ["--against", peer, "--sizes", sizes, "--precision", precision, "--out", str(out / f"{name}-{precision}")]
        command(["benchmark", *ours, *how], standalone_mode=False)


@app.command()
def precision(
    models: Annotated[list[str], typer.Argument(help="timm names.")] = (
        "vim_tiny_patch16_224", "vmamba_tiny_s1l8", "vig_tiny", "vrwkv_tiny", "deit_tiny_patch16_224",
    ),
    budget: Annotated[float, typer.Option(help="Seconds for each row.")] = 10.0,
    out: Out = Path("runs/benchmark"),
):  # fmt: skip
    """Forwards of one image of 224 pixels in float32 and bfloat16, and what faster products alone would give."""
    from timm import create_model
    from torch.profiler import ProfilerActivity, profile

    import linescan  # noqa: F401

    torch.set_num_threads(1)
    keep_memory()
    rows = []
    table = Table("model", "float32, ms", "bfloat16, ms", "ratio", "products, ms", "in bfloat16", "bound of the ratio")
    for name in models:
        passes = {}
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = create_model(name).eval().to(dtype)
            passes[str(dtype)[6:]] = partial(model, torch.randn(1, 3, 224, 224, dtype=dtype))
        with torch.inference_mode():
            times = {key: 1e3 * value for key, value in side_by_side(passes, budget).items()}
            products = {}
            for key, run in passes.items():
                with profile(activities=[ProfilerActivity.CPU]) as profiled:
                    for _ in range(5):
                        run()
                spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
                share = sum(t for op, t in spent.items() if any(word in op for word in PRODUCTS)) / sum(spent.values())
                products[key] = share * times[key]
        bound = 1 - (products["float32"] - products["bfloat16"]) / times["float32"]
        rows.append({"model": name, **times, "products": products, "bound": bound})
        ratio = times["bfloat16"] / times["float32"]
        cells = *times.values(), ratio, *products.values(), bound
        table.add_row(name, *(f"{cell:.2f}" if cell < 2 else f"{cell:.1f}" for cell in cells))
    console.print(table)

    def draw(axes) -> None:
        for shift, key in ((-0.2, "float32"), (0.2, "bfloat16")):
            at = [i + shift for i in range(len(rows))]
            axes.barh(at, [row[key] for row in rows], 0.36, label=key)
            axes.barh(at, [row["products"][key] for row in rows], 0.36, color="0.3", alpha=0.5)
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.set_xlabel("ms at 224 pixels, one thread; dark: matrix products")
        axes.legend()

    save(out, "precision", {"machine": machine(), "unit": "ms", "rows": rows}, draw)


# -- memory at changing sizes -----------------------------------------------------------------------------------------

GROW = """
import random, sys, timm, linescan
from linescan.engine.benchmark import growth
random.seed(0)
sizes = [(32 * random.randrange(3, 15), 32 * random.randrange(3, 15)) for _ in range(int(sys.argv[2]))]
print(growth(timm.create_model(sys.argv[1]).eval(), [(448, 448)] * 2 + sizes))
"""


@app.command()
def memory(
    models: Annotated[list[str], typer.Argument(help="timm names.")] = (
        "vmamba_tiny_s1l8", "vim_tiny_patch16_224", "convnext_tiny", "convnext_atto",
    ),
    forwards: Annotated[int, typer.Option(min=2, help="Images, of random sizes between 96 and 448 pixels.")] = 300,
    out: Out = Path("runs/benchmark"),
):  # fmt: skip
    """What a process holds after images of changing sizes, with torch's caches of kernels as linescan bounds them."""
    rows = []
    for name in models:
        row = {"model": name}
        for entries in ("256", "1024"):
            caches = {"LRU_CACHE_CAPACITY": entries, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": entries}
            done = subprocess.run(
                [sys.executable, "-c", GROW, name, str(forwards)], env={**os.environ, **caches, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            row[entries] = float(done.stdout)
        rows.append(row)
        console.print(f"{name}: {row['256']:.0f} MB more, {row['1024']:.0f} with torch's own bounds")

    def draw(axes) -> None:
        for shift, entries, label in ((-0.2, "256", "256 kernels"), (0.2, "1024", "1024, torch's default")):
            axes.barh([i + shift for i in range(len(rows))], [row[entries] for row in rows], 0.4, label=label)
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.set_xlabel(f"MB held after {forwards} images of changing sizes")
        axes.legend()

    save(out, "memory", {"machine": machine(), "unit": "MB", "forwards": forwards, "rows": rows}, draw)


if __name__ == "__main__":
    app()
