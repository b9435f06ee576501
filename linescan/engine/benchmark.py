"""Whole models side by side: time and memory of a forward (or a training step) against resolution."""

import ctypes
import gc
import json
import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import BinaryIO, Callable, Iterator, Mapping, Sequence

import timm
import torch
from torch import nn

from ..errors import InputError
from . import processes
from .atomic import atomic
from .cards import build
from .scores import precision

__all__ = [
    "Measurement",
    "benchmark",
    "crossover",
    "crossovers",
    "describe",
    "draw",
    "growth",
    "machine",
    "write_report",
]


@dataclass(frozen=True)
class Measurement:
    """One model at one size.

    Attributes:
        model: timm name.
        size: side of the square images in pixels.
        seconds: median of a pass over a batch; CPU time on a CPU, which other work does not lengthen.
        images_per_second: batch / seconds.
        memory_mb: what the pass needed on top of weights and input, at its peak; None where it cannot be told.
    """

    model: str
    size: int
    seconds: float
    images_per_second: float
    memory_mb: float | None


def _at_size(name: str, size: int) -> nn.Module:
    """The model built for colour images of this size, where it wants to know; others take any."""
    if timm.is_model(name):
        with suppress(TypeError):
            return timm.create_model(name, img_size=size, in_chans=3)
    return build(name, in_chans=3)


