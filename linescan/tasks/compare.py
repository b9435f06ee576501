"""Variants of one model under one recipe: which mixer, which routes, which merge?

Every variant is trained with several seeds, each run in a folder of its own as `linescan train` writes it, so that a
comparison that was stopped goes on where it was. A page shows the scores with their spread over seeds against the
parameters, and time and memory against the resolution.
"""

import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..engine.atomic import atomic, write_all
from ..engine.recipe import Recipe
from ..errors import CheckpointError, Diverged, InputError, known, one_line
from ..media.look import GREY, INK, PAPER, plain
from .report import csv_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..engine.benchmark import Measurement

__all__ = ["Outcome", "Variant", "draw", "measure", "table", "train_all", "variants", "write"]


@dataclass(frozen=True)
class Variant:
    """One model of a comparison.

    Attributes:
        name: its mixer and what else differs from the others, as in "s6" or "s6, gate".
        args: arguments of the model, over those of the recipe.
        folder: a name for its files, which stays the same as other variants come and go.
    """

    name: str
    args: dict[str, Any]
    folder: str = ""


def variants(mixers: Sequence[str], routes: Sequence[str] = (), merges: Sequence[str] = ()) -> list[Variant]:
    """Every combination of mixers, routes and merges.

    Args:
        mixers: names of `linescan.layers.mixers.MIXERS`; "a+b" is a hybrid whose blocks have a and b in turn. "all"
            stands for every one.
        routes: what `routes=` of the model takes; none: the model's own.
        merges: what `merge=` takes; none: the model's own.

    Raises:
        InputError: an unknown mixer, or nothing to compare.
    """
    from ..layers.mixers import MIXERS

    mixers = [one for name in mixers for one in (MIXERS if name == "all" else [name])]
    for name in mixers:
        for part in name.split("+"):
            known("a mixer", part, list(MIXERS))
    axes = {"mixer": mixers, "routes": routes, "merge": merges}
    axes = {key: list(dict.fromkeys(values)) for key, values in axes.items() if values}
    if "mixer" not in axes:
        raise InputError("a comparison needs mixers, as in --mixers s6,gla")
    made = []
    for values in product(*axes.values()):
        args = dict(zip(axes, values, strict=True))
        name = ", ".join(args[key] for key in axes if key == "mixer" or len(axes[key]) > 1)
        folder = re.sub(r"[^A-Za-z0-9+,.-]+", "_", " ".join(values))
        if "+" in args["mixer"]:
            args["mixer"] = tuple(args["mixer"].split("+"))
        made.append(Variant(name, args, folder))
    return made


# -- training ----------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What a run came to: the value of the task's primary score, its name, whether more is better."""

    value: float
    name: str
    higher: bool


@dataclass
class Outcome:
    """What became of a variant.

    Attributes:
        variant: which.
        scores: of its runs that came to an end, by seed.
        errors: one line for each of the others, by seed.
        parameters: of the model; None where no run came to an end.
        costs: time and memory of a forward pass at several sizes.
    """

    variant: Variant
    scores: dict[int, float] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    parameters: int | None = None
    costs: list["Measurement"] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        """Of the scores."""
        return mean(self.scores.values()) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None of fewer than two."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else None


def _begin() -> None:
    """What a process does before its first run: it computes with one thread, and ends when its parent does."""
    import torch

    def follow() -> None:
        parent.join()
        os._exit(1)

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=follow, daemon=True).start()


def _train(recipe: Recipe, folder: Path, device: str | None) -> Score:
    """One run, in a process of its own; what it says goes to FOLDER/log.txt."""
    from ..engine.processes import processes
    from ..engine.recipe import Run
    from ..engine.training import Training

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        with processes(device) as alone:
            training = Training(recipe, folder, alone, Run(device=device, resume=True))
            scores, judge = training.run(), training.task.evaluator
    return Score(scores[judge.primary], judge.primary, judge.higher)


