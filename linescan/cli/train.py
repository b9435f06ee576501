"""Training and evaluating."""

import inspect
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Optional, get_args

import typer
from typer.core import TyperCommand

from linescan.engine.progress import progress_bar, say, show
from linescan.engine.recipe import DATA, PANELS, Recipe, Run, flag
from linescan.errors import InputError
from linescan.tasks.recipes import RECIPES

from .options import (
    Batch,
    Checkpoint,
    Device,
    Floats,
    Json,
    Model,
    ModelArgs,
    Precision,
    VideoViews,
    Workers,
    app,
    command,
    epilog_of,
    model_args,
    parameters_of,
    show_json,
    worker_count,
)


def _option(help: str, *names: str, **kwargs):
    return typer.Option(*names, help=help, rich_help_panel=DATA, **kwargs)


def first_task() -> str:
    """The task that is meant where none is named."""
    return next(iter(RECIPES))


class TrainCommand(TyperCommand):
    """`linescan train`, with the options of the task that the arguments name."""

    def make_context(self, info_name, args, parent=None, **extra):
        task = first_task()
        for i, arg in enumerate(args):
            if arg == "--task" and i + 1 < len(args):
                task = args[i + 1]
            elif arg.startswith("--task="):
                task = arg.partition("=")[2]
        if task not in RECIPES:
            raise InputError(f"--task must be one of {', '.join(RECIPES)}, not {task!r}")
        return command_of(task).make_context(info_name, args, parent, **extra)


@cache
def command_of(task: str):
    """The click command that trains for a task: its options are the fields of its recipe."""
    recipe = RECIPES[task]

    def run(task: str, to: Path | None, config: str | None, cfg_options: list[str] | None, **options):
        train_task(recipe, to, config, cfg_options, options)

    about = f"{inspect.cleandoc(recipe.__doc__)}\n\n{ABOUT}"
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in about.split("\n\n"))
    names = ", ".join(RECIPES)
    own = {
        "task": (str, _option(f"What to train for: {names}. With --help: the options of that task."), first_task()),
        "to": (Optional[Path], _option("The folder of the run.", "--out", "--work-dir", "-o"), None),
        "config": (
            Optional[str],
            _option("Segmentation or detection: an OpenMMLab config, a file or one of linescan's by name."), None,
        ),
        "cfg_options": (
            Optional[list[str]],
            _option("A value of the config; may be repeated.", "--cfg-options", metavar="KEY=VALUE"), None,
        ),
    }  # fmt: skip
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, option, default) in own.items()
    ]
    options = parameters_of(recipe) + parameters_of(Run)
    parameters += sorted(options, key=lambda p: PANELS.index(get_args(p.annotation)[1].rich_help_panel))
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    single = typer.Typer(
        add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
        context_settings=app.info.context_settings,
    )  # fmt: skip
    single.command("train", epilog=epilog_of(recipe.examples))(run)
    return typer.main.get_command(single)


ABOUT = """Stop it as you like: --resume takes the steps that it would have taken.

The folder of the run gets model.safetensors (last evaluation), best.safetensors, metrics.csv, and what TensorBoard
reads where that is installed. Several processes: torchrun --standalone --nproc_per_node=4 -m linescan train ...

With --config, a segmentor or detector is trained by OpenMMLab instead, as the config says; of the other options only
--out, --resume and --cfg-options count then."""


@app.command("train", cls=TrainCommand)
def train():
    """Train a model for a task: classification, distillation, masked pre-training, ..."""


def train_task(
    recipe: type[Recipe], to: Path | None, config: str | None, cfg_options: list[str] | None, options: dict
) -> None:
    """Runs the recipe with these options; or the config, if there is one."""
    if config:
        from linescan.openmmlab.runner import train_config

        train_config(config, to, options["resume"], cfg_options or ())
        return
    if options["data"] is None or to is None:
        raise InputError("training needs --data and --out, or --config")
    from linescan.engine.training import train as run

    how = {f.name: options.pop(f.name) for f in fields(Run)}
    pairs = {f.name for f in fields(recipe) if f.metadata["metavar"] == "KEY=VALUE"}
    values = {name: model_args(value, flag(name)) if name in pairs else value for name, value in options.items()}
    try:
        run(recipe(**values), to, **how)
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume continues from the last state saved in {to}")
        raise typer.Exit(130) from None


@command(
    "linescan evaluate --data digits --checkpoint runs/demo/model.safetensors",
    "linescan evaluate --data imagenet/val --model vim_tiny_patch16_224 --batch 128 --precision bf16",
    "linescan evaluate --data kinetics/val --model videomamba_video_tiny_patch16_224.k400_f8 --views 4x3",
)
def evaluate(
    data: Annotated[str, typer.Option("--data", "-d", help="A folder of classes, or `digits` (those held out).")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Batch = 64,
    workers: Workers = None,
    views: VideoViews = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Measure accuracy on labelled images, or videos. A broken one is named and left out; the exit status is then 1."""
    from linescan.engine.cards import restore
    from linescan.engine.processes import Processes, pick_device
    from linescan.engine.scores import evaluate as run
    from linescan.media.video import Views
    from linescan.tasks.classify import Accuracy, labelled

    alone = Processes(0, 1, pick_device(device))
    restored, card = restore(model, checkpoint, **model_args(model_arg))
    frames, looks = getattr(restored, "num_frames", 0), Views.parse(views or "1x1")
    if views and not frames:
        raise InputError(f"--views are of videos; {card.model} reads images")
    samples = labelled(data, card, frames, looks)
    judge = Accuracy(samples, batch=max(batch // looks.count, 1))
    workers = worker_count(workers, data)
    with progress_bar("evaluating", len(samples)) as advance:
        result = run(
            judge, restored.to(alone.device), alone, workers=workers, dtype=precision.dtype, progress=advance
        )  # fmt: skip
    for message in result.broken:
        say(("left out", "yellow"), f" {message}")
    if as_json:
        show_json({**result.scores, "samples": result.samples, "broken": result.broken})
    else:
        scores = result.scores
        show(
            "top-1 ",
            (f"{scores['top1']:.2f} %", "bold green"),
            f", top-5 {scores['top5']:.2f} %, loss {scores['loss']:.4f} on {result.samples} "
            f"{'videos' if frames else 'images'}",
        )
    raise typer.Exit(1 if result.broken else 0)
