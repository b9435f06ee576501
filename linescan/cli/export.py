"""Weights and features for other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from linescan.engine.progress import say
from linescan.errors import InputError

from .options import Batch, Checkpoint, Device, Floats, Model, ModelArgs, Precision, command, model_args
from .predict import Sources, Strict, answer_files

if TYPE_CHECKING:
    from linescan.tasks.tool import Tool, Writer


@command(
    "linescan convert vim_t_midclstok_76p1acc.pth --model vim_tiny_patch16_224 --out vim_tiny",
    "linescan convert runs/flowers/best.safetensors --out flowers-vim --licence cc-by-4.0",
    "linescan convert mine.pth --model vmamba_tiny_s1l8 --model-arg num_classes=10 --out mine",
)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' file, or one of linescan's (.safetensors, .pth).")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    model: Model = None,
    licence: Annotated[
        Optional[str], typer.Option(help="Of the weights; default: as published, none for weights trained further.")
    ] = None,
    model_arg: ModelArgs = None,
):
    """Write a classifier's weights as a folder in the layout of the Hugging Face Hub.

    The folder holds model.safetensors, config.json and a model card with the licence;
    `timm.create_model("local-dir:OUT", pretrained=True)` reads it, and `hf upload` pushes it.
    """
    if to.exists() and not to.is_dir():
        raise InputError(f"{to} is a file; --out is a folder")
    from linescan.engine.cards import restore
    from linescan.engine.hub import write_folder

    network, card = restore(model, checkpoint, **model_args(model_arg))
    for path in write_folder(to, network, card, licence):
        say(str(path))


@command(
    "linescan embed photos --model vim_tiny_patch16_224 --out features.npz",
    "linescan embed photos 'more/**/*.png' --checkpoint model.safetensors --out features.parquet",
    "find . -name '*.jpg' | linescan embed - --model vmamba_tiny_s1l8 --out features.npz",
)
def embed(
    paths: Sources,
    to: Annotated[Path, typer.Option("--out", "-o", help="A .npz or a .parquet file.")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Batch = 32,
    model_arg: ModelArgs = None,
    strict: Strict = False,
):
    """Write the features of images and videos: what the classifier reads, a row for each file (and frame).

    npz: arrays `path`, `frame` and `features` (rows, channels), float32; parquet: columns of these names. `frame` is -1
    for a whole file. A file that cannot be read is named and left out; the exit status is then 1.
    """
    if to.suffix not in (".npz", ".parquet"):
        raise InputError(f"--out is a .npz or a .parquet file, not {to}")
    if to.is_dir():
        raise InputError(f"{to} is a folder; --out is a file")

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.extras import require
        from linescan.tasks.embed import Embedder, Features

        if to.suffix == ".parquet":
            require("pyarrow", "parquet")
        args = {"device": device, "dtype": precision.dtype, "batch": batch, "strict": strict}
        return Embedder(model, checkpoint, **args, **model_args(model_arg)), Features(to)

    answer_files(open_tool, paths, None, False, False, "embedding")
