#!/usr/bin/env python
"""Checks and measures the Triton kernels on a GPU: one command, no network.

    python tools/gpu_check.py                       everything, into docs/benchmarks/gpu-DATE-CHIP.md and .json
    python tools/gpu_check.py --only correctness    one part: correctness, operators or models
    python tools/gpu_check.py --sizes 224 512       fewer sizes of images
    python tools/gpu_check.py --minutes 30          nothing is left out for want of time (10 by default)

Needs torch, Triton and this checkout; timm for the models. Peers are measured where they are installed (mamba-ssm,
flash-linear-attention), and always the chunked torch form; beside linear attention, softmax attention. Every function
with a kernel is checked; those in OPERATORS are timed, at the sizes of published models. A new model is one entry of
MODELS. Exit status: 0; 1 where a kernel is wrong; 2 where there is no GPU or no Triton.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import repeat
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if find_spec("timm") is None:  # the backbones need timm, the scans do not: import these without those
    package = ModuleType("linescan")
    package.__path__ = [str(ROOT / "linescan")]
    sys.modules["linescan"] = package

from linescan.scans import backend  # noqa: E402
from linescan.scans.recurrence import Public, functions  # noqa: E402
from linescan.scans.routes import parse, table  # noqa: E402

Inputs = dict[str, Tensor]
BOTH, CROSS = "row, -row", "row, col, -row, -col"


# -- operators --------------------------------------------------------------------------------------------------------


@dataclass
class Operator:
    """One row group of the table: a function of `linescan.scans` at the sizes of a published model.

    Attributes:
        name: as the table says it.
        function: name of the function; its layout makes the inputs.
        routes: names of the routes.
        cases: (batch, side of the map) of the table.
        shared: names of the inputs that all routes share.
        without: names of optional inputs that are left out.
        sizes: of the axes that the layout names.
        options: what else the function is called with.
        scales: what the layout's examples of an input are multiplied with: rates at which wide heads still converge.
        from_states: whether states are inputs, too: a layer norm of what weights of zero give has no derivative.
        peers: name -> function of the inputs that returns a function to time, or None where the peer is missing. A peer
            gets tensors in its own layout; moving them there is not timed.
    """

    name: str
    function: str
    routes: str
    cases: tuple[tuple[int, int], ...]
    shared: tuple[str, ...] = ()
    without: tuple[str, ...] = ("initial_state",)
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    from_states: bool = False
    peers: dict[str, Callable] = field(default_factory=dict)

    @property
    def public(self) -> Public:
        return functions()[self.function]

    @property
    def tokens(self) -> list[str]:
        """Names of the token inputs: they and the output are the traffic that nothing can avoid."""
        return [name for name in self.public.layout.tokens if name not in self.without]

    def inputs(self, batch: int, side: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Inputs by name, with parameters in float32."""
        layout, routes = self.public.layout, len(parse(self.routes))
        made = layout.example(
            batch,
            routes,
            side * side,
            shared=self.shared,
            without=self.without if self.from_states else (*self.without, *layout.states),
            device=device,
            **self.sizes,
        )
        return {
            name: (x * self.scales.get(name, 1.0)).to(dtype if name in layout.tokens else torch.float32)
            if x.is_floating_point()
            else x
            for name, x in made.items()
        }

    def call(self, inputs: Inputs, route: Tensor | None, merge: str | None) -> Tensor:
        options = dict(self.options, route=route, merge=merge)
        if self.from_states:
            options["initial_state"] = tuple(inputs[name] for name in self.public.layout.states)
            inputs = {name: x for name, x in inputs.items() if name not in self.public.layout.states}
        return self.public.function(**inputs, **options)

    def run(self, inputs: Inputs, side: int, merge: str | None = "sum") -> Tensor:
        device = next(iter(inputs.values())).device
        return self.call(inputs, table(self.routes, (side, side), device), merge)


def mamba_ssm(inputs: Inputs) -> Callable | None:
    """One call of mamba-ssm's CUDA scan per route, in its layout (B, D, L)."""
    if find_spec("mamba_ssm") is None:
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def route(k, name):
        x = inputs.get(name)
        x = x.squeeze(-2) if name in "BC" and x.ndim == 5 else x
        return None if x is None else x[:, min(k, x.shape[1] - 1)].mT.contiguous().requires_grad_()

    calls = [
        {key: route(k, key) for key in ("u", "delta", "B", "C", "z")}
        | {key: inputs[key][k].clone().requires_grad_() for key in ("A", "D", "delta_bias")}
        for k in range(inputs["A"].shape[0])
    ]

    def run():
        return sum(selective_scan_fn(**call, delta_softplus=True) for call in calls)

    run.leaves = [x for call in calls for x in call.values() if x is not None]
    return run


