#!/usr/bin/env python
"""Measures linescan against its peers on this machine: a table, a JSON file and a plot.

    python tools/benchmark.py scan          the selective scan on the CPU
    python tools/benchmark.py recurrences   every recurrence in the same model, beside S6, softmax and its own bound
    python tools/benchmark.py kernels       the CPU kernels against the chunked torch forms, over shapes
    python tools/benchmark.py threads       the CPU kernels on two threads against one
    python tools/benchmark.py points        sampling, neighbours and sparse convolution beside the alternatives
    python tools/benchmark.py clouds        models of point clouds against the number of points
    python tools/benchmark.py groups        LION's layers against a dense transformer layer on the same groups
    python tools/benchmark.py models        whole models against timm's DeiT-Ti and Swin-T
    python tools/benchmark.py precision     models in bfloat16 beside float32, and the bound that their products set
    python tools/benchmark.py memory        what stays in memory after images of changing sizes
    python tools/benchmark.py page FOLDER   writes the tables of a folder into docs/benchmarks/README.md

Peers run as their authors publish them: installed packages where there is one, else the published algorithm written
again from its description, each in its own memory layout. Numbers are medians over many runs on one thread, in CPU time
of the process, which other processes lengthen little; what is compared is measured in turns, so that it meets the same
disturbances. Several threads are timed by the wall clock, the best of turns.
"""

import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Callable, Collection, Iterable, NamedTuple, Sequence

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from linescan.engine.processes import keep_memory

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


def side_by_side(
    runs: dict[str, Callable[[], object]], budget: float, turns: int = 5, brief: Collection[str] = ()
) -> dict[str, float]:
    """Seconds of runs that are compared: the median of `turns` turns of `seconds`, `budget` seconds each in all, and a
    tenth of that for those in `brief`, which take no time.
    """
    times = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run, budget / turns * (0.1 if name in brief else 1.0)))
    return {name: median(several) for name, several in times.items()}


def machine() -> dict[str, object]:
    """Where and when; goes into every JSON file."""
    from linescan.engine import benchmark
    from linescan.scans.kernels import backend_info

    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        **benchmark.machine(),
        "python": platform.python_version(),
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
    return 9 * states * Pace().products


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
# that of the gate, 1. WKV-4: an exponential and e^k v, 5 + 1, two decayed sums, 2, and the sums of the quotient, which
# have e^u times the token's own, 2; backward the same again, and 12 for the gradients of the sums, 5, of k and v, 3, of
# w, 2, and of u, 2. Bi-WKV has sums on both sides, 4, and both in its quotient, 4; backward the same again, and 18: of
# the sums 9, of k and v 3, of w 4 and of u 2.
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
    "wkv4": (10, 32),
    "bi_wkv": (14, 46),
}
# Mixers whose recurrence needs less than the operator that serves it.
CHEAPER: dict[str, tuple[int, int]] = {"retention": (3, 10), "delta": (3, 11)}

# What else a call cannot do without, each measured in the same run: `bounds` puts it together.
#
# Functions: exponentials at the pace of the kernels' own, data in the cache, not the five multiply-adds above (EMBEDDED
# says how many of those are taken back for an element); quotients at the pace of a sigmoid less that of an exponential.
# HGRN has one exponential for a channel and token, and once more backward; WKV-4 and Bi-WKV one and a quotient, and
# both once more backward. S6 has one for an element, and once more backward, at the pace of the decays that its kernel
# makes, which comes with the product in the exponent; its step sizes are a softplus each, of a product with `rank`
# numbers, that backward is made again and has two gradients. Matrix states have an exponential for each log decay, both
# ways.
EMBEDDED: dict[str, int] = {"hgrn": 1, "wkv4": 1, "bi_wkv": 1}
#
# *In turn*: where nothing hides anything else. Tokens are read before there is something to do with them, and outputs
# and gradients written when it is done, so that arithmetic and memory add up; and no library reaches the pace of
# multiply-adds on matrices of 32 or 64, so that those of matrix states count at the pace of torch's own product of 64
# tokens of such heads, data in the cache.
#
# Numbers that the backward keeps for a token and an element of the state and reads again: all states of S6; a state in
# BLOCK = 4 tokens of matrix states that decay; the states of HGRN before every token, but none of WKV-4, whose sums are
# made anew; of Bi-WKV the gradients of both sums on one side.
KEPT: dict[str, float] = {"selective_scan": 1, "hgrn": 1, "wkv4": 0, "bi_wkv": 2}
# The axis of a state whose elements have no arithmetic of their own: twice as long, only what belongs to elements
# doubles, so that what belongs to tokens and rows of the state is 2 T(n) - T(2 n).
LONGER: dict[str, str] = {"selective_scan": "N", "ssd": "P"}
WANTED = {"forward": 1.5, "training": 2.0}  # times the multiply-adds
LONGEST = {"kda": 3.0, "dplr": 3.0, "wkv7": 3.0}  # times S6 in the same model; others twice


class Call(NamedTuple):
    """A call of a recurrence, its inputs checked and filled."""

    recurrence: object
    inputs: list
    route: Tensor | None
    merge: str | None

    @property
    def name(self) -> str:
        return self.recurrence.name

    @property
    def tokens(self) -> list[Tensor]:
        """Token inputs that are there."""
        return [self.inputs[at] for at in self.recurrence.layout.token_positions if self.inputs[at] is not None]

    @property
    def shapes(self) -> tuple[tuple, tuple, int]:
        """Of the output and the state, without the three numbers of a channel of WKV, and the number of steps."""
        output, states = self.recurrence.layout.shapes(self.inputs, self.route)
        last = states[0] if states else (*output[:2], output[3])
        steps = output[2] if self.route is None else self.route.shape[-1]
        return output, last[:3] if self.name == "wkv4" else last, steps

    @property
    def elements(self) -> int:
        """Elements of the states that the call updates: batch, routes, steps, and a state's own."""
        _, state, steps = self.shapes
        return steps * math.prod(state)

    @property
    def is_matrix(self) -> bool:
        return len(self.shapes[1]) == 5

    def runs(self) -> dict[str, Callable]:
        """Its forward, and forward and backward."""
        recurrence, inputs, route, merge = self
        is_float = [torch.is_tensor(x) and x.is_floating_point() for x in inputs]
        leaves = [x.detach().clone().requires_grad_() if ok else x for x, ok in zip(inputs, is_float)]
        wanted = [x for x, ok in zip(leaves, is_float) if ok]
        weight = torch.randn_like(recurrence(*leaves, route=route, merge=merge))

        def forward():
            with torch.no_grad():
                recurrence(*leaves, route=route, merge=merge)

        def both():
            torch.autograd.grad(recurrence(*leaves, route=route, merge=merge), wanted, weight)

        return {"forward": forward, "training": both}

    def of_a_token(self) -> "Call":
        """The same of one token: what is left is Python's, torch's and the parameters'."""
        inputs = list(self.inputs)
        for at in self.recurrence.layout.token_positions:
            inputs[at] = None if inputs[at] is None else inputs[at][:, :, :1]
        route = None if self.route is None else torch.zeros_like(self.route[..., :1])
        return self._replace(inputs=inputs, route=route)

    def longer(self) -> "Call | None":
        """The same with states twice as large, if these have an axis that allows it."""
        axis, inputs = LONGER.get(self.name, "dv" if self.is_matrix else ""), list(self.inputs)
        layout = self.recurrence.layout
        for at, key in enumerate(layout.parameters):
            if key not in layout.arguments or inputs[at] is None:
                continue
            axes = [part.text for part in layout.arguments[key].axes]
            if axis in axes:  # counted from the end: one in front may be missing
                inputs[at] = torch.cat([inputs[at]] * 2, axes.index(axis) - len(axes))
        return self._replace(inputs=inputs) if axis else None

    def moves(self, widest: int = 384, back: int = 384) -> dict[str, Callable]:
        """Reads all token inputs along the routes and writes the output, as the kernels go: head by head, or in blocks
        of at most `widest` channels. Backward: reads them and the output's gradient, and writes their own, in blocks of
        at most `back`. Sums on both sides of a token are not there before the tokens were gone through once, and their
        gradients neither.
        """
        move = torch.ops.linescan_cpu.move_rows

        def rows(x: Tensor) -> tuple[Tensor, int]:
            return x.detach().flatten(3), min(x.shape[-1], 192 if len(self.shapes[1]) == 3 else 384)

        inputs = [rows(x) for x in self.tokens]
        read = inputs * (2 if self.name == "bi_wkv" else 1)
        batch, routes, *others = self.shapes[0]
        output = rows(torch.empty(batch, 1 if self.merge else routes, *others))  # of one sum, every route fills it
        gradients = [(torch.empty_like(x, memory_format=torch.contiguous_format), n) for x, n in inputs]

        def go(tensors: Iterable[tuple[Tensor, int]], most: int, fill: bool) -> None:
            for x, width in tensors:
                move(x, self.route, min(width, most), fill)

        def forward():
            go(read, widest, False)
            go([output], widest, True)

        def both():
            forward()
            go((*read, output), back, False)
            go(gradients, back, True)

        return {"forward": forward, "training": both}


