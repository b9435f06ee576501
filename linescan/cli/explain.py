"""Where a model finds its answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from linescan.errors import InputError

from .options import Checkpoint, Device, Json, Model, ModelArgs, command, model_args
from .predict import Out, Sources, answer_files

if TYPE_CHECKING:
    from linescan.tasks.tool import Tool, Writer


@command(
    "linescan explain cat.jpg --model vmamba_tiny_s1l8 --out why",
    "linescan explain cells/test --checkpoint runs/cells/model.safetensors --class defective",
    "linescan explain cat.jpg --model vim_tiny_patch16_224 --at 0.3,0.6 --layer 20",
    "linescan explain cat.jpg --model resnet18",
)
def explain(
    paths: Sources,
    model: Model = None,
    checkpoint: Checkpoint = None,
    to: Out = Path("runs/explain"),
    label: Annotated[
        Optional[str], typer.Option("--class", help="The class to explain, by name or number; default: the likeliest.")
    ] = None,
    at: Annotated[
        str, typer.Option(metavar="X,Y", help="The token whose field and attention are drawn, as shares of the image.")
    ] = "0.5,0.5",
    layer: Annotated[int, typer.Option(help="Whose attention: the number of a recurrence; -1 is the last.")] = -1,
    device: Device = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Show where a classifier finds its answer: maps over the image, as pictures.

    NAME-activation.png: what speaks for the class (Grad-CAM). NAME-field.png: the pixels that the last features at one
    place depend on; receptive-field.png is the mean over all images. NAME-attention.png: what a recurrence reads for
    the token at that place (models of linescan).
    """
    try:
        place = tuple(float(share) for share in at.split(","))
    except ValueError:
        place = ()
    if len(place) != 2:
        raise InputError(f"--at is two shares of the width and the height, as in 0.5,0.5, not {at!r}")

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.explain import Explainer, Heat

        args = model_args(model_arg) | {"label": label, "place": place, "layer": layer}
        return Explainer(model, checkpoint, device=device, **args), Heat(to)

    answer_files(open_tool, paths, to, False, as_json, "explaining")