def fla(family: str) -> Callable[[Inputs], Callable | None]:
    """One call of a chunked recurrence of flash-linear-attention per route."""

    def peer(inputs: Inputs) -> Callable | None:
        if find_spec("fla") is None:
            return None
        function = getattr(import_module(f"fla.ops.{family}"), f"chunk_{family}")
        routes = max(x.shape[1] for x in inputs.values())
        calls = [
            {key: x[:, min(k, x.shape[1] - 1)].contiguous().requires_grad_() for key, x in inputs.items()}
            for k in range(routes)
        ]

        def run():
            return sum(function(**call)[0] for call in calls)

        run.leaves = [x for call in calls for x in call.values()]
        return run

    return peer


def sdpa(inputs: Inputs) -> Callable | None:
    """Causal softmax attention of the same queries, keys and values, one call for each route."""
    calls = [
        [
            inputs[key][:, min(k, inputs[key].shape[1] - 1)].transpose(1, 2).contiguous().requires_grad_()
            for key in "qkv"
        ]
        for k in range(2)
    ]

    def run():
        return sum(F.scaled_dot_product_attention(*call, is_causal=True) for call in calls)

    run.leaves = [x for call in calls for x in call]
    return run


LARGE = ((128, 14), (32, 32), (8, 64), (1, 64), (2, 128))  # as many tokens as images of 224 to 2048 px have
SOME = ((128, 14), (8, 64))
BARE = ("initial_state", "delta_weight")
OPERATORS = [
    Operator(
        "S6, Vim: 2 routes, D 384, N 16", "selective_scan", BOTH, LARGE, ("u", "z"), BARE,
        dict(D=384, N=16, G=1), dict(delta_softplus=True), peers={"mamba-ssm": mamba_ssm},
    ),
    Operator(
        "S6, VMamba: 4 routes, D 192, N 1", "selective_scan", CROSS, ((128, 28), (32, 56), (8, 128)), ("u",),
        (*BARE, "z"), dict(D=192, N=1, G=1), dict(delta_softplus=True), peers={"mamba-ssm": mamba_ssm},
    ),
    Operator(
        "causal conv + SiLU: 2 routes, D 384, 4 taps", "causal_conv1d", BOTH, LARGE, ("x",),
        sizes=dict(D=384), options=dict(activation="silu"),
    ),
    Operator(
        "GLA, ViG: 2 routes, 3 heads of 32 and 64", "gla", BOTH, LARGE, ("q", "k", "v"), sizes=dict(H=3, dk=32, dv=64),
        peers={"flash-linear-attention": fla("gla")},
    ),
    Operator("Simple GLA: 2 routes, 3 heads of 32 and 64", "simple_gla", BOTH, LARGE, ("q", "k", "v"),
             sizes=dict(H=3, dk=32, dv=64)),
    Operator(
        "SSD: 2 routes, 6 heads of 64, N 64", "ssd", BOTH, LARGE, ("x",), ("initial_state", "z"),
        dict(H=6, P=64, G=1, N=64), dict(dt_softplus=True),
    ),
    Operator("WKV-6, VRWKV6: 2 routes, 6 heads of 32", "wkv6", BOTH, LARGE, ("r", "k", "v"),
             sizes=dict(H=6, dk=32, dv=32)),
    Operator("Bi-WKV, VRWKV: 192 channels", "bi_wkv", "row", LARGE, sizes=dict(D=192)),
    Operator("WKV-4: 2 routes, 192 channels", "wkv4", BOTH, SOME, ("k", "v"), sizes=dict(D=192)),
    Operator("HGRN: 2 routes, 192 channels", "hgrn", BOTH, SOME, ("x",), sizes=dict(D=192)),
    Operator("Linear attention: 2 routes, 3 heads of 64", "linear_attention", BOTH, LARGE, ("q", "k", "v"),
             sizes=dict(H=3, dk=64, dv=64), peers={"softmax (SDPA)": sdpa}),
    Operator(
        "Delta rule: 2 routes, 3 heads of 64", "delta_rule", BOTH, SOME, ("q", "k", "v"), sizes=dict(H=3, dk=64, dv=64),
        peers={"flash-linear-attention": fla("delta_rule")},
    ),
    Operator(
        "Gated delta rule: 2 routes, 3 heads of 64", "gated_delta_rule", BOTH, SOME, ("q", "k", "v"),
        sizes=dict(H=3, dk=64, dv=64), peers={"flash-linear-attention": fla("gated_delta_rule")},
    ),
    Operator(
        "KDA: 2 routes, 3 heads of 64", "kda", BOTH, SOME, ("q", "k", "v"), sizes=dict(H=3, dk=64, dv=64),
        peers={"flash-linear-attention": fla("kda")},
    ),
    Operator("Log-linear attention: 2 routes, 3 heads of 64", "log_linear_attention", BOTH, SOME, ("q", "k", "v"),
             sizes=dict(H=3, G=1, dk=64, dv=64, levels=15)),
    Operator("Log-linear delta rule: 2 routes, 3 heads of 64", "log_linear_gated_delta_rule", BOTH, SOME,
             ("q", "k", "v"), sizes=dict(H=3, dk=64, dv=64, levels=15)),
    Operator("RWKV-7: 2 routes, 3 heads of 64", "rwkv7", BOTH, SOME, ("r", "k", "v"), sizes=dict(H=3, dk=64, dv=64)),
    Operator("mLSTM: 2 routes, 3 heads of 64", "mlstm", BOTH, SOME, ("q", "k", "v"), sizes=dict(H=3, dk=64, dv=64)),
    Operator("Mamba-3: 2 routes, 6 heads of 64, N 64", "mamba3", BOTH, SOME, ("q", "k", "v"), ("initial_state", "z"),
             sizes=dict(H=6, P=64, G=1, N=64, A=16)),
    Operator("TTT-Linear: 2 routes, 3 heads of 64", "ttt_linear", BOTH, SOME, ("q", "k", "v"), (),
             dict(H=3, D=64, mini_batch=16), scales=dict(lr=1 / 64, start=1 / 8), from_states=True),
    Operator("TTT-Linear by reader: 2 routes, 3 heads of 64", "ttt_linear_fla", BOTH, (), ("q", "k", "v"), (),
             dict(H=3, D=64), scales=dict(eta=1 / 64, start=1 / 8), from_states=True),
]  # fmt: skip


