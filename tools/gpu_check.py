#!/usr/bin/env python
"""Checks and measures the Triton kernels on a GPU: one command, no network.

    python tools/gpu_check.py                       everything, into docs/benchmarks/gpu-DATE-CHIP.md and .json
    python tools/gpu_check.py --only correctness    one part: correctness, operators or models
    python tools/gpu_check.py --sizes 224 512       fewer sizes of images

Needs torch, Triton and this checkout; timm for the models. Peers are measured where they are installed (mamba-ssm,
flash-linear-attention), and always the chunked torch form. A new operator is one entry of OPERATORS, a new model one of
MODELS. Exit status: 0; 1 where a kernel is wrong; 2 where there is no GPU or no Triton.
"""

import argparse
import gc
import json
import platform
import sys
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if find_spec("timm") is None:  # the backbones need timm, the scans do not: import these without those
    package = ModuleType("linescan")
    package.__path__ = [str(ROOT / "linescan")]
    sys.modules["linescan"] = package

from linescan.scans import bi_wkv, causal_conv1d, gla, recurrences, selective_scan, ssd, wkv6  # noqa: E402
from linescan.scans.recurrence import backend  # noqa: E402
from linescan.scans.routes import table  # noqa: E402

Inputs = dict[str, Tensor]
BOTH, CROSS = "row, -row", "row, col, -row, -col"


# -- operators --------------------------------------------------------------------------------------------------------


@dataclass
class Operator:
    """One row group of the table.

    Attributes:
        name: as the table says it.
        recurrence: name of the registered recurrence.
        call: (inputs, route, merge) -> output.
        inputs: (batch, side of the map, dtype, device) -> inputs by name; parameters in float32.
        routes: names of the routes.
        tokens: names of the inputs with a token axis; they and the output are the traffic that nothing can avoid.
        cases: (batch, side) of the table.
        peers: name -> function of the inputs that returns a function to time, or None where the peer is missing. A peer
            gets tensors in its own layout; moving them there is not timed.
    """

    name: str
    recurrence: str
    call: Callable[..., Tensor]
    inputs: Callable[..., Inputs]
    routes: str
    tokens: tuple[str, ...]
    cases: tuple[tuple[int, int], ...]
    peers: dict[str, Callable] = field(default_factory=dict)

    def run(self, inputs: Inputs, side: int, merge: str | None = "sum") -> Tensor:
        device = next(iter(inputs.values())).device
        return self.call(inputs, table(self.routes, (side, side), device), merge)


def noise(*shape, dtype, device, offset=0.0):
    return (torch.randn(shape, device=device) + offset).to(dtype)


def scan_inputs(channels, states, routes, gate):
    """Inputs of S6 as a layer has them: u and the gate are halves of one projection, shared by the routes."""

    def make(batch, side, dtype, device) -> Inputs:
        length, like = side * side, dict(dtype=dtype, device=device)
        u, z = noise(batch, 1, length, 2 * channels, **like).chunk(2, -1)
        rows = [noise(batch, routes, length, states, **like) for _ in "BC"]
        parameter = dict(dtype=torch.float32, device=device)
        inputs = dict(
            u=u,
            delta=noise(batch, routes, length, channels, **like),
            A=-torch.arange(1.0, states + 1, device=device).expand(routes, channels, -1).contiguous(),
            B=rows[0],
            C=rows[1],
            D=torch.ones(routes, channels, **parameter),
            delta_bias=noise(routes, channels, offset=-4, **parameter),
        )
        return inputs | (dict(z=z) if gate else {})

    return make


def call_scan(inputs, route, merge):
    return selective_scan(**inputs, delta_softplus=True, route=route, merge=merge)


def mamba_ssm(inputs: Inputs) -> Callable | None:
    """One call of mamba-ssm's CUDA scan a route, in its layout (B, D, L)."""
    if find_spec("mamba_ssm") is None:
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def route(k, name):
        x = inputs.get(name)
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


def conv_inputs(channels, routes):
    def make(batch, side, dtype, device) -> Inputs:
        x, _ = noise(batch, 1, side * side, 2 * channels, dtype=dtype, device=device).chunk(2, -1)
        parameter = dict(dtype=torch.float32, device=device)
        return dict(x=x, weight=noise(routes, channels, 4, **parameter), bias=noise(routes, channels, **parameter))

    return make


def head_inputs(heads, keys, values, routes):
    def make(batch, side, dtype, device) -> Inputs:
        length, like = side * side, dict(dtype=dtype, device=device)
        sizes = dict(q=(1, keys), k=(1, keys), v=(1, values), g=(routes, keys))
        inputs = {name: noise(batch, k, length, heads, d, **like) for name, (k, d) in sizes.items()}
        return inputs | dict(g=F.logsigmoid(inputs["g"].float() + 3).to(dtype))

    return make


