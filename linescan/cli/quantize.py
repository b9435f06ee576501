"""Models of fewer bits."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from linescan.engine.progress import progress_bar, say, show

from .names import complete_models
from .options import Batch, Checkpoint, Json, ModelArgs, command, model_args, show_json


@command(
    "linescan quantize --checkpoint runs/demo/model.safetensors --calibrate digits -o demo-w8a8.safetensors",
    "linescan quantize vim_tiny_patch16_224 --calibrate photos -o vim-w8a8.safetensors",
    "linescan quantize vim_tiny_patch16_224 --bits w4a8 --calibrate photos --images 128 -o vim-w4a8.safetensors",
    "linescan quantize vmamba_tiny_s1l8 --method dynamic -o vmamba-int8.safetensors",
    "linescan classify cat.jpg --checkpoint vim-w8a8.safetensors",
)
def quantize(
    model: Annotated[
        Optional[str],
        typer.Argument(
            help="A name of `linescan list`; not needed with a checkpoint of linescan's own.",
            autocompletion=complete_models,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="mambaquant|quamba|dynamic|naive",
            help="mambaquant: rotations, smoothing and percentile scales. quamba: rotations, and a percentile for what "
            "is scanned. dynamic: int8 linear layers, no calibration. naive: min-max scales, to compare with.",
        ),
    ] = "mambaquant",
    bits: Annotated[
        str, typer.Option(metavar="wNaM", help="Bits of weights and activations, 2 to 8 each: w8a8, w4a8, w4a4.")
    ] = "w8a8",
    calibrate: Annotated[
        Optional[str],
        typer.Option(metavar="FOLDER|digits", help="Images like those that the model is for; labels are not read."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of them.")] = 64,
    to: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")] = Path(
        "runs/quantized.safetensors"
    ),
    batch: Batch = 8,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Quantise a classifier: weights and activations become integers of a few bits.

    OUT is a checkpoint like any other: `classify`, `evaluate` and `embed` read it with --checkpoint. Beside it, a .csv
    and a .png show what rounding does to each layer. 8-bit linear layers run in int8 on CPUs that have instructions
    for it; scans and convolutions are simulated: their numbers are rounded as integers would be, and computed in
    float32.
    """
    from linescan.quantise import Recipe
    from linescan.tasks.quantise import quantise_checkpoint

    recipe = Recipe(method, bits)
    with progress_bar("opening", 1) as advance:
        result = quantise_checkpoint(
            model, checkpoint, recipe, calibrate, to, images=images, batch=batch, progress=advance,
            expect=lambda total: advance(0, total=total), **model_args(model_arg),
        )  # fmt: skip
    for message in result.broken:
        say(("left out", "yellow"), f" {message}")
    if as_json:
        show_json(result.as_dict())
    else:
        before, after = result.bytes_before / 1e6, result.bytes_after / 1e6
        show((f"{result.model}: {before:.2f} MB of weights -> {after:.2f} MB", "bold green"), f" ({method} {bits})")
        show(result.arithmetic)
        if result.layers:
            show(
                f"{100 * result.same:.1f} % of {result.images} images keep their class; its probability changes by "
                f"{100 * result.change:.2f} % on average"
            )
            worst = sorted(result.layers, key=lambda layer: layer.decibels)[:3]
            show("most noise: " + ", ".join(f"{e.layer} ({e.decibels:.1f} dB)" for e in worst))
    for path in result.files:
        say(str(path))
    raise typer.Exit(1 if result.broken else 0)