def operators_with(kernel: str) -> list[Operator]:
    """Those above that have a kernel, and any other function with one, at the sizes of its layout's examples."""
    listed = {operator.function for operator in OPERATORS}
    others = [Operator(f.name, f.name, BOTH, ()) for f in functions().values() if f.name not in listed]
    return [
        operator
        for operator in OPERATORS + others
        if operator.public.recurrence is not None and kernel in operator.public.recurrence.implementations
    ]


# -- correctness ------------------------------------------------------------------------------------------------------


def random_table(generator: torch.Generator, batch: int, routes: int, length: int) -> Tensor | None:
    """None, permutations, or tables with padding, repeated reads and dropped outputs; sometimes one per sample."""

    def one(plain):
        order = torch.randperm(length, generator=generator)
        if plain:
            return order
        extra = torch.cat((torch.full((3,), -1), -2 - torch.randint(length, (3,), generator=generator)))
        order = torch.where(torch.rand(length, generator=generator) < 0.1, -2 - order, order)
        return torch.cat((order, extra))[torch.randperm(length + 6, generator=generator)]

    kind = int(torch.randint(4, (), generator=generator))
    if kind == 0:
        return None
    if kind == 3:
        return torch.stack([torch.stack([one(False) for _ in range(routes)]) for _ in range(batch)]).int()
    return torch.stack([one(kind == 1) for _ in range(routes)]).int()


def gradients(name, operator: Operator, inputs: Inputs, route, dtype) -> dict[str, Tensor]:
    """Output and gradients under one implementation."""
    floats = {key: x.detach().to(dtype).requires_grad_() for key, x in inputs.items() if x.is_floating_point()}
    inputs = inputs | floats
    with backend(name):
        output = operator.call(inputs, route, "sum")
        torch.manual_seed(0)
        weight = torch.randn(output.shape, dtype=torch.float64).to(output)  # the same on any device and in any dtype
        grads = torch.autograd.grad((output * weight).sum(), list(floats.values()))
    return {"output": output.detach()} | dict(zip(floats, grads))