def _peak_memory(run: Callable, device: torch.device) -> float | None:
    """Megabytes that a run needs at its peak beyond what was there before it."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or the pass would live on what the one before has freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except OSError:
        return None
    before = kilobytes("VmRSS:")
    run()
    return max(0, kilobytes("VmHWM:") - before) / 1024


def growth(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> float | None:
    """Megabytes that the C library holds for a model after forwards at these sizes, beyond those after the first two.

    What is free but not returned to the system is not counted; None where the C library does not tell.
    """
    c = ctypes.CDLL(None)
    if not hasattr(c, "mallinfo2"):
        return None
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    c.mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in names]})
    held = []
    with torch.inference_mode():
        for i, (height, width) in enumerate(sizes):
            model(torch.zeros(1, 3, height, width))
            if i in (1, len(sizes) - 1):
                gc.collect()
                held.append(c.mallinfo2().uordblks)
    return (held[-1] - held[0]) / 2**20


def _measure(
    name: str, make: Callable[[int], nn.Module], size: int, batch: int, device: torch.device, dtype, train: bool,
    budget: float,
) -> Measurement:  # fmt: skip
    torch.manual_seed(0)
    model = make(size).to(device).train(train)
    frames, channels = getattr(model, "num_frames", 0), getattr(model, "in_chans", 3)
    images = torch.randn(batch, channels, *([frames] if frames else []), size, size, device=device)

    def forward():
        with precision(device, dtype):
            return model(images)

    def run():
        if train:
            forward().float().square().mean().backward()
            model.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode():
                forward()

    clock = time.process_time
    if device.type == "cuda":

        def clock():
            torch.cuda.synchronize(device)
            return time.perf_counter()

    run()
    memory = _peak_memory(run, device)
    times, begin = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < budget and len(times) < 50):
        start = clock()
        run()
        times.append(clock() - start)
    seconds = median(times)
    return Measurement(name, size, seconds, batch / seconds, memory)


def benchmark(
    models: Sequence[str] | Mapping[str, Callable[[int], nn.Module]],
    sizes: Sequence[int],
    *,
    batch: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    threads: int = 1,
    budget: float = 3.0,
    progress: Callable = lambda *args, **kwargs: None,
) -> Iterator[Measurement]:
    """Measures every model at every size, in one run, size by size: what is compared is measured close together.

    Args:
        models: timm names, linescan's or any other; or, by a name to show, what makes a model for a size.
        sizes: sides of square images.
        batch: images per pass.
        device, dtype: where, and under which autocast.
        train: forward and backward, instead of a forward without gradients.
        threads: of the CPU.
        budget: seconds that one measurement takes, about.
        progress: called after each measurement, and with `description=` before.

    Raises:
        InputError: an unknown model, or one that a size does not fit. What was measured before has been given.
    """
    device = torch.device(device)
    makers = models if isinstance(models, Mapping) else {name: partial(_at_size, name) for name in models}
    with processes.threads(threads):
        for size in sizes:
            for name, make in makers.items():
                progress(0, description=f"{name} at {size}")
                try:
                    measured = _measure(name, make, size, batch, device, dtype, train, budget)
                except ValueError as error:
                    raise InputError(f"{name} at {size} pixels: {error}") from None
                progress(1)
                yield measured


def crossover(results: Sequence[Measurement], model: str, against: str) -> float | None:
    """The size from which `model` is faster than `against` on, between the measured ones by a power law; else None."""
    times = {(r.model, r.size): r.seconds for r in results}
    sizes = sorted({r.size for r in results})
    lead = [math.log(times[model, s] / times[against, s]) for s in sizes]
    if lead[-1] > 0:
        return None
    for i in range(len(sizes) - 1, 0, -1):
        if lead[i - 1] > 0:
            share = lead[i - 1] / (lead[i - 1] - lead[i])
            return math.exp(math.log(sizes[i - 1]) * (1 - share) + math.log(sizes[i]) * share)
    return float(sizes[0])


def crossovers(results: Sequence[Measurement], against: str | None) -> dict[str, float | None]:
    """`crossover` of each model that has been measured at the sizes of `against`."""
    by_model = {name: [r for r in results if r.model == name] for name in dict.fromkeys(r.model for r in results)}
    reference = by_model.pop(against, [])
    sizes = {r.size for r in reference}
    return {
        name: crossover([*own, *reference], name, against)
        for name, own in by_model.items()
        if reference and {r.size for r in own} == sizes
    }


def draw(results: Sequence[Measurement], against: str | None, file: BinaryIO) -> None:
    """A PNG file of time and memory against resolution, the crossovers marked."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.model for r in results))
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, name in enumerate(names):
        mine = sorted((r for r in results if r.model == name), key=lambda r: r.size)
        style = {"color": "#8d99ae", "linestyle": "--"} if name == against else {"color": f"C{i}", "linestyle": "-"}
        sizes = [r.size for r in mine]
        axes[0].plot(sizes, [1e3 * r.seconds for r in mine], marker="o", label=name, **style)
        if all(r.memory_mb is not None for r in mine):
            axes[1].plot(sizes, [r.memory_mb for r in mine], marker="o", label=name, **style)
        cross = crossovers(results, against).get(name)
        if cross and cross > min(sizes):
            axes[0].axvline(cross, color=style["color"], linewidth=0.8, linestyle=":")
            axes[0].annotate(f"{cross:.0f} px", (cross, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                             color=style["color"], ha="right")  # fmt: skip
    for axis, label in zip(axes, ("milliseconds per pass", "MB at the peak, beside weights")):
        axis.set(xscale="log", yscale="log", xlabel="side of the image in pixels", ylabel=label)
        ticks = sorted({r.size for r in results})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(file, format="png", dpi=150)


def machine() -> dict:
    """What times depend on, in JSON's types."""
    processor = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():  # Linux says no more than x86_64 elsewhere
        lines = facts.read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def describe(results: Sequence[Measurement], against: str | None, **settings) -> dict:
    """Settings, machine, every measurement and the crossovers, in JSON's types."""
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": {k: str(v) for k, v in settings.items()},
        "against": against,
        "crossover_px": crossovers(results, against),
        "results": [asdict(r) for r in results],
    }


def write_report(results: Sequence[Measurement], against: str | None, out: str | Path, **settings) -> list[Path]:
    """Writes OUT.json (see `describe`) and, where matplotlib is installed, OUT.png; returns their paths."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(".json")]
    with atomic(paths[0]) as file:
        file.write(json.dumps(describe(results, against, **settings), indent=2).encode() + b"\n")
    if find_spec("matplotlib"):
        paths.append(out.with_suffix(".png"))
        with atomic(paths[1]) as file:
            draw(results, against, file)
    return paths
