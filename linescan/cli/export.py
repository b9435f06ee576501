"""Weights, packages and features for other programs."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from linescan.engine.atomic import expect_file, expect_folder
from linescan.engine.progress import say
from linescan.errors import InputError

from .options import Batch, Checkpoint, Device, Floats, Model, ModelArgs, Precision, command, model_args, pixels
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
    expect_folder(to)
    from linescan.engine.cards import restore
    from linescan.engine.hub import write_folder

    network, card = restore(model, checkpoint, **model_args(model_arg))
    for path in write_folder(to, network, card, licence):
        say(str(path))


class Format(str, Enum):
    """Names of `linescan.engine.packages.FORMATS`."""

    onnx = "onnx"
    pt2 = "pt2"
    trace = "torchscript-trace"


@command(
    "linescan export vim_tiny_patch16_224 --out vim.onnx",
    "linescan export vmamba_tiny_s1l8 -c mine.pth --model-arg num_classes=10 --model-arg img_size=384 --out mine.onnx",
    "linescan export -c runs/flowers/best.safetensors --format pt2 --out flowers.pt2",
    "linescan export segman_seg_tiny -c segman.pth --size 512x1024 --out segman.onnx",
    "linescan classify vim.onnx cat.jpg",
)
def export(
    name: Annotated[Optional[str], typer.Argument(metavar="MODEL", help="A name of `linescan list`, or of timm; not "
                                                  "needed with a checkpoint that linescan has written.")] = None,
    to: Annotated[Optional[Path], typer.Option("--out", "-o", help="The file. Default: MODEL and the suffix.")] = None,
    format: Annotated[Format, typer.Option(help="onnx runs anywhere; pt2 (compiled for this processor) and "
                                           "torchscript-trace run in torch.")] = Format.onnx,
    checkpoint: Checkpoint = None,
    precision: Precision = Floats.fp32,
    size: Annotated[Optional[str], typer.Option(metavar="HxW", help="Of images, for a network that is no classifier. "
                                                "Default: as published.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="onnx without functions, for runtimes that do not know them: "
                                        "linescan's kernels then never run.")] = False,
    model_arg: ModelArgs = None,
):  # fmt: skip
    """Write a network as one file for other runtimes, with its preprocessing and the names of its classes.

    Batches may have any size; images have the size of the model (`--model-arg img_size=384` for another classifier,
    `--size 480x640` for other networks). What was written is run once, and its answers are compared with the model's.
    `linescan classify FILE IMAGE` runs a classifier: an ONNX file with linescan's kernels, where they are installed.
    """
    from linescan import zoo
    from linescan.engine.cards import restore
    from linescan.engine.packages import FORMATS, expect_format, export_package

    if name is None and checkpoint is None:
        raise InputError("name a model (`linescan list` shows them), or a checkpoint with --checkpoint")
    to = to or Path(f"{name or checkpoint.stem}{FORMATS[format.value]}")

    def known(model: str) -> "zoo.Entry | None":
        """What the zoo says of a model; None of timm's. Raises InputError for one that cannot be exported."""
        entry = zoo.find(model) if zoo.is_model(model) else None
        if entry and entry.reads_points:
            raise InputError(f"{model} reads point clouds; networks of images, videos and volumes can be exported")
        return entry

    expect_format(to, format.value, precision.dtype)  # before weights are fetched, as all that needs none
    expect_file(to)
    if plain and format is not Format.onnx:
        raise InputError(f"--plain is for onnx, not {format.value}")
    if name:
        known(name)
    sides = pixels(size, "--size")
    network, card = restore(name, checkpoint, **model_args(model_arg))
    if card.quantised:
        raise InputError(f"{checkpoint} is quantised, which linescan alone runs: export what it was made from")
    entry, shapes = known(card.model), None
    if entry and entry.task != "classification":
        shapes = [(*shape[:-2], *(sides or shape[-2:])) if len(shape) >= 3 else shape for shape in entry.inputs]
    elif sides:
        raise InputError(f"a classifier is built for its size: --model-arg 'img_size=[{sides[0]},{sides[1]}]'")
    error = export_package(network, card, to, format.value, precision.dtype, shapes, plain)
    say(f"{to}: {to.stat().st_size / 1e6:.1f} MB, its answers differ from the model's by at most {error:.0e}")


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
    expect_file(to)

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.extras import require
        from linescan.tasks.embed import Embedder, Features

        if to.suffix == ".parquet":
            require("pyarrow", "parquet")
        args = {"device": device, "dtype": precision.dtype, "batch": batch, "strict": strict}
        return Embedder(model, checkpoint, **args, **model_args(model_arg)), Features(to)

    answer_files(open_tool, paths, None, False, False, "embedding")
