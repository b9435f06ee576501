"""Training and evaluating."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from linescan.engine.atomic import expect_folder
from linescan.engine.progress import progress_bar, say, show
from linescan.engine.recipe import DATA, PANELS, Recipe, Run, flag
from linescan.errors import InputError
from linescan.tasks.recipes import RECIPES, read_options

from .options import (
    Batch,
    Checkpoint,
    Device,
    Floats,
    Json,
    Model,
    ModelArgs,
    Precision,
    Workers,
    command_by_task,
    made_command,
    model_args,
    parameter,
    parameters_of,
    show_json,
    word_after,
    words_of,
    worker_count,
)


def _option(kind: Any, help: str, *names: str, **kwargs) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=DATA, **kwargs)]


def _which(tasks: list[str]) -> Any:
    return _option(str, f"One of {', '.join(tasks)}. With --help: the options of that task.")


# -- training ---------------------------------------------------------------------------------------------------------

ABOUT = """Stop it as you like: --resume takes the steps that it would have taken.

The folder of the run gets model.safetensors (last evaluation), best.safetensors, metrics.csv, and what TensorBoard
reads where that is installed. Several processes: torchrun --standalone --nproc_per_node=4 -m linescan train ...

--recipe takes all options from a file: of a published run, by its name in configs/, such as
restoration/mambair_v2_light_x2; a TOML file of your own; or the recipe.json of a run. What else stands in the command
line counts instead.

With --config, a segmentor or detector is trained by OpenMMLab instead, as the config says; of the other options only
--out, --resume and --cfg-options count then."""


@cache
def training_of(task: str):
    """`linescan train` for a task: its options are the fields of the task's recipe."""
    recipe = RECIPES[task]
    config = "Segmentation or detection: an OpenMMLab config, a file or one of linescan's by name."
    pairs = _option(
        Optional[list[str]], "A value of the config; may be repeated.", "--cfg-options", metavar="KEY=VALUE"
    )
    own = [
        parameter("task", _which(list(RECIPES)), next(iter(RECIPES))),
        parameter("to", _option(Optional[Path], "The folder of the run.", "--out", "--work-dir", "-o")),
        parameter("recipe", _option(Optional[str], "Options from a file, or of a published run by its name.")),
        parameter("config", _option(Optional[str], config)),
        parameter("cfg_options", pairs),
    ]
    options = parameters_of(recipe) + parameters_of(Run)
    options.sort(key=lambda p: PANELS.index(get_args(p.annotation)[1].rich_help_panel))
    return made_command("train", train, own + options, f"{recipe.__doc__}\n\n{ABOUT}", recipe.examples)


def recipe_of(task: str, options: dict) -> Recipe:
    """A task's recipe from the values of options."""
    pairs = {f.name for f in fields(RECIPES[task]) if f.metadata["metavar"] == "KEY=VALUE"}
    values = {name: model_args(value, flag(name)) if name in pairs else value for name, value in options.items()}
    return RECIPES[task](**values)


def with_recipe(args: list[str]) -> list[str]:
    """Arguments, and before them the options of the file that their `--recipe` names."""
    name = word_after(args, "--recipe")
    if name is None:
        return args
    task, values = read_options(name)
    if (wanted := word_after(args, "--task") or task) != task:
        raise InputError(f"--recipe {name} is one of --task {task}, not of {wanted}")
    return ["--task", task, *words_of(values), *args]


def train(
    task: str, to: Path | None, recipe: str | None, config: str | None, cfg_options: list[str] | None, **options
) -> None:
    """Trains for a task, or as the config says, if there is one; the options of `recipe` are among the others."""
    if config:
        from linescan.openmmlab.runner import train_config

        train_config(config, to, options["resume"], cfg_options or ())
        return
    if options["data"] is None or to is None:
        raise InputError("training needs --data and --out, or --config")
    from linescan.engine.training import train as run

    how = {f.name: options.pop(f.name) for f in fields(Run)}
    try:
        run(recipe_of(task, options), to, **how)
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume continues from the last state saved in {to}")
        raise typer.Exit(130) from None


ONE_LINE = "Train a model for a task: classification, distillation, ..."
command_by_task("train", list(RECIPES), training_of, ONE_LINE, with_recipe)


# -- evaluating -------------------------------------------------------------------------------------------------------

JUDGED = [task for task, recipe in RECIPES.items() if recipe.judges]


@cache
def evaluation_of(task: str):
    """`linescan evaluate` for a task: the options that count when a finished model is scored."""
    recipe = RECIPES[task]
    own = [
        parameter("task", _which(JUDGED), JUDGED[0]),
        parameter("data", _option(Optional[str], recipe.scored, "--data", "-d")),
        parameter("model", Model),
        parameter("checkpoint", Checkpoint),
        parameter("device", Device),
        parameter("precision", Precision, Floats.fp32),
        parameter("batch", Batch, 64),
        parameter("workers", Workers),
        parameter("model_arg", ModelArgs),
        parameter("to", _option(Optional[Path], PAGE, "--out", "-o")),
        parameter("as_json", Json, False),
    ]
    about = "Score a finished model. A broken sample is named and left out; the exit status is then 1."
    return made_command("evaluate", evaluate, own + parameters_of(recipe, scoring=True), about, EVALUATIONS)


PAGE = (
    "A folder for report.html (confusion matrix, scores of each class, calibration, worst mistakes), "
    "and the same as JSON and CSV."
)
EVALUATIONS = (
    "linescan evaluate --data digits --checkpoint runs/demo/model.safetensors",
    "linescan evaluate --data flowers/val --checkpoint runs/flowers/best.safetensors --out runs/flowers/report",
    "linescan evaluate --data imagenet/val --model vim_tiny_patch16_224 --batch 128 --precision bf16",
    "linescan evaluate --data kinetics/val --model videomamba_video_tiny_patch16_224.k400_f8 --views 4x3",
)


def evaluate(
    task: str,
    data: str | None,
    model: str | None,
    checkpoint: Path | None,
    device: str | None,
    precision: Floats,
    batch: int,
    workers: int | None,
    model_arg: list[str] | None,
    to: Path | None,
    as_json: bool,
    **options,
) -> None:
    """Scores a model as its task does."""
    if data is None:
        raise InputError("evaluating needs --data")
    if to:
        expect_folder(to)
    from linescan.engine.processes import Processes, pick_device
    from linescan.engine.scores import evaluate as run
    from linescan.tasks.open import restore_for

    recipe = recipe_of(task, {"data": data, "batch": batch, **options})
    alone = Processes(0, 1, pick_device(device))
    of_task = recipe.load()
    restored, card = restore_for(of_task.listed, model, checkpoint, **model_args(model_arg))
    judge = of_task.judge(recipe, restored, card)
    settings = dict(batch=batch, workers=worker_count(workers, data), dtype=precision.dtype)
    with progress_bar("evaluating", len(judge.data)) as advance:
        result = run(judge, restored.to(alone.device), alone, progress=advance, **settings)
    for message in result.broken:
        say(("left out", "yellow"), f" {message}")
    found, files = {}, []
    try:
        if to:
            found, files = judge.report(result.totals, to, f"{card.model} on {data}")
    finally:  # what has been scored is not lost with what cannot be written
        if as_json:
            show_json({**result.scores, "samples": result.samples, "broken": result.broken, **found})
        else:
            show((judge.describe(result.scores), "bold green"), f" on {result.samples} samples")
    for path in files:
        say(str(path))
    raise typer.Exit(1 if result.broken else 0)


command_by_task("evaluate", JUDGED, evaluation_of, "Score a finished model on held-out data.")