def fla_gla(inputs: Inputs) -> Callable | None:
    """One call of flash-linear-attention's chunked GLA a route."""
    if find_spec("fla") is None:
        return None
    from fla.ops.gla import chunk_gla

    calls = [
        {key: x[:, min(k, x.shape[1] - 1)].contiguous().requires_grad_() for key, x in inputs.items()}
        for k in range(inputs["g"].shape[1])
    ]

    def run():
        return sum(chunk_gla(**call)[0] for call in calls)

    run.leaves = [x for call in calls for x in call.values()]
    return run


def ssd_inputs(heads, width, states, routes):
    def make(batch, side, dtype, device) -> Inputs:
        length, like = side * side, dict(dtype=dtype, device=device)
        parameter = dict(dtype=torch.float32, device=device)
        return dict(
            x=noise(batch, 1, length, heads, width, **like),
            dt=noise(batch, routes, length, heads, **like),
            A=-torch.rand(routes, heads, device=device) - 0.5,
            B=noise(batch, routes, length, 1, states, **like),
            C=noise(batch, routes, length, 1, states, **like),
            D=torch.ones(routes, heads, **parameter),
            dt_bias=noise(routes, heads, offset=-4, **parameter),
        )

    return make


def wkv6_inputs(heads, width, routes):
    def make(batch, side, dtype, device) -> Inputs:
        q, k, v, g = head_inputs(heads, width, width, routes)(batch, side, dtype, device).values()
        return dict(r=q, k=k, v=v, w=g, u=torch.randn(routes, heads, width, device=device))

    return make


def bi_wkv_inputs(channels):
    def make(batch, side, dtype, device) -> Inputs:
        k, v = (noise(batch, 1, side * side, channels, dtype=dtype, device=device) for _ in "kv")
        w, u = (torch.randn(1, channels, device=device) for _ in "wu")
        return dict(k=k, v=v, w=w.exp() / side**2, u=u / side**2)  # Vision-RWKV divides by the number of tokens

    return make


LARGE = ((128, 14), (32, 32), (8, 64), (1, 64), (2, 128))  # as many tokens as images of 224 to 2048 px have
OPERATORS = [
    Operator(
        "S6, Vim: 2 routes, D 384, N 16", "selective_scan", call_scan, scan_inputs(384, 16, 2, True), BOTH,
        ("u", "delta", "B", "C", "z"), LARGE, {"mamba-ssm": mamba_ssm},
    ),
    Operator(
        "S6, VMamba: 4 routes, D 192, N 1", "selective_scan", call_scan, scan_inputs(192, 1, 4, False), CROSS,
        ("u", "delta", "B", "C"), ((128, 28), (32, 56), (8, 128)), {"mamba-ssm": mamba_ssm},
    ),
    Operator(
        "causal conv + SiLU: 2 routes, D 384, 4 taps", "causal_conv1d",
        lambda inputs, route, merge: causal_conv1d(**inputs, activation="silu", route=route),
        conv_inputs(384, 2), BOTH, ("x",), LARGE,
    ),
    Operator(
        "GLA, ViG: 2 routes, 3 heads of 32 and 64", "gla",
        lambda inputs, route, merge: gla(**inputs, route=route, merge=merge),
        head_inputs(3, 32, 64, 2), BOTH, ("q", "k", "v", "g"), LARGE, {"flash-linear-attention": fla_gla},
    ),
    Operator(
        "SSD: 2 routes, 6 heads of 64, N 64", "ssd",
        lambda inputs, route, merge: ssd(**inputs, dt_softplus=True, route=route, merge=merge),
        ssd_inputs(6, 64, 64, 2), BOTH, ("x", "dt", "B", "C"), LARGE,
    ),
    Operator(
        "WKV-6, VRWKV6: 2 routes, 6 heads of 32", "wkv6",
        lambda inputs, route, merge: wkv6(**inputs, route=route, merge=merge),
        wkv6_inputs(6, 32, 2), BOTH, ("r", "k", "v", "w"), LARGE,
    ),
    Operator(
        "Bi-WKV, VRWKV: 192 channels", "bi_wkv",
        lambda inputs, route, merge: bi_wkv(**inputs, route=route, merge=merge),
        bi_wkv_inputs(192), "row", ("k", "v"), LARGE,
    ),
]  # fmt: skip


# -- correctness ------------------------------------------------------------------------------------------------------


def random_table(generator: torch.Generator, batch: int, routes: int, length: int) -> Tensor | None:
    """None, permutations, or tables with padding, repeated reads and dropped outputs; sometimes one a sample."""

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
    inputs = {key: x.detach().to(dtype).requires_grad_() for key, x in inputs.items()}
    with backend(name):
        output = operator.call(inputs, route, "sum")
        torch.manual_seed(0)
        weight = torch.randn(output.shape, dtype=torch.float64).to(output)  # the same on any device and in any dtype
        grads = torch.autograd.grad((output * weight).sum(), list(inputs.values()))
    return {"output": output.detach()} | dict(zip(inputs, grads))