def train_all(
    recipe: Recipe,
    made: Sequence[Variant],
    to: Path,
    *,
    seeds: int = 1,
    jobs: int = 1,
    device: str | None = None,
    progress: Callable[..., Any] = lambda *args, **kwargs: None,
) -> tuple[list[Outcome], Score | None]:
    """Trains every variant with every seed; runs that are finished are not trained again.

    Args:
        recipe: of all runs; its seed is the first one.
        made: the variants.
        to: the folder; a run is TO/VARIANT/SEED.
        seeds: runs of each variant.
        jobs: runs at once, each in a process with one thread.
        device: as `linescan train` takes it.
        progress: called after each run, with `description=`.

    Returns:
        An outcome for each variant, and one score, for its name and direction; None where no run came to an end.
    """
    from ..engine.processes import beginner

    outcomes = [Outcome(variant) for variant in made]
    # All have one run before any has two.
    waiting = [(outcome, seed) for seed in range(recipe.seed, recipe.seed + seeds) for outcome in outcomes]
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    kind = None
    try:
        while waiting:
            runs: dict[Future[Score], tuple[Outcome, int]] = {}
            lost = []
            pool = ProcessPoolExecutor(jobs, beginner(), _begin)
            try:
                for outcome, seed in waiting:
                    variant = outcome.variant
                    own = replace(recipe, model_args={**recipe.model_args, **variant.args}, seed=seed)
                    runs[pool.submit(_train, own, to / variant.folder / str(seed), device)] = outcome, seed
                for run in as_completed(runs):
                    outcome, seed = runs[run]
                    try:
                        kind = run.result()
                        outcome.scores[seed] = kind.value
                    except BrokenProcessPool:
                        lost.append((outcome, seed))
                        continue
                    except (InputError, CheckpointError, Diverged, OSError, RuntimeError, ValueError) as error:
                        outcome.errors[seed] = one_line(error, 400)
                    progress(1, description=f"trained {outcome.variant.name}")
            finally:
                pool.shutdown(cancel_futures=True)
            # Runs begin in their order: the first that are lost are those that were running.
            waiting = [run for run in waiting if run in lost]
            for outcome, seed in waiting[:jobs]:
                outcome.errors[seed] = "its process was ended from outside"
                progress(1, description=f"trained {outcome.variant.name}")
            del waiting[:jobs]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return outcomes, kind


# -- time and memory ---------------------------------------------------------------------------------------------------


def measure(
    outcomes: Sequence[Outcome],
    to: Path,
    sizes: Sequence[int] = (),
    *,
    times: bool = True,
    device: str = "cpu",
    progress: Callable[..., Any] = lambda *args, **kwargs: None,
) -> Iterator["Measurement"]:
    """Counts parameters, and measures a forward pass of each variant at every size, with one thread on a CPU.

    Args:
        outcomes: of `train_all`; `parameters` and `costs` are filled in.
        to: its folder.
        sizes: sides of square images in pixels; none: the size of the training, and four and eight times that.
        times: whether to measure at all.
        device: where.
        progress: as of `linescan.engine.benchmark.benchmark`.
    """
    from ..engine.benchmark import benchmark
    from ..engine.cards import build, restore

    builders, by_name = {}, {}
    for outcome in outcomes:
        if outcome.scores:
            seed = min(outcome.scores)
            model, card = restore(None, to / outcome.variant.folder / str(seed) / "model.safetensors")
            outcome.parameters = sum(parameter.numel() for parameter in model.parameters())
            outcome.costs = []
            by_name[outcome.variant.name] = outcome
            builders[outcome.variant.name] = partial(_at_size, build, card.model, card.args)
            sizes = sizes or [factor * max(card.preprocess.size[-2:]) for factor in (1, 4, 8)]
    for cost in benchmark(builders, sizes, device=device, progress=progress) if times else ():
        by_name[cost.model].costs.append(cost)
        yield cost


def _at_size(build: Callable, name: str, args: dict, size: int) -> Any:
    return build(name, **{**args, "img_size": size})


# -- the page ----------------------------------------------------------------------------------------------------------


def ranked(outcomes: Sequence[Outcome], higher: bool = True) -> list[Outcome]:
    """The best first; those without a score at the end."""
    sign = -1 if higher else 1
    return sorted(outcomes, key=lambda o: (o.mean is None, sign * (o.mean or 0.0)))


def table(outcomes: Sequence[Outcome], kind: Score | None) -> list[list[str]]:
    """The rows of a table, the best first and column names before."""
    columns = ["model", "parameters", kind.name if kind else "score"]
    costs = next((o.costs for o in outcomes if o.costs), [])
    columns += [f"ms at {cost.size} px" for cost in costs]
    memory = bool(costs) and costs[-1].memory_mb is not None
    rows = [columns + ([f"MB at {costs[-1].size} px"] if memory else [])]
    for outcome in ranked(outcomes, kind.higher if kind else True):
        score = "failed" if outcome.mean is None else f"{outcome.mean:.2f}"
        if outcome.spread is not None:
            score += f" ± {outcome.spread:.2f}"
        cells = [outcome.variant.name, f"{outcome.parameters:,}" if outcome.parameters else "-", score]
        cells += [f"{1e3 * cost.seconds:.1f}" for cost in outcome.costs] or ["-"] * len(costs)
        if memory:
            cells.append(f"{outcome.costs[-1].memory_mb:.0f}" if outcome.costs else "-")
        rows.append(cells)
    return rows