def correctness(device: torch.device, trials: int, kernel: str = "triton", jobs: int = 1) -> list[dict]:
    """Every operator on random shapes and tables, against float64, and against itself bit by bit."""
    names = [operator.name for operator in operators_with(kernel)]
    return [row for found in in_processes(jobs, right, names, device, trials, kernel) for row in found]


def in_processes(jobs: int, function: Callable, names: list[str], *args) -> Iterable:
    """What function(name, *args) returns for all names. Compiling takes the time here, and a process has one core."""
    if jobs == 1:
        yield from (function(name, *args) for name in names)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, names, *map(repeat, args))


def right(name: str, device: torch.device, trials: int, kernel: str) -> list[dict]:
    """The rows of one operator."""
    limits = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    rows = []
    for operator in [operator for operator in operators_with(kernel) if operator.name == name]:
        generator = torch.Generator().manual_seed(0)
        routes = len(parse(operator.routes))
        for trial in range(trials):
            torch.manual_seed(trial)
            batch, side = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 20))
            dtype = list(limits)[trial % 3]
            inputs = operator.inputs(batch, side, dtype, device)
            route = random_table(generator, batch, routes, side * side)
            route = None if route is None else route.to(device)
            if route is None:  # without a table the tokens say how many routes there are
                inputs = {
                    k: x.expand(-1, routes, *x.shape[2:]) if k in operator.tokens else x for k, x in inputs.items()
                }
            got = gradients(kernel, operator, inputs, route, dtype)
            again = gradients(kernel, operator, inputs, route, dtype)
            rounded = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
            want = gradients("chunked", operator, rounded, route, torch.float64)
            errors = {k: ((got[k].double() - x).abs().max() / x.abs().max().clamp_min(1e-3)).item()
                      for k, x in want.items()}  # fmt: skip
            worst = max(errors, key=errors.get)
            rows.append(
                dict(
                    operator=operator.name,
                    dtype=str(dtype)[6:],
                    shape=[batch, side],
                    worst=worst,
                    error=errors[worst],
                    repeats=all(torch.equal(got[k], again[k]) for k in got),
                    passed=errors[worst] <= limits[dtype],
                )
            )
    bad = [row for row in rows if not (row["passed"] and row["repeats"])]
    print(f"{name}: {len(rows) - len(bad)} of {len(rows)} right", *bad, sep="\n    ", flush=True)
    return rows


# -- operators, timed -------------------------------------------------------------------------------------------------


def milliseconds(run: Callable) -> float:
    from triton.testing import do_bench  # clears the second-level cache before every run

    return do_bench(run, warmup=50, rep=200, return_mode="median")