def calls_of(run: Callable) -> list[Call]:
    """The calls of recurrences in a forward."""
    from linescan.scans.recurrence import Recurrence

    calls, call = [], Recurrence.__call__

    def recorded(self, *inputs, route=None, merge=None, **options):
        filled = list(self.layout.check(inputs, route).fill(inputs))
        calls.append(Call(self, [x.detach() if torch.is_tensor(x) else x for x in filled], route, merge))
        return call(self, *inputs, route=route, merge=merge, **options)

    Recurrence.__call__ = recorded
    try:
        with torch.no_grad():
            run()
    finally:
        Recurrence.__call__ = call
    return calls


ROUNDS = 200_000  # of 16 vectors of multiply-adds
FUNCTIONS = ("exponential", "softplus", "sigmoid", "decay")


def heads_product(keys: int, values: int) -> tuple[int, Callable]:
    """Multiply-adds of torch's product of 64 tokens of some heads, (64, keys) x (keys, values), and a run of it."""
    count = max(1, (1 << 20) // (64 * keys * values))
    q, state, y = (torch.zeros(count, *shape) for shape in ((64, keys), (keys, values), (64, values)))
    return count * 64 * keys * values, partial(torch.bmm, q, state, out=y)


def copying(size: int) -> tuple[int, Callable]:
    """The power of two of bytes, half read and half written, that stands for `size`, and a run that copies them."""
    power = min(max(size.bit_length(), 16), 27)
    x = torch.zeros(1 << power - 3)
    return power, partial(torch.empty_like(x).copy_, x)


class Pace:
    """Seconds that this core takes just now: `products` for a multiply-add, functions for one, `heads` for a
    multiply-add of torch's product of heads, if that was measured.

    Args:
        taken: times of `runs`, measured beside what they are compared with, as a core's speed changes within minutes;
            by default they are measured here.
    """

    NUMBERS, FEW = 1 << 16, 1 << 13

    def __init__(self, taken: dict[str, float] | None = None):
        if taken is None:
            taken = {name: seconds(run, budget=0.2, pick=min) for name, run in self.runs().items()}
        self.products = taken["multiply-adds"] / (ROUNDS * 16 * torch.ops.linescan_cpu.multiply_add(0))
        for name in FUNCTIONS:
            few, all_ = taken[f"{name}, few"], taken[name]
            setattr(self, name, max(all_ - few, 0.5 * all_) / (self.NUMBERS - self.FEW))  # without the call
        self.quotient = max(self.sigmoid - self.exponential, 0.0)
        self._nothing = taken["nothing"]
        self.heads = None
        for name in (name for name in taken if name.startswith("heads ")):
            keys, values = map(int, name.split()[1:])
            self.heads = (taken[name] - self._nothing) / heads_product(keys, values)[0]
        self._copies = {int(name.split()[1]): time for name, time in taken.items() if name.startswith("copies ")}

    @classmethod
    def runs(cls, size: int = 0, heads: tuple[int, int] | None = None) -> dict[str, Callable]:
        """All that is timed for it, for `copy(size)` and for products of heads (keys, values); every run is short."""
        x = torch.linspace(-4, 4, cls.NUMBERS)
        y, few = torch.empty_like(x), cls.FEW
        runs = {"multiply-adds": partial(torch.ops.linescan_cpu.multiply_add, ROUNDS)}
        for which, name in enumerate(FUNCTIONS):
            runs[name] = partial(torch.ops.linescan_cpu.unary, which, x, y)
            runs[f"{name}, few"] = partial(torch.ops.linescan_cpu.unary, which, x[:few], y[:few])
        runs["nothing"] = partial(y[:1].copy_, x[:1])
        if size:
            power, run = copying(size)
            runs[f"copies {power}"] = run
        if heads:
            runs["heads {} {}".format(*heads)] = heads_product(*heads)[1]
        return runs

    def copy(self, size: int) -> float:
        """Seconds for a byte that is read or written, where `size` bytes are gone through again and again."""
        power, run = copying(size)
        if power not in self._copies:
            self._copies[power] = seconds(run, budget=0.2)
        taken = self._copies[power]
        return max(taken - self._nothing, 0.2 * taken) / (1 << power)


def kept(call: Call) -> tuple[float, int]:
    """Numbers that a call's backward keeps for an element of the state and a token, and the bytes that it goes through
    with them at a time."""
    _, state, steps = call.shapes
    given = dict(zip(call.recurrence.parameters, call.inputs))
    decays = call.name != "linear_attention" and not (call.name == "gated_delta_rule" and given["g"] is None)
    numbers = KEPT.get(call.name, 0.25 * (call.is_matrix and decays))
    return numbers, int(min(4 * numbers * steps * math.prod(state[2:]), 640 << 10))


def bounds(mixer: str, call: Call, pace: Pace, kind: str, once: float, moved: float) -> dict[str, float]:
    """Lower bounds of a call's seconds, from the times of the same call on a token and of its rows' moves; and what its
    parts take in turn.

    The call's own time comes on top of all, and one unit computes both products and functions: these are sums. Loads
    and stores run beside them on units of their own, so of the two the larger counts for the bound.
    """
    _, state, steps = call.shapes
    backward = kind == "training"
    cost = CHEAPER.get(mixer, EQUATIONS.get(call.name, (0, 0)))[backward]
    channels, times = steps * math.prod(state[:3]), 1 + backward
    embedded = EMBEDDED.get(call.name, 0)
    products, functions = (cost - 5 * embedded * times) * call.elements, embedded * times * channels * pace.exponential
    if call.name in ("wkv4", "bi_wkv"):
        functions += times * channels * pace.quotient
    given = dict(zip(call.recurrence.parameters, call.inputs))
    if call.name == "selective_scan":
        products -= 6 * times * call.elements
        functions += times * call.elements * pace.decay
        functions += times * channels * pace.softplus * bool(given["delta_softplus"])
        rank = 0 if given["delta_weight"] is None else given["delta_weight"].shape[-1]
        products += channels * rank * (4 if backward else 1)
        functions += 0 if given["z"] is None else times * given["z"].numel() * pace.sigmoid
    elif call.is_matrix:
        gate = next((given[name] for name in ("g", "w", "dt") if given.get(name) is not None), None)
        if gate is not None:
            functions += times * steps * math.prod(state[:2]) * math.prod(gate.shape[3:]) * pace.exponential
    numbers, room = kept(call)
    stored = 8 * numbers * call.elements * pace.copy(room) if backward else 0.0
    arithmetic, in_heads = products * pace.products + functions, 0.0
    if call.is_matrix and pace.heads:
        in_heads = products * (pace.heads - pace.products)
    return {
        "call": once,
        "products": cost * call.elements * pace.products,
        "arithmetic": arithmetic,
        "loads and stores": moved + stored,
        "bound": once + max(arithmetic, moved + stored),
        "in turn": once + arithmetic + in_heads + moved + stored,
    }


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

    The latter beside its bounds, all measured in the same run: the multiply-adds of its equation; and what a call, its
    arithmetic, and its loads and stores take. Also beside the part of its time that belongs to the elements of its
    state, and to its chunked torch form. What is slower than wanted is listed with the reason.
    """
    import linescan
    from linescan.scans import backend
    from linescan.scans.kernels import cpu

    if cpu.missing():
        raise typer.BadParameter("the CPU kernels are missing or old: python setup.py build_ext --inplace")
    torch.set_num_threads(1)
    keep_memory()
    sizes = [int(length) for length in lengths.split(",")]
    rows: dict[str, dict[str, float]] = {}
    alone: list[dict] = []
    known: dict[tuple, float] = {}

    def prepare(mixer: str, length: int):
        """The model's forward and training step, the calls of recurrences in its first block, and what both take at
        least without these."""
        torch.manual_seed(0)
        side = 16 * math.isqrt(length)
        model = linescan.create_model("scan_tiny", mixer=mixer, depth=depth, img_size=side)
        images = torch.randn(1, 3, side, side)

        def forward():
            with torch.inference_mode():
                model(images)

        def train():
            model(images).square().mean().backward()
            model.zero_grad(set_to_none=True)

        calls = calls_of(partial(model, images))
        with console.status(f"the products of {mixer}, {length} tokens"):
            with torch.no_grad():
                products = {"forward": least_of_products(partial(model, images), known)}
            products["training"] = least_of_products(train, known)
        return forward, train, calls[: len(calls) // depth], products

    def in_form(form: str, run: Callable) -> None:
        with backend(form):
            run()

    for length in sizes:
        ready = {mixer: prepare(mixer, length) for mixer in mixers.split()}
        for at, kind in enumerate(("forward", "training")):
            with console.status(f"{kind}, {length} tokens"):
                taken = side_by_side({mixer: parts[at] for mixer, parts in ready.items()}, budget, turns=7)
            for mixer, several in taken.items():
                row = rows.setdefault(mixer, {})
                row[f"{kind} {length}"] = 1e3 * several
                row |= {
                    f"{kind} {length} / {peer}": several / taken[peer] for peer in ("s6", "softmax") if peer in taken
                }
        for mixer, (*_, calls, products) in ready.items():
            if not calls:
                rows[mixer] |= {f"{kind} {length} least": 1e3 * taken for kind, taken in products.items()}
            if len(calls) != 1 or calls[0].name not in EQUATIONS:
                continue
            call = calls[0]
            longer, moves, token = call.longer(), call.moves(), call.of_a_token()
            small = token.moves()
            for kind, run in call.runs().items():
                runs = {"": run, "call": token.runs()[kind], "moves": moves[kind], "no moves": small[kind]}
                if longer is not None:
                    runs["longer"] = longer.runs()[kind]
                heads = call.shapes[1][3:] if call.is_matrix else None
                of_pace = Pace.runs(kept(call)[1] if kind == "training" else 0, heads)
                with console.status(f"{mixer} alone, {kind}, {length} tokens"):
                    taken = side_by_side(runs | of_pace, budget, turns=11, brief={"call", "no moves", *of_pace})
                    chunked = side_by_side({"": run, "chunked": partial(in_form, "chunked", run)}, budget / 2, turns=3)
                moved, pace = max(taken["moves"] - taken["no moves"], 0.0), Pace(taken)
                parts = bounds(mixer, call, pace, kind, taken["call"], moved)
                rows[mixer][f"{kind} {length} least"] = 1e3 * (products[kind] + depth * parts["bound"])
                rows[mixer][f"{kind} {length} beyond"] = 1e3 * depth * (taken[""] - parts["bound"])
                row = {"mixer": mixer, "kind": kind, "tokens": length, "ms": 1e3 * taken[""]}
                row |= {f"{name}, ms": 1e3 * part for name, part in parts.items()}
                row |= {f"{name}, ns": 1e9 * each for name, each in vars(pace).items() if name[0] != "_" and each}
                row |= {f"/ {name}": taken[""] / parts[name] for name in ("products", "bound", "in turn")}
                if longer is not None:
                    of_elements = min(max(taken["longer"] - taken[""], 0.0), taken[""])
                    row |= {"elements, ms": 1e3 * of_elements, "elements / products": of_elements / parts["products"]}
                alone.append(row | {"chunked /": chunked["chunked"] / chunked[""]})

    kinds = [f"{kind} {length}" for kind in ("forward", "training") for length in sizes]
    whole = Table("scan_tiny", *(heading for kind in kinds for heading in (f"{kind}, ms", "/ s6", "/ softmax")))
    for mixer, row in rows.items():
        ends = ("", " / s6", " / softmax")
        whole.add_row(
            mixer, *(f"{row.get(kind + end, math.nan):.{2 if end else 1}f}" for kind in kinds for end in ends)
        )
    console.print(whole)
    at_least = Table(
        "at least", *(heading for kind in kinds for heading in (f"{kind}, ms", "/ softmax's", "of its time"))
    )
    for mixer, row in rows.items():
        at_least.add_row(mixer, *(cell for kind in kinds for cell in of_least(rows, mixer, kind)))
    console.print(at_least)
    columns = (
        "ms", "products, ms", "/ products", "call, ms", "arithmetic, ms", "loads and stores, ms", "bound, ms",
        "/ bound", "in turn, ms", "/ in turn", "elements / products", "chunked /",
    )  # fmt: skip
    for kind in kinds:
        table = Table(kind, *columns)
        for row in alone:
            if kind == f"{row['kind']} {row['tokens']}":
                table.add_row(row["mixer"], *(f"{row[key]:.2f}" if key in row else "-" for key in columns))
        console.print(table)
    missed = []
    for mixer, row in rows.items():
        for kind in kinds:
            behind, most = row.get(f"{kind} / s6", 0.0), LONGEST.get(mixer, 2.0)
            taken, against, share = of_least(rows, mixer, kind)
            why = f"; at least it takes {taken} ms, {share} of its time and {against} times what softmax takes at least"
            beyond = row.get(f"{kind} beyond", math.nan) / row[kind]
            why += f", and its recurrences beyond their bounds {beyond:.0%} of its time"
            if mixer != "softmax" and behind > most:
                missed.append(f"scan_tiny with {mixer}, {kind}: {behind:.2f} times S6 (wanted {most}){why}")
            if kind.endswith(" 1024") and row.get(f"{kind} / softmax", 0.0) > 1:
                times = row[f"{kind} / softmax"]
                missed.append(f"scan_tiny with {mixer}, {kind}: {times:.2f} times softmax (wanted 1){why}")
    missed += [line for row in alone for line in reasons(row)]
    console.print(*missed, sep="\n", highlight=False)

    def draw(axes):
        axes.axvline(1, color="grey", linewidth=0.8)
        for i, kind in enumerate(kinds):
            at = [j + 0.2 * (i - 1.5) for j in range(len(rows))]
            axes.barh(at, [row.get(f"{kind} / s6", math.nan) for row in rows.values()], 0.2, label=kind)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.set(xlabel=f"time of scan_tiny (depth {depth}) / that with s6, 1 thread")
        axes.legend()

    results = {"machine": machine(), "unit": "ms", "depth": depth, "rows": rows, "alone": alone}
    save(out, "recurrences", results | {"missed": missed}, draw)


def of_least(rows: dict[str, dict], mixer: str, kind: str) -> tuple[str, str, str]:
    """What `scan_tiny` with a mixer takes at least, ms; that over the same of softmax; and over its own time.

    That is: the products, convolutions and attentions of its forward, and in training those of its gradients too, each
    by itself in the shapes it has, and its recurrences at their bounds.
    """
    key = f"{kind} least"
    least = rows[mixer].get(key, math.nan)
    peer = rows.get("softmax", {}).get(key, math.nan)
    return f"{least:.1f}", f"{least / peer:.2f}", f"{least / rows[mixer][kind]:.0%}"


def reasons(row: dict) -> list[str]:
    """Why a recurrence takes more than the wanted multiple of its multiply-adds, as far as it was measured; or none."""
    wanted = WANTED[row["kind"]]
    if row["/ products"] <= wanted:
        return []
    line = f"{row['mixer']}, {row['kind']} {row['tokens']}: {row['/ products']:.2f} of its products (wanted {wanted})"
    shares = {
        "the call": row["call, ms"],
        "products and functions": row["arithmetic, ms"],
        "loads and stores of tokens and kept states": row["loads and stores, ms"],
    }
    line += "; of its time " + ", ".join(f"{name} {part / row['ms']:.0%}" for name, part in shares.items())
    line += f", so that it is at {row['/ bound']:.2f} of its bound"
    line += f", and of its parts in turn, with the libraries' products of such heads, at {row['/ in turn']:.2f}"
    if "elements, ms" in row:
        line += (
            f"; what is done to elements of the state takes {row['elements / products']:.2f} of their products, "
            f"the rest, {1 - row['elements, ms'] / row['ms']:.0%} of the time, belongs to tokens and rows"
        )
    return [line]


# Tokens, heads and the sides of a head's state, or the channels; what a kernel serves must be faster in all of them.
SHAPES = [(16, 6, 32, 32), (64, 1, 4, 4), (196, 6, 32, 32), (256, 2, 128, 128), (256, 1, 256, 256), (1024, 4, 64, 64)]


def kernel_call(name: str, length: int, heads: int, keys: int, values: int) -> Callable[[str, bool], None]:
    """A function (form, whether to train) that runs a recurrence on an example, float32, one sample and route."""
    from linescan.scans import backend
    from linescan.scans import recurrences as registered

    recurrence = registered()[name]
    layout = recurrence.layout
    options = {"scale": 0.5, "delta_softplus": True}  # a step size of any sign makes states without end
    options = {key: options.get(key, layout.sizes.get(key, 0)) for key in layout.options}
    sizes = {"H": heads, "dk": keys, "gates": keys, "dv": values, "P": values, "D": heads * values, "W": 4}
    sizes |= {"N": keys if "H" in layout.sizes else 16, "G": 1, "rank": 12}
    torch.manual_seed(0)
    tensors = layout.example(1, 1, length, without=layout.states, dtype=torch.float32, **sizes)
    leaves = {key: x.requires_grad_() for key, x in tensors.items()}
    inputs = [(options | leaves).get(key) for key in recurrence.parameters]

    with torch.no_grad():
        weight = torch.ones_like(recurrence(*inputs))

    def run(form: str, train: bool) -> None:
        with backend(form), torch.set_grad_enabled(train):
            y = recurrence(*inputs)
        if train:
            torch.autograd.grad(y, list(leaves.values()), weight)

    return run


def served() -> list[str]:
    """Recurrences that have a C++ kernel."""
    from linescan.scans import recurrences as registered

    return [name for name, recurrence in sorted(registered().items()) if "cpu" in recurrence.implementations]


@app.command()
def kernels(
    out: Out = Path("runs/benchmark"),
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 0.5,
):
    """Every C++ kernel against the chunked torch form, float32, one thread, one sample and route: chunked / kernel.

    What serves a call must follow from this table: `tests/scans/data/kernels.json` and a test hold it.
    """
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    table = Table("chunked / kernel", *(f"{n}, {h} x {k} x {v}" for n, h, k, v in SHAPES))
    for name in served():
        cells = []
        for length, heads, keys, values in SHAPES:
            run = kernel_call(name, length, heads, keys, values)
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


THREADED = 1024, 6, 64, 64  # tokens, heads and the sides of a head's state, or 384 channels


def companion(pipe) -> None:
    """In a process of its own: runs the kernel that it is told to until it is told to stop; tells the least time."""
    torch.set_num_threads(1)
    keep_memory()
    while (told := pipe.recv()) is not None:
        run = kernel_call(told[0], *THREADED)
        run("cpu", told[1])
        pipe.send("runs")
        least = math.inf
        while not pipe.poll():
            start = time.perf_counter()
            run("cpu", told[1])
            least = min(least, time.perf_counter() - start)
        pipe.recv()
        pipe.send(least)


@app.command()
def threads(
    out: Out = Path("runs/benchmark"),
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 1.0,
):
    """Every C++ kernel on two threads against one, float32, one sample, by the wall clock, the best of turns.

    Beside it the bound that this machine sets: twice what the slower core keeps of the pace while a process on each
    does the same; and what is left of that where the call itself is not shared, and reading and writing the rows of
    tokens takes what it takes on two threads: two cores that write parts of the same rows wait for each other.
    """
    keep_memory()
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=companion, args=(other,), daemon=True)
    process.start()
    turns = 28  # of all kernels, since what else the machine does comes and goes within seconds
    wall = partial(seconds, budget=budget / 20, pick=min, clock=time.perf_counter)
    runs: dict[tuple[str, str], dict[str, Callable]] = {}
    for name in served():
        run, token = kernel_call(name, *THREADED), kernel_call(name, 1, *THREADED[1:])
        (call,) = calls_of(partial(run, "cpu", False))
        for kind, moves in call.moves(widest=192, back=96).items():
            train = kind == "training"
            runs[name, kind] = {"": partial(run, "cpu", train), "call": partial(token, "cpu", train), "rows, ": moves}
    keys = "one", "two", "beside", "call", "rows, one", "rows, two"
    taken = {both: dict.fromkeys(keys, math.inf) for both in runs}

    def measure(both: tuple[str, str], which: str, key: str) -> None:
        taken[both][key] = min(taken[both][key], wall(runs[both][which]))

    for turn in range(turns):
        for both in runs:
            with console.status(f"{' '.join(both)}, turn {turn + 1} of {turns}"):
                for count, number in ((1, "one"), (2, "two")):
                    torch.set_num_threads(count)
                    for which in ("", "rows, "):
                        measure(both, which, which + number)
                torch.set_num_threads(1)
                measure(both, "call", "call")
                pipe.send((both[0], both[1] == "training"))
                pipe.recv()
                own = wall(runs[both][""])
                pipe.send("enough")
                taken[both]["beside"] = min(taken[both]["beside"], max(own, pipe.recv()))
    pipe.send(None)
    process.join()
    headings = "1 / 2 threads", "bound", "with rows"
    rows, table = [], Table("kernel", *(f"{kind}, {heading}" for kind in WANTED for heading in headings))
    for name in served():
        cells = []
        for kind in WANTED:
            best = taken[name, kind]
            gain, bound = best["one"] / best["two"], 2 * best["one"] / best["beside"]
            shared = max(best["one"] - best["call"] - best["rows, one"], 0.0) / bound
            with_rows = min(bound, best["one"] / (best["call"] + shared + best["rows, two"]))
            row = {"kernel": name, "kind": kind, "gain": gain, "bound": bound, "with rows": with_rows}
            rows.append(row | {f"{key}, ms": 1e3 * time for key, time in best.items()})
            cells += [f"{gain:.2f}", f"{bound:.2f}", f"{with_rows:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
    missed = [
        f"{row['kernel']}, {row['kind']}: {row['gain']:.2f} times (wanted 1.8), {row['gain'] / row['bound']:.0%} of "
        f"what two processes reach here, {row['gain'] / row['with rows']:.0%} of what call and rows leave of it"
        for row in rows
        if row["gain"] < 1.8
    ]
    console.print(*missed, sep="\n", highlight=False)

    def draw(axes):
        names = list(dict.fromkeys(row["kernel"] for row in rows))
        for kind, marker in zip(WANTED, "ox"):
            some = [row for row in rows if row["kind"] == kind]
            at = [names.index(row["kernel"]) for row in some]
            axes.plot([row["gain"] for row in some], at, marker, label=kind)
            axes.plot([row["bound"] for row in some], at, "|", color="grey", markersize=12)
        axes.axvline(1.8, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(xlabel="time on one thread / on two; grey: what two processes reach")
        axes.legend()

    save(out, "threads", {"machine": machine(), "shape": THREADED, "rows": rows, "missed": missed}, draw)


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


@dataclass(frozen=True)
class Group:
    """Models that are compared with one of timm, and the multiples of its time that are wanted of them by size."""

    models: tuple[str, ...]
    peer: str
    wanted: dict[int, float]
    dim: int  # of the linear layers whose pace counts, from it to its fourfold
    stride: int = 16


GROUPS = {
    "plain": Group(PLAIN, "deit_tiny_patch16_224", {224: 1.5, 512: 1.0, 1024: 0.45}, 192),
    "hierarchical": Group(HIERARCHICAL, "swin_tiny_patch4_window7_224", {224: 1.2, 512: 1.0}, 384),
}


def operations(run: Callable) -> tuple[dict[str, int], float]:
    """Floating-point operations of a forward by kind, two for a multiply-add; and the multiply-adds of its scans.

    The counters have 9 operations for an element of S6's state, an exponential being one of them; EQUATIONS has 9
    multiply-adds, of which that is five.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    kinds, multiply_adds = {"products": 0, "convolutions": 0, "attention": 0, "scans": 0}, 0.0
    words = {"linescan.": "scans", "scaled_dot_product": "attention", "convolution": "convolutions"}
    for operator, count in counter.get_flop_counts()["Global"].items():
        name = str(operator)
        kind = next((kind for word, kind in words.items() if word in name), "products")
        kinds[kind] += count
        multiply_adds += 0 if kind != "scans" else count if "selective_scan" in name else count / 2
    return kinds, multiply_adds


def products_of(run: Callable) -> dict[tuple, list]:
    """The products, convolutions and attentions of a run: each of another shape as (what does it again, how often)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    products: dict[tuple, list] = {}
    words = "aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "convolution", "scaled_dot_product"

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if any(word in str(operator) for word in words):
                key = str(operator), shapes(args), shapes(kwargs.values())
                products.setdefault(key, [partial(operator, *args, **kwargs), 0])[1] += 1
            return operator(*args, **kwargs)

    with Recording():
        run()
    return products


def shapes(inputs: Iterable) -> tuple:
    return tuple((tuple(x.shape), x.stride()) if torch.is_tensor(x) else str(x) for x in inputs)


def least_of_products(run: Callable, known: dict[tuple, float], budget: float = 0.1) -> float:
    """Seconds that a run's products, convolutions and attentions take, each by itself in the shapes it has; `budget`
    seconds are measured for each that is not yet among those `known`.
    """
    products = products_of(run)
    with torch.inference_mode():
        for key, (product, _) in products.items():
            if key not in known:
                known[key] = seconds(product, budget, pick=min)
    return sum(count * known[key] for key, (_, count) in products.items())


def of_shapes(calls: Iterable[Call]) -> Iterable[list]:
    """Of calls with equal shapes one, and how many they are."""
    found: dict[tuple, list] = {}
    for call in calls:
        key = call.name, shapes(call.inputs), None if call.route is None else tuple(call.route.shape), call.merge
        found.setdefault(key, [call, 0])[1] += 1
    return found.values()


def least(run: Callable, pace: Pace, budget: float = 0.05) -> tuple[float, float]:
    """Seconds that a forward's products, convolutions and attentions take, each by itself in the shapes it has, and its
    recurrences at their bounds; and with the recurrences, too, as they are by themselves. `budget` seconds are measured
    for each of them, those of equal shapes once.
    """
    with torch.no_grad():
        total = parts = least_of_products(run, {}, budget)
    for call, count in of_shapes(calls_of(run)):
        token = call.of_a_token()
        runs = token.runs()["forward"], call.moves()["forward"], token.moves()["forward"], call.runs()["forward"]
        once, moved, not_moved, taken = (seconds(each, budget, pick=min) for each in runs)
        total += count * bounds(call.name, call, pace, "forward", once, max(moved - not_moved, 0.0))["bound"]
        parts += count * taken
    return total, parts


def spent(run: Callable, rounds: int = 3) -> dict[str, float]:
    """Shares of CPU time by operator, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            run()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(times.values())
    return {name: t / total for name, t in sorted(times.items(), key=lambda item: -item[1])}


def shares(by_operator: dict[str, float]) -> dict[str, float]:
    """The same by kind: what computes, and everything else by its operator."""
    kinds: dict[str, float] = {}
    for name, share in by_operator.items():
        if any(word in name for word in ("scaled_dot_product", "flash_attention", "neighborhood_attention")):
            kind = "attention"
        elif "channel_gates" in name or "weighted_sum" in name:
            kind = "merging routes"
        elif any(f"linescan_cpu::{word}" in name for word in ("shift_blend", "norm", "rotate", "gate")):
            kind = "blends, norms and gates"
        elif "linescan" in name:
            kind = "scans"
        else:
            computes = any(word in name for word in PRODUCTS)
            kind = "products and convolutions" if computes else name.removeprefix("aten::")
        kinds[kind] = kinds.get(kind, 0.0) + share
    return kinds


@app.command()
def models(
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    out: Out = Path("runs/benchmark"),
    largest: Annotated[int, typer.Option(help="Leave out larger images.")] = 1024,
    budget: Annotated[float, typer.Option(help="Seconds for each number.")] = 3.0,
):
    """Plain models against timm's DeiT-Ti with SDPA, hierarchical ones against Swin-T, one image, one thread, by turns.

    Beside the times the operations of each model, and the bound that they set: those of products, convolutions and
    attention at the pace of a plain linear layer of that size, and those of scans at that of multiply-adds; and what
    they take at least, products, convolutions and attentions each by itself in the shapes it has, recurrences at the
    bounds that `recurrences` has; and the same with recurrences as they are by themselves. All are measured in the
    same run. Of models that are slower than wanted the time is shown by operator.
    """
    from linescan.engine.benchmark import _at_size, benchmark, write_report
    from linescan.engine.scores import precision as of_precision
    from linescan.scans.matmul import linear

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def forward(model: nn.Module, image: Tensor) -> None:
        with torch.inference_mode(), of_precision(torch.device("cpu"), dtype):
            model(image)

    for title, group in GROUPS.items():
        sizes = [size for size in group.wanted if size <= largest]
        names = (*group.models, group.peer)
        keep_memory()
        results = []
        with console.status(title) as status:
            show = lambda *_, description="", **__: status.update(description) if description else None  # noqa: E731
            once = list(benchmark(names, sizes, dtype=dtype, budget=0.0, progress=show))  # for memory
        torch.set_num_threads(1)
        multiply_add = Pace().products
        rows, missed = [], []
        for size in sizes:
            ready = {name: _at_size(name, size).eval() for name in names}
            image = torch.randn(1, 3, size, size)
            with console.status(f"{title} at {size}, by turns"):
                runs = {name: partial(forward, model, image) for name, model in ready.items()}
                times = side_by_side(runs, budget, turns=9)
            with console.status(f"the least that {title} models take at {size}, by turns"):
                turns = []
                for _ in range(3):
                    core = Pace()
                    turns.append({name: least(partial(model, image), core) for name, model in ready.items()})
            results += [
                replace(r, seconds=times[r.model], images_per_second=1 / times[r.model]) for r in once if r.size == size
            ]
            x, weight = torch.randn(1, (size // group.stride) ** 2, group.dim), torch.randn(4 * group.dim, group.dim)
            x, weight = x.to(dtype), weight.to(dtype)
            with torch.inference_mode():
                taken = seconds(lambda x=x, weight=weight: linear(x, weight), budget=budget / 3)
            pace = 2 * x.shape[1] * weight.numel() / taken
            for name, model in ready.items():
                with console.status(f"operations of {name} at {size}"):
                    counted, of_scans = operations(partial(model, image))
                bound = (sum(counted.values()) - counted["scans"]) / pace + of_scans * multiply_add
                ratio = times[name] / times[group.peer]
                row = {"model": name, "size": size, "ms": 1e3 * times[name], "ratio": ratio, "flops": counted}
                at_least, parts = (min(several) for several in zip(*(turn[name] for turn in turns)))
                row |= {"bound": 1e3 * bound, "pace": pace, "least": 1e3 * at_least, "parts": 1e3 * parts}
                rows.append(row)
                if ratio > group.wanted[size] and name != group.peer:
                    row["shares"] = shares(spent(partial(model, image)))
        columns = "pixels", "ms", "/ peer", "GFLOP", "of scans", "/ peer", "bound, ms", "/ bound", "/ peer's bound"
        columns += "least, ms", "/ peer's", "parts, ms", "/ peer's"
        table = Table(title, *columns)
        for row in rows:
            peer = next(r for r in rows if r["size"] == row["size"] and r["model"] == group.peer)
            total = {r["model"]: sum(r["flops"].values()) / 1e9 for r in (row, peer)}
            row["flops / peer"] = total[row["model"]] / total[group.peer]
            row |= {f"{key} / peer's": row[key] / peer[key] for key in ("bound", "least", "parts")}
            cells = [f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{total[row['model']]:.2f}"]
            cells += [f"{row['flops']['scans'] / 1e9:.2f}", f"{row['flops / peer']:.2f}", f"{row['bound']:.1f}"]
            cells += [f"{row['ms'] / row['bound']:.2f}", "{:.2f}".format(row["bound / peer's"])]
            for key in ("least", "parts"):
                cells += [f"{row[key]:.1f}", "{:.2f}".format(row[f"{key} / peer's"])]
            table.add_row(row["model"], str(row["size"]), *cells)
            if "shares" in row:
                most = [f"{kind} {share:.0%}" for kind, share in row["shares"].items() if share > 0.025]
                less, each, parts = (row[f"{key} / peer's"] for key in ("bound", "least", "parts"))
                missed.append(
                    f"{row['model']}, {row['size']} pixels: {row['ratio']:.2f} times {group.peer} (wanted "
                    f"{group.wanted[row['size']]}); {row['flops / peer']:.2f} times its operations, whose bound is "
                    f"{less:.2f} times the peer's, in the shapes they have {each:.2f}, with recurrences as they are "
                    f"by themselves {parts:.2f}; of its time {', '.join(most)}"
                )
        console.print(table)
        console.print(*missed, sep="\n", highlight=False)
        report = write_report(results, group.peer, out / f"{title}-{precision}", precision=precision, budget=budget)[0]
        whole = json.loads(report.read_text()) | {"processor": machine()["processor"], "rows": rows, "missed": missed}
        report.write_text(json.dumps(whole, indent=2) + "\n")


# Small models that read the digits, as `linescan train` takes their arguments.
DIGITS = {
    "vim_tiny_patch16_224": ["img_size=32", "patch_size=8", "depth=4", "embed_dim=96"],
    "vmamba_tiny_s1l8": ["img_size=32", "depths=[1,1,2,1]", "dims=32"],
}


def agreement(name: str, runs: Path, epochs: int) -> dict[str, float]:
    """A small model of the digits, trained in runs/NAME if it is not there yet: top-1 in both formats, and how often
    they agree, in percent of the held-out digits.
    """
    from linescan.cli import app as command
    from linescan.engine.cards import restore
    from linescan.tasks.classify import labelled

    run = runs / name
    if not (run / "model.safetensors").exists():
        arguments = [word for argument in DIGITS[name] for word in ("--model-arg", argument)]
        how = ["--data", "digits", "--model", name, *arguments, "--epochs", str(epochs), "--out", str(run), "--resume"]
        command(["train", *how], standalone_mode=False)
    model, card = restore(None, run / "best.safetensors")
    items = [labelled("digits", card)[i] for i in range(len(labelled("digits", card)))]
    images, labels = torch.stack([x["input"] for x in items]), torch.tensor([int(x["label"]) for x in items])
    with torch.inference_mode():
        exact = model.eval()(images).argmax(1)
        half = model.bfloat16()(images.bfloat16()).argmax(1)
    share = lambda same: 100 * same.double().mean().item()  # noqa: E731
    return {"float32": share(exact == labels), "bfloat16": share(half == labels), "agree": share(exact == half)}


def compiled_peer(name: str, size: int) -> dict[str, Callable]:
    """timm's model in OpenVINO on one thread, in both formats."""
    import openvino
    from timm import create_model

    image = torch.randn(1, 3, size, size)
    graph = openvino.convert_model(create_model(name, img_size=size).eval(), example_input=image)
    graph.reshape([1, 3, size, size])
    runs = {}
    for precision in ("f32", "bf16"):
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
        request = openvino.compile_model(graph, "CPU", settings).create_infer_request()
        runs[f"{name}, OpenVINO {precision}"] = partial(request.infer, [image.numpy()])
    return runs


@app.command()
def precision(
    models: Annotated[list[str], typer.Argument(help="timm names.")] = (
        "vim_tiny_patch16_224", "vmamba_tiny_s1l8", "vig_tiny", "vrwkv_tiny", "deit_tiny_patch16_224",
    ),
    budget: Annotated[float, typer.Option(help="Seconds for each row.")] = 10.0,
    sizes: Annotated[str, typer.Option(help="Sides of the images beside OpenVINO.")] = "224,512,1024",
    epochs: Annotated[int, typer.Option(help="Of the small models of the digits, where they are not there yet.")] = 30,
    out: Out = Path("runs/benchmark"),
):  # fmt: skip
    """Forwards of one image of 224 pixels in float32 and bfloat16, and what faster products alone would give.

    Then the first model and timm's DeiT-Ti beside the latter in OpenVINO, where that is installed; and how often
    bfloat16 gives the class of float32, of small models trained on the digits (kept in OUT/digits).
    """
    from timm import create_model

    import linescan  # noqa: F401

    torch.set_num_threads(1)
    keep_memory()
    rows = []

    def forwards(name: str, size: int = 224) -> dict[str, Callable]:
        passes = {}
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = create_model(name, img_size=size).eval().to(dtype)
            passes[str(dtype)[6:]] = partial(model, torch.randn(1, 3, size, size, dtype=dtype))
        return passes

    table = Table("model", "float32, ms", "bfloat16, ms", "ratio", "products, ms", "in bfloat16", "bound of the ratio")
    for name in models:
        passes = forwards(name)
        with torch.inference_mode():
            times = {key: 1e3 * value for key, value in side_by_side(passes, budget).items()}
        products = {
            key: times[key] * sum(t for op, t in spent(run, 5).items() if any(word in op for word in PRODUCTS))
            for key, run in passes.items()
        }
        bound = 1 - (products["float32"] - products["bfloat16"]) / times["float32"]
        rows.append({"model": name, **times, "products": products, "bound": bound})
        ratio = times["bfloat16"] / times["float32"]
        cells = *times.values(), ratio, *products.values(), bound
        table.add_row(name, *(f"{cell:.2f}" if cell < 2 else f"{cell:.1f}" for cell in cells))
    console.print(table)

    beside: dict[str, dict[str, float]] = {}
    scans: dict[str, tuple[float, float]] = {}  # ms by size: by themselves, and their multiply-adds
    if find_spec("openvino"):
        sides = [int(size) for size in sizes.split(",")]
        for size in sides:
            runs = {f"{name}, {key}": run for name in (models[0], "deit_tiny_patch16_224")
                    for key, run in forwards(name, size).items()}  # fmt: skip
            runs |= compiled_peer("deit_tiny_patch16_224", size)
            with torch.inference_mode(), console.status(f"beside OpenVINO, {size} pixels"):
                for name, several in side_by_side(runs, budget, turns=3).items():
                    beside.setdefault(name, {})[str(size)] = 1e3 * several
            ours = runs[f"{models[0]}, bfloat16"]
            with console.status(f"recurrences of {models[0]}, {size} pixels"):
                alone = sum(count * seconds(call.runs()["forward"], 0.1) for call, count in of_shapes(calls_of(ours)))
                scans[str(size)] = 1e3 * alone, 1e3 * operations(ours)[1] * Pace().products
        table = Table("ms", *(f"{size} pixels" for size in sides))
        for name, row in beside.items():
            table.add_row(name, *(f"{several:.1f}" for several in row.values()))
        console.print(table)

    agreements = {name: agreement(name, out / "digits", epochs) for name in DIGITS}
    table = Table("digits held out, %", "top-1, float32", "top-1, bfloat16", "the same class")
    for name, row in agreements.items():
        table.add_row(name, *(f"{share:.2f}" for share in row.values()))
    console.print(table)

    def draw(axes) -> None:
        for shift, key in ((-0.2, "float32"), (0.2, "bfloat16")):
            at = [i + shift for i in range(len(rows))]
            axes.barh(at, [row[key] for row in rows], 0.36, label=key)
            axes.barh(at, [row["products"][key] for row in rows], 0.36, color="0.3", alpha=0.5)
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.set_xlabel("ms at 224 pixels, one thread; dark: matrix products")
        axes.legend()

    missed = [
        f"{row['model']}: bfloat16 takes {row['bfloat16'] / row['float32']:.2f} of the time (wanted 0.5); "
        f"{row['bound']:.2f} if all but its products took what it takes in float32"
        for row in rows
        if row["model"] in DIGITS and row["bfloat16"] > 0.5 * row["float32"]
    ]
    peer, ours = beside.get("deit_tiny_patch16_224, OpenVINO bf16", {}), beside.get(f"{models[0]}, bfloat16", {})
    missed += [
        f"{models[0]}, {side} pixels: {ours[side] / peer[side]:.2f} times DeiT-Ti in OpenVINO, both bfloat16 (wanted "
        f"1); its recurrences by themselves take {scans[side][0] / peer[side]:.2f} of that time, their multiply-adds "
        f"alone {scans[side][1] / peer[side]:.2f}"
        for side in peer
        if int(side) >= 512 and ours[side] > peer[side]
    ]
    missed += [
        f"{name}: the same class for {row['agree']:.2f} % of the digits held out (wanted 99.5 %)"
        for name, row in agreements.items()
        if row["agree"] < 99.5
    ]
    console.print(*missed, sep="\n", highlight=False)
    results = {"machine": machine(), "unit": "ms", "rows": rows, "openvino": beside, "scans": scans}
    results |= {"digits": agreements, "missed": missed}
    save(out, "precision", results, draw)


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


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "README.md"


def grid(headings: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A table of Markdown; numbers with three digits or two decimals."""

    def cell(x) -> str:
        if not isinstance(x, float):
            return str(x)
        return "-" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 20 else f"{x:.2f}"

    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in lines] + [""]


def bullets(lines: Iterable[str]) -> list[str]:
    """A list, its lines broken as elsewhere."""
    return [textwrap.fill(f"- {line}", 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines] + [""]


def page_of_recurrences(found: dict) -> list[str]:
    kinds = list(dict.fromkeys(f"{row['kind']} {row['tokens']}" for row in found["alone"]))
    whole = [
        [mixer, *(f"{row[kind]:.1f} ({row.get(f'{kind} / s6', math.nan):.2f})" for kind in kinds)]
        for mixer, row in found["rows"].items()
    ]
    lines = [f"**`recurrences`**: `scan_tiny` with {found['depth']} blocks, ms; in brackets the time over S6's.", ""]
    lines += grid(["mixer", *kinds], whole)
    lines += [
        "What each takes at least, ms: its products, convolutions and attentions, in training those of the gradients",
        "too, each by itself in the shapes it has, and its recurrences at their bounds; in brackets that over the same",
        "of softmax, and its share of the time above.", "",
    ]  # fmt: skip
    at_least = [
        [mixer, *("{} ({}, {})".format(*of_least(found["rows"], mixer, kind)) for kind in kinds)]
        for mixer, row in found["rows"].items() if f"{kinds[0]} least" in row
    ]  # fmt: skip
    lines += grid(["mixer", *kinds], at_least)
    lines += [
        "Each recurrence by itself, ms: its multiply-adds at the pace of this core (*products*); what a call takes",
        "before its kernel begins; its products with step sizes and exponentials (*arithmetic*); what it must load and",
        "store. The *bound* is the call and the larger of the last two. *In turn*: the sum of all three, where nothing",
        "hides anything else, with multiply-adds of matrix states at the pace that torch's own product of 64 tokens of",
        "such heads reaches in this run. *Elements*: the part of the time that grows with the state, over products.",
        "",
    ]  # fmt: skip
    keys = ["ms", "products, ms", "/ products", "call, ms", "arithmetic, ms", "loads and stores, ms", "/ bound"]
    keys += ["in turn, ms", "/ in turn", "elements / products", "chunked /"]
    for kind in kinds:
        some = [row for row in found["alone"] if f"{row['kind']} {row['tokens']}" == kind]
        lines += grid([kind, *keys], [[row["mixer"], *(row.get(key, math.nan) for key in keys)] for row in some])
    late = []
    for row in found["alone"]:
        if row["/ products"] > WANTED[row["kind"]]:
            parts = [row[f"{part}, ms"] for part in ("call", "arithmetic", "loads and stores")]
            parts += [row["ms"] - row["elements, ms"]] if "elements, ms" in row else []
            shares = [f"{part / row['ms']:.0%}" for part in parts] + ["-"] * (4 - len(parts))
            ratios = [row.get(key, math.nan) for key in ("/ products", "/ bound", "/ in turn", "elements / products")]
            late.append([f"{row['mixer']}, {row['kind']} {row['tokens']}", *ratios, *shares])
    lines += [
        f"Slower than wanted ({WANTED['forward']} times the products, {WANTED['training']} in training), and how",
        "much of the time is the call, arithmetic, loads and stores; and what is done to tokens and rows of the state",
        "instead of its elements.", "",
    ]  # fmt: skip
    headings = ["", "/ products", "/ bound", "/ in turn", "elements / products", "call", "arithmetic", "loads, stores"]
    headings += ["tokens, rows"]
    lines += grid(headings, late)
    beyond = [f"{row['mixer']}, {row['kind']} {row['tokens']}" for row in found["alone"]
              if row["/ products"] > WANTED[row["kind"]] and row["/ in turn"] > WANTED[row["kind"]]]  # fmt: skip
    lines += [f"Slower than wanted even over its parts in turn: {'; '.join(beyond) or 'none'}.", ""]
    return lines + bullets(line for line in found["missed"] if line.startswith("scan_tiny"))


def page_of_threads(found: dict) -> list[str]:
    rows = {}
    for row in found["rows"]:
        rows.setdefault(row["kernel"], []).extend([row["gain"], row["bound"], row.get("with rows", math.nan)])
    length, heads, keys, _ = found["shape"]
    return [
        f"**`threads`**: time on one thread over that on two (wanted 1.8), {length} tokens, {heads} heads of {keys};",
        "*bound*: two processes that do the same on a core each, the slower of them; *with rows*: what is left of that",
        "where the call is not shared, and where two cores write parts of the same rows of tokens.", "",
        *grid(["kernel", "forward", "bound", "with rows", "training", "bound", "with rows"],
              [[name, *row] for name, row in rows.items()]),
    ]  # fmt: skip


def page_of_precision(found: dict) -> list[str]:
    lines = [
        "**`precision`**: forwards of one image of 224 pixels; *bound*: the ratio if all but matrix products and",
        "convolutions took what it takes in float32.", "",
    ]  # fmt: skip
    headings = ["model", "float32, ms", "bfloat16, ms", "ratio", "products, ms", "in bfloat16", "bound"]
    lines += grid(headings, [
        [row["model"], row["float32"], row["bfloat16"], row["bfloat16"] / row["float32"], *row["products"].values(),
         row["bound"]] for row in found["rows"]
    ])  # fmt: skip
    if found["openvino"]:
        sides = list(next(iter(found["openvino"].values())))
        lines += grid(["ms", *(f"{side} pixels" for side in sides)],
                      [[name, *row.values()] for name, row in found["openvino"].items()])  # fmt: skip
    lines += ["Small models trained on the digits, percent of those held out:", ""]
    headings = ["model", "top-1, float32", "top-1, bfloat16", "the same class"]
    rows = [[name, *(f"{x:.2f}" for x in row.values())] for name, row in found["digits"].items()]
    return lines + grid(headings, rows) + bullets(found["missed"])


def page_of_models(found: dict) -> list[str]:
    lines = [
        f"**`models`**: float32, one image; in brackets the time over that of {found['against']}. *Bound*: operations",
        "at the pace of a plain linear layer of that size, scans (with five for an exponential) at that of",
        "multiply-adds. *Least*: products, convolutions and attentions each by itself in the shapes it has, and",
        "recurrences at the bounds of `recurrences`. *Parts*: the same with recurrences as they are by themselves.", "",
    ]  # fmt: skip
    headings = ["model", "pixels", "ms", "GFLOP", "of scans", "/ peer's", "bound, ms", "/ bound", "bound / peer's"]
    headings += ["least, ms", "least / peer's", "parts, ms", "parts / peer's"]
    last = "bound / peer's", "least", "least / peer's", "parts", "parts / peer's"
    rows = [
        [row["model"], row["size"], f"{row['ms']:.1f} ({row['ratio']:.2f})", sum(row["flops"].values()) / 1e9,
         row["flops"]["scans"] / 1e9, row["flops / peer"], row["bound"], row["ms"] / row["bound"],
         *(row.get(key, math.nan) for key in last)]
        for row in found["rows"]
    ]  # fmt: skip
    return lines + grid(headings, rows) + bullets(found["missed"])


def page_of_sizes(title: str) -> Callable[[dict], list[str]]:
    """A row for each thing that was measured, a column for each size."""

    def lines(found: dict) -> list[str]:
        rows = found["rows"]
        cells = [[name, *row.values()] for name, row in rows.items()]
        return [title, "", *grid(["", *next(iter(rows.values()))], cells)]

    return lines


def page_of_points(found: dict) -> list[str]:
    rows = [[title if not i else "", name, ms]
            for title, row in found["rows"].items() for i, (name, ms) in enumerate(row.items())]  # fmt: skip
    own = "Our sampling follows the published CUDA kernel, dead zone and ties included."
    return ["**`points`**, ms.", "", *grid(["", "", "ms"], rows), own, ""]


SECTIONS = {
    "recurrences": page_of_recurrences,
    "threads": page_of_threads,
    "precision": page_of_precision,
    "plain-fp32": page_of_models,
    "hierarchical-fp32": page_of_models,
    "points": page_of_points,
    "groups": page_of_sizes(
        "**`groups`**: LION's operators beside a dense transformer layer, ms, by voxels of a group"
    ),
    "clouds": page_of_sizes("**`clouds`**: clouds per second, one at a time, by number of points"),
}


@app.command()
def page(folder: Annotated[Path, typer.Argument(help="Where the sections' JSON files are, below docs/benchmarks.")]):
    """Writes the tables of a folder into docs/benchmarks/README.md, in the place of those of this folder before."""
    begin = f"<!-- Written by tools/benchmark.py, from {folder.name}. -->\n"
    end = f"<!-- End of {folder.name}. -->\n"
    lines = []
    for name, section in SECTIONS.items():
        file = folder / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if not found:
            continue
        on = found["machine"] | {key: found[key] for key in ("date", "processor") if key in found}
        if not lines:
            lines += [f"{on['processor']}, {on['cores']} cores, torch {on['torch']}; one thread and CPU time unless",
                      f"said otherwise. All numbers: `{folder.name}/*.json`.", ""]  # fmt: skip
        lines += section(found)
        if (folder / f"{name}.png").exists():
            lines += [f"![{name}]({folder.name}/{name}.png)", ""]
    text = PAGE.read_text()
    if begin not in text:
        raise typer.BadParameter(f"{PAGE} has no place for it: put {begin.strip()} {end.strip()} there")
    before, _, rest = text.partition(begin)
    PAGE.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    app()