def write(outcomes: Sequence[Outcome], kind: Score | None, recipe: Recipe, to: Path) -> list[Path]:
    """Writes compare.json, compare.csv (a row for each run), compare.md (a table to paste) and, with matplotlib,
    compare.png; returns their paths."""
    from ..engine.benchmark import machine

    columns, *rows = table(outcomes, kind)
    rule = ["---", *["---:"] * (len(columns) - 1)]
    page = {"machine": machine(), "recipe": recipe.as_dict(), "score": kind and kind.name,
            "results": [asdict(outcome) for outcome in outcomes]}  # fmt: skip
    runs = (
        [o.variant.name, o.parameters, seed, o.scores.get(seed), o.errors.get(seed)]
        for o in outcomes
        for seed in sorted(o.scores | o.errors)
    )
    contents = {
        "compare.md": "".join(f"| {' | '.join(row)} |\n" for row in [columns, rule, *rows]).encode(),
        "compare.csv": csv_bytes(["model", "parameters", "seed", kind.name if kind else "score", "error"], runs),
        "compare.json": json.dumps(page, indent=2).encode() + b"\n",
    }
    paths = write_all(to, contents)
    if kind and find_spec("matplotlib"):
        with atomic(to / "compare.png") as file:
            draw(outcomes, kind, f"{recipe.model} on {Path(recipe.data).name}", file)
        paths.append(to / "compare.png")
    return paths


def draw(outcomes: Sequence[Outcome], kind: Score, setting: str, file: BinaryIO) -> None:
    """A PNG file: scores over parameters and over time, time and memory over the resolution."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [outcome for outcome in ranked(outcomes, kind.higher) if outcome.scores]
    colours = {o.variant.name: colormaps["turbo"](0.05 + 0.9 * i / max(1, len(shown) - 1)) for i, o in enumerate(shown)}
    figure = Figure(figsize=(13, max(10, 0.36 * len(shown))), dpi=120, facecolor=PAPER, layout="constrained")
    seeds = max(len(o.scores) for o in shown)
    figure.suptitle(f"The same model, in {len(shown)} variants: {setting}", color=INK, weight="bold", fontsize=15)
    (by_size, by_time), (time, memory) = figure.subplots(2, 2)
    panels = [(by_size, "thousands of parameters", lambda o: (o.parameters or 0) / 1e3)]
    sizes = sorted({cost.size for o in shown for cost in o.costs})
    if sizes:
        panels.append((by_time, f"ms of a forward pass at {sizes[0]} px", lambda o: 1e3 * o.costs[0].seconds))
    for axis, below, place in panels:
        for o in shown:
            how = dict(color=colours[o.variant.name], marker="o", capsize=3, linewidth=1.2, clip_on=False)
            axis.errorbar(place(o), o.mean, o.spread, **how)
        _dress(axis, f"{kind.name}, mean and deviation of {seeds} seeds" if seeds > 1 else kind.name, below)
        _label(axis, [(o.variant.name, place(o), o.mean, colours[o.variant.name]) for o in shown])
    for axis, title, value in (
        (time, "ms of a forward pass", lambda cost: 1e3 * cost.seconds),
        (memory, "MB at its peak, beside weights", lambda cost: cost.memory_mb),
    ):
        lines = [(o, [(c.size, value(c)) for c in o.costs if value(c)]) for o in shown]
        lines = [(o, points) for o, points in lines if points]
        for o, points in lines:
            axis.plot(*zip(*points), color=colours[o.variant.name], marker="o", markersize=3, linewidth=1.4)
        if lines:
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        _dress(axis, title, "side of the image in pixels")
        _label(axis, [(o.variant.name, *points[-1], colours[o.variant.name]) for o, points in lines])
    figure.savefig(file, format="png")


def _dress(axis: "Axes", title: str, below: str) -> None:
    axis.set_title(title, loc="left", color=INK, weight="bold", fontsize=11)
    axis.set_xlabel(below, color=GREY)
    axis.set_axisbelow(True)
    plain(axis, "both")


def _label(axis: "Axes", points: list[tuple[str, float, float, Any]], least: float = 0.03) -> None:
    """Names in a column at the right, as high as their points and no closer to each other than `least` of the axis."""
    if not points:
        return
    axis.get_ylim()  # so that the limits are those of the data
    into = axis.transData + axis.transAxes.inverted()
    heights = sorted(((into.transform((x, y))[1], name, (x, y), colour) for name, x, y, colour in points), reverse=True)
    at, least = 1.0 + least, min(least, 1 / len(points))
    for rank, (height, name, point, colour) in enumerate(heights):
        lowest = least * (len(heights) - 1 - rank)
        at = max(min(height, at - least), lowest)
        axis.annotate(
            name, point, (1.02, at), textcoords="axes fraction", fontsize=7.5, color=INK, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.7}, annotation_clip=False,
        )  # fmt: skip