def bandwidth(device) -> float:
    """What a plain copy reaches, bytes per second: the ceiling that the table compares with."""
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x)) * 1000


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def timed(make: Callable, leaves: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of a forward, and of forward and backward."""
    with torch.no_grad():
        forward = milliseconds(make)
    grad = torch.randn_like(make())
    return forward, milliseconds(lambda: torch.autograd.grad(make(), leaves, grad))


def forced(name: str, operator: Operator, inputs: Inputs, side: int) -> Callable:
    def run():
        with backend(name):
            return operator.run(inputs, side)

    run.leaves = list(inputs.values())
    return run


def case(operator: Operator, batch: int, side: int, dtype: torch.dtype, device, ceiling: float) -> list[dict]:
    """One line for our kernel and each of its peers."""
    inputs = {key: x.requires_grad_() for key, x in operator.inputs(batch, side, dtype, device).items()}
    tokens = [inputs[key] for key in operator.tokens]
    runs = {"linescan": forced("triton", operator, inputs, side)}
    runs |= {name: peer(inputs) for name, peer in operator.peers.items()}
    runs |= {"chunked torch": forced("chunked", operator, inputs, side)}
    with torch.no_grad():
        output = size(runs["linescan"]())
    floors = size(*tokens) + output, 3 * size(*tokens) + 2 * output  # backward: all again, and the gradients
    rows = []
    for name, run in runs.items():
        row = dict(operator=operator.name, dtype=str(dtype)[6:], batch=batch, tokens=side * side, who=name)
        try:
            times = (None, None) if run is None else timed(run, run.leaves)
        except torch.OutOfMemoryError:
            times = None, None
        for what, took, floor in zip(("forward", "both"), times, floors):
            row |= {what: took, f"{what}_floor": floor / ceiling * 1000}
        print(row, flush=True)
        rows.append(row)
    return rows


def compile_for_times(name: str, device: torch.device) -> None:
    """Runs an operator at all sizes of its table, one sample each: its kernels are then in Triton's cache on disk."""
    for operator in [operator for operator in operators_with("triton") if operator.name == name]:
        for side in {side for _, side in operator.cases}:
            for dtype in (torch.bfloat16, torch.float32):
                inputs = {key: x.requires_grad_() for key, x in operator.inputs(1, side, dtype, device).items()}
                run = forced("triton", operator, inputs, side)
                run().sum().backward()


def operators(device: torch.device, ceiling: float, deadline: float = inf, jobs: int = 1) -> tuple[list[dict], int]:
    """Times of our kernels and their peers, and how far each is from moving every tensor once at a copy's bandwidth;
    and how many cases the time was too short for. The first sizes of all operators come first."""
    listed = [operator for operator in operators_with("triton") if operator.cases]
    if jobs > 1:
        list(in_processes(jobs, compile_for_times, [operator.name for operator in listed], device))
    cases = [
        (at, dtype is torch.float32, n, operator, sizes, dtype)
        for n, operator in enumerate(listed)
        for at, sizes in enumerate(operator.cases)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    rows, left_out = {}, 0
    for *place, operator, (batch, side), dtype in sorted(cases, key=lambda x: x[:3]):
        if time.monotonic() > deadline:
            left_out += 1
            continue
        rows[tuple(reversed(place))] = case(operator, batch, side, dtype, device, ceiling)
        torch.cuda.empty_cache()
    return [row for key in sorted(rows) for row in rows[key]], left_out


# -- models -----------------------------------------------------------------------------------------------------------

MODELS = {
    "Vim-T": "vim_tiny_patch16_224",
    "VMamba-T": "vmamba_tiny_s1l8",
    "ViG-T": "vig_tiny",
    "VideoMamba-T": "videomamba_tiny_patch16_224",
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
}
PIXELS = 128 * 224 * 224  # of a batch, at any size of its images


def models(device: torch.device, sizes: list[int], deadline: float = inf) -> tuple[list[dict], int]:
    """Images per second and peak memory of a forward and of a training step (AdamW), bfloat16 autocast; and how many
    rows the time was too short for."""
    import timm

    import linescan  # noqa: F401  (registers the models)

    rows, left_out = [], 0
    for image in sizes:
        for name, model_name in MODELS.items():
            if time.monotonic() > deadline:
                left_out += 1
                continue
            batch = max(1, PIXELS // image**2)
            row = dict(model=name, size=image, batch=batch)
            try:
                model = timm.create_model(model_name, img_size=image).to(device)
                x = torch.randn(batch, 3, image, image, device=device)
                optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")

                @torch.no_grad()
                def forward():
                    with torch.autocast(device.type, torch.bfloat16):
                        return model(x)

                def step():
                    with torch.autocast(device.type, torch.bfloat16):
                        loss = model(x).float().square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                for what, run in (("forward", forward), ("training", step)):
                    model.train(what == "training")
                    torch.cuda.reset_peak_memory_stats(device)
                    row[what] = batch / milliseconds(run) * 1000
                    row[f"{what}_memory"] = torch.cuda.max_memory_allocated(device)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            rows.append(row)
            print(row, flush=True)
            model = x = optimizer = None
            gc.collect()
            torch.cuda.empty_cache()
    return sorted(rows, key=lambda row: list(MODELS).index(row["model"])), left_out


# -- the report -------------------------------------------------------------------------------------------------------


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    packages = ("torch", "triton", "timm", "mamba-ssm", "flash-linear-attention")
    return dict(
        date=date.today().isoformat(),
        chip=properties.name,
        multiprocessors=properties.multi_processor_count,
        python=platform.python_version(),
        copy_bandwidth=bandwidth(device),
    ) | {package: installed(package) for package in packages}


def number(x: float | None, digits: int = 3) -> str:
    return "–" if x is None else f"{x:.{digits}g}" if x < 1000 else f"{x:.0f}"


def lines(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def markdown(results: dict) -> str:
    """The page of a run."""
    about = results["machine"]
    text = [f"# Measured on {about['chip']}, {about['date']}", ""]
    text += ["Made by `python tools/gpu_check.py`; all numbers are in the JSON file beside this page.", ""]
    shown = about | {"copy_bandwidth": f"{about['copy_bandwidth'] / 1e12:.2f} TB/s"}
    text += lines(["", ""], [[key, str(value)] for key, value in shown.items()])
    if "correctness" in results:
        text += [
            "## Correctness",
            "",
            "Against float64, on random shapes and route tables; and run twice, bit by bit.",
            "",
        ]
        groups: dict = {}
        for row in results["correctness"]:
            groups.setdefault((row["operator"], row["dtype"]), []).append(row)
        text += lines(
            ["operator", "dtype", "right", "same bits", "largest error"],
            [
                [*key, *(f"{sum(r[what] for r in rows)} of {len(rows)}" for what in ("passed", "repeats")),
                 f"{max(r['error'] for r in rows):.1e}"]
                for key, rows in groups.items()
            ],
        )  # fmt: skip
    if "operators" in results:
        text += [
            "## Operators", "",
            "Milliseconds, median. The floor is every token tensor moved once, at the bandwidth of a plain copy; in",
            "brackets, how many times the floor. Peers run in their own layout, one call a route.", "",
        ]  # fmt: skip
        cell = {w: lambda r, w=w: "–" if r[w] is None else f"{number(r[w])} ({number(r[w] / r[w + '_floor'], 2)}x)"
                for w in ("forward", "both")}  # fmt: skip
        text += lines(
            ["operator", "dtype", "batch x tokens", "who", "forward", "forward + backward"],
            [
                [r["operator"], r["dtype"], f"{r['batch']} x {r['tokens']}", r["who"], *(c(r) for c in cell.values())]
                for r in results["operators"]
            ],
        )
    if "models" in results:
        text += ["## Models", "", "Images per second (peak memory in GB); bfloat16 autocast, a step is AdamW's.", ""]

        def both(row, what):
            return row.get("note", "–") if what not in row else f"{row[what]:.0f} ({row[what + '_memory'] / 1e9:.1f})"

        text += lines(
            ["model", "px", "batch", "forward", "training step"],
            [
                [r["model"], str(r["size"]), str(r["batch"]), both(r, "forward"), both(r, "training")]
                for r in results["models"]
            ],
        )
    left_out = {part: count for part, count in results.get("left_out", {}).items() if count}
    if left_out:
        told = ", ".join(f"{count} of {part}" for part, count in left_out.items())
        text += [f"The time was over before all was timed; left out: {told}.", ""]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("correctness", "operators", "models")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="parts to run")
    parser.add_argument("--trials", type=int, default=12, help="random shapes per operator (default: 12)")
    parser.add_argument("--minutes", type=float, default=10, help="after which nothing more is timed (default: 10)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[224, 512, 1024, 2048], help="sides of images in pixels"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    options = parser.parse_args(arguments)

    missing = "no CUDA GPU" if not torch.cuda.is_available() else "no Triton" if find_spec("triton") is None else ""
    if missing:
        print(f"gpu_check: {missing} here, so nothing was checked or measured", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    deadline, jobs = time.monotonic() + 60 * options.minutes, min(8, os.cpu_count() or 1)
    left_out: dict[str, int] = {}
    results: dict = {"machine": machine(device), "left_out": left_out}
    print(results["machine"], flush=True)
    status = 0
    try:
        if "correctness" in options.only:
            results["correctness"] = correctness(device, options.trials, jobs=jobs)
            status = int(not all(row["passed"] and row["repeats"] for row in results["correctness"]))
        if "operators" in options.only:
            ceiling = results["machine"]["copy_bandwidth"]
            results["operators"], left_out["operators"] = operators(device, ceiling, deadline, jobs)
        if "models" in options.only:
            if find_spec("timm") is None:
                print("models: timm is not installed, so they are left out", flush=True)
            else:
                results["models"], left_out["models"] = models(device, options.sizes, deadline)
    finally:  # an interrupted run keeps what it has
        options.out.mkdir(parents=True, exist_ok=True)
        chip = "-".join(results["machine"]["chip"].lower().replace("/", " ").split())
        page = options.out / f"gpu-{results['machine']['date']}-{chip}.md"
        page.write_text(markdown(results))
        page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        print(page)
    return status


if __name__ == "__main__":
    sys.exit(main())