def correctness(device: torch.device, trials: int, kernel: str = "triton") -> list[dict]:
    """Every operator on random shapes and tables, against float64, and against itself bit by bit."""
    limits = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    rows = []
    for operator in OPERATORS:
        generator = torch.Generator().manual_seed(0)
        for trial in range(trials):
            torch.manual_seed(trial)
            batch, side = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 20))
            dtype = list(limits)[trial % 3]
            inputs = operator.inputs(batch, side, dtype, device)
            routes = max(x.shape[1] if key in operator.tokens else x.shape[0] for key, x in inputs.items())
            route = random_table(generator, batch, routes, side * side)
            route = None if route is None else route.to(device)
            if route is None:  # without a table the tokens say how many routes there are
                inputs = {
                    k: x.expand(-1, routes, *x.shape[2:]) if k in operator.tokens else x for k, x in inputs.items()
                }
            got = gradients(kernel, operator, inputs, route, dtype)
            again = gradients(kernel, operator, inputs, route, dtype)
            want = gradients("chunked", operator, {k: x.to(dtype) for k, x in inputs.items()}, route, torch.float64)
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
        mine = [row for row in rows if row["operator"] == operator.name]
        bad = [row for row in mine if not (row["passed"] and row["repeats"])]
        print(f"{operator.name}: {len(mine) - len(bad)} of {len(mine)} right", *bad, sep="\n    ", flush=True)
    return rows


# -- operators, timed -------------------------------------------------------------------------------------------------


def milliseconds(run: Callable) -> float:
    from triton.testing import do_bench  # clears the second-level cache before every run

    return do_bench(run, warmup=50, rep=200, return_mode="median")


def bandwidth(device) -> float:
    """What a plain copy reaches, bytes a second: the ceiling that the table compares with."""
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
        for what, time, floor in zip(("forward", "both"), times, floors):
            row |= {what: time, f"{what}_floor": floor / ceiling * 1000}
        print(row, flush=True)
        rows.append(row)
    return rows


def operators(device: torch.device, ceiling: float) -> list[dict]:
    """Times of our kernels and their peers, and how far each is from moving every tensor once at a copy's bandwidth."""
    rows = []
    for operator in OPERATORS:
        for batch, side in operator.cases:
            for dtype in (torch.bfloat16, torch.float32):
                rows += case(operator, batch, side, dtype, device, ceiling)
                torch.cuda.empty_cache()
    return rows


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


def models(device: torch.device, sizes: list[int]) -> list[dict]:
    """Images a second and peak memory of a forward and of a training step (AdamW), bfloat16 autocast."""
    import timm

    import linescan  # noqa: F401  (registers the models)

    rows = []
    for name, model_name in MODELS.items():
        for image in sizes:
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
    return rows


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
        text += ["## Models", "", "Images a second (peak memory in GB); bfloat16 autocast, a step is AdamW's.", ""]

        def both(row, what):
            return row.get("note", "–") if what not in row else f"{row[what]:.0f} ({row[what + '_memory'] / 1e9:.1f})"

        text += lines(
            ["model", "px", "batch", "forward", "training step"],
            [
                [r["model"], str(r["size"]), str(r["batch"]), both(r, "forward"), both(r, "training")]
                for r in results["models"]
            ],
        )
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("correctness", "operators", "models")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="parts to run")
    parser.add_argument("--trials", type=int, default=24, help="random shapes an operator")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[224, 512, 1024, 2048], help="sides of images in pixels"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    options = parser.parse_args(arguments)

    missing = "no CUDA GPU" if not torch.cuda.is_available() else "no Triton" if find_spec("triton") is None else ""
    if missing:
        print(f"gpu_check: {missing} here, so nothing was checked or measured", file=sys.stderr)
        return 2
    absent = [o.name for o in OPERATORS if "triton" not in recurrences()[o.recurrence].implementations]
    OPERATORS[:] = [o for o in OPERATORS if o.name not in absent]
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict = {"machine": machine(device)}
    print(results["machine"], flush=True)
    status = 0
    try:
        if "correctness" in options.only:
            results["correctness"] = correctness(device, options.trials)
            status = int(not all(row["passed"] and row["repeats"] for row in results["correctness"]))
        if "operators" in options.only:
            results["operators"] = operators(device, results["machine"]["copy_bandwidth"])
        if "models" in options.only:
            if find_spec("timm") is None:
                print("models: timm is not installed, so they are left out", flush=True)
            else:
                results["models"] = models(device, options.sizes)
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
