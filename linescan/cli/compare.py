"""Variants of one model, trained on equal terms."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.table import Table

from linescan.engine.progress import progress_bar, say, show_table
from linescan.engine.recipe import Recipe, Run
from linescan.errors import InputError
from linescan.tasks.recipes import RECIPES

from .options import app, epilog_of, named_task, side_lengths, word_after
from .train import recipe_of, training_of, with_recipe

# A small network on handwritten digits, which need no download.
DIGITS = (
    "--data digits --model scan_tiny --epochs 6 --batch 32 --lr 3e-3 --warmup 1 --model-arg img_size=16 "
    "--model-arg patch_size=2 --model-arg embed_dim=64 --model-arg depth=2 --model-arg head_dim=16 "
    "--model-arg mlp_ratio=2"
).split()
EXAMPLES = (
    "linescan compare",
    "linescan compare --mixers all --seeds 3 --jobs 2 --epochs 12",
    "linescan compare --mixers s6,s6+window --routes row,-row --routes hilbert,-hilbert --merge mean --merge gate",
    "linescan compare --mixers s6,gla,softmax --data flowers --model scanh_tiny --model-arg img_size=64 --epochs 30",
)


@app.command(
    epilog=epilog_of(EXAMPLES), context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)  # fmt: skip
def compare(
    context: typer.Context,
    mixers: Annotated[
        str, typer.Option(help="Names of docs/mixers.md; a+b is a hybrid of both in turn; all is every one.")
    ] = "s6,gla,wkv6,delta,softmax",
    routes: Annotated[
        Optional[list[str]], typer.Option(help="Routes of the model; may be repeated, to compare them.")
    ] = None,
    merge: Annotated[
        Optional[list[str]], typer.Option(help="How routes become one: sum, mean, gate, ...; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model, with seeds one after the other.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each with one thread.")] = 1,
    sizes: Annotated[
        Optional[str], typer.Option(help="Sides of images to time; default: 1, 4 and 8 times that of the training.")
    ] = None,
    times: Annotated[
        bool, typer.Option("--times/--no-times", help="Measure time and memory, once all runs are at their end.")
    ] = True,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/compare"),
):
    """Train variants of one model on equal terms: which mixer, which routes, which merge?

    All other options are those of `linescan train`, for any task; without --data, a small network is trained on
    handwritten digits. The same command again goes on where it was stopped. Runs that share a machine are slower each,
    so time and memory are measured at the end, one model after the other; on a busy machine, train with --no-times,
    and give the same command without it later.
    """
    from linescan.tasks.compare import measure, table, train_all, variants, write

    made = variants(mixers.split(","), routes or (), merge or ())
    recipe, device = _recipe(context.args)
    sides = side_lengths(sizes) if sizes else []
    with progress_bar("training", len(made) * seeds) as advance:
        outcomes, kind = train_all(recipe, made, to, seeds=seeds, jobs=jobs, device=device, progress=advance)
    for outcome in outcomes:
        for seed, error in outcome.errors.items():
            say(("failed", "red"), f" {outcome.variant.name} with seed {seed}: {error}")
    timed = sum(map(bool, (o.scores for o in outcomes))) * (len(sides) or 3) if times else 0
    with progress_bar("measuring", timed, show=times) as advance:
        for _ in measure(outcomes, to, sides, times=times, device=device or "cpu", progress=advance):
            pass
    columns, *rows = table(outcomes, kind)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    show_table(shown)
    for path in write(outcomes, kind, recipe, to):
        say(str(path))
    raise typer.Exit(1 if any(outcome.errors for outcome in outcomes) else 0)


def _recipe(args: list[str]) -> tuple[Recipe, str | None]:
    """The recipe that options of `linescan train` make, and the device."""
    args = with_recipe(args)
    if not (word_after(args, "--data") or word_after(args, "-d")):
        args = [*DIGITS, *args]
    task = named_task(args, list(RECIPES))
    options = training_of(task).make_context("linescan compare", list(args)).params
    for name in ("task", "to", "recipe", "config", "cfg_options"):
        if options.pop(name) and name == "config":
            raise InputError("models of a --config are compared by training each with `linescan train`")
    device = options["device"]
    for f in fields(Run):
        del options[f.name]
    options["model"] = options["model"] or "scan_tiny"
    return recipe_of(task, options), device
