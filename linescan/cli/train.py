"""Training and evaluating."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from linescan.engine.progress import progress_bar, say, show
from linescan.errors import InputError

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
    command,
    model_args,
    show_json,
    worker_count,
)

_DATA, _MODEL, _OPTIMISER, _AUGMENT, _RUN = "In and out", "Model", "Optimiser", "Augmentation", "Run"


def _option(panel: str, help: str, *names: str, **kwargs):
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


@command(
    "linescan train --data digits --out runs/digits --epochs 30 --model-arg img_size=32 --model-arg patch_size=8 "
    "--model-arg depth=4",
    "linescan train --data flowers --out runs/flowers --model vim_small_patch16_224 --pretrained --epochs 30 "
    "--mixup 0.8 --cutmix 1 --ema 0.9998 --bf16",
    "linescan train --data flowers --out runs/flowers [dim](the same options)[/] --resume",
    "torchrun --standalone --nproc_per_node=4 -m linescan train --data imagenet --out runs/imagenet --epochs 300",
    "linescan train --config segmentation/vmamba_tiny_upernet_ade20k --cfg-options train_dataloader.batch_size=4",
)
def train(
    data: Annotated[
        Optional[str],
        _option(_DATA, "`digits`; a folder of classes; or one with train/ and val/ in it.", "--data", "-d"),
    ] = None,
    to: Annotated[Optional[Path], _option(_DATA, "The folder of the run.", "--out", "--work-dir", "-o")] = None,
    config: Annotated[
        Optional[str],
        _option(_DATA, "Segmentation or detection instead: an OpenMMLab config, a file or one of linescan's by name."),
    ] = None,
    cfg_options: Annotated[
        Optional[list[str]],
        _option(_DATA, "A value of the config; may be repeated.", "--cfg-options", metavar="KEY=VALUE"),
    ] = None,
    val: Annotated[Optional[str], _option(_DATA, "A folder of classes to hold out.")] = None,
    holdout: Annotated[float, _option(_DATA, "Without --val: the share of each class that is held out.")] = 0.1,
    workers: Annotated[
        Optional[int], _option(_DATA, "Processes that load pictures; default: 4, none for the digits.", min=0)
    ] = None,
    model: Annotated[str, _option(_MODEL, "A timm name.", "--model", "-m")] = "vim_tiny_patch16_224",
    model_arg: Annotated[
        Optional[list[str]],
        _option(_MODEL, "An argument for timm.create_model; may be repeated.", "--model-arg", metavar="KEY=VALUE"),
    ] = None,
    pretrained: Annotated[bool, _option(_MODEL, "Start from the published weights.", "--pretrained")] = False,
    checkpoint: Annotated[
        Optional[str], _option(_MODEL, "Start from these weights, but for another classifier.", "--checkpoint", "-c")
    ] = None,
    drop_path: Annotated[float, _option(_MODEL, "Stochastic depth.")] = 0.0,
    grad_checkpointing: Annotated[bool, _option(_MODEL, "Less memory, more time.", "--grad-checkpointing")] = False,
    epochs: Annotated[int, _option(_OPTIMISER, "Times that each picture is seen.", "--epochs", "-e")] = 100,
    batch: Annotated[int, _option(_OPTIMISER, "Pictures in one forward pass of a process.", "--batch", "-b")] = 64,
    accumulate: Annotated[int, _option(_OPTIMISER, "Forward passes in one step.")] = 1,
    lr: Annotated[float, _option(_OPTIMISER, "Highest learning rate (AdamW).")] = 5e-4,
    min_lr: Annotated[float, _option(_OPTIMISER, "Learning rate at the end of the cosine.")] = 1e-5,
    warmup: Annotated[float, _option(_OPTIMISER, "Epochs in which the learning rate rises.")] = 5.0,
    weight_decay: Annotated[float, _option(_OPTIMISER, "Weight decay.")] = 0.05,
    layer_decay: Annotated[
        Optional[float], _option(_OPTIMISER, "Factor of the learning rate from each layer to the one below.")
    ] = None,
    clip_grad: Annotated[Optional[float], _option(_OPTIMISER, "Largest norm of the gradient.")] = None,
    ema: Annotated[float, _option(_OPTIMISER, "Decay of a moving average of the weights; 0: none.")] = 0.0,
    augment: Annotated[
        Optional[str],
        _option(_AUGMENT, "none, light, standard, or a policy of timm; default: light for the digits, else "
                "rand-m9-mstd0.5-inc1."),
    ] = None,
    erasing: Annotated[float, _option(_AUGMENT, "How often a rectangle is erased.")] = 0.0,
    mixup: Annotated[float, _option(_AUGMENT, "Strength of mixup; 0: none.")] = 0.0,
    cutmix: Annotated[float, _option(_AUGMENT, "Strength of cutmix; 0: none.")] = 0.0,
    smoothing: Annotated[float, _option(_AUGMENT, "Label smoothing.")] = 0.1,
    bf16: Annotated[bool, _option(_RUN, "Compute in bfloat16.", "--bf16")] = False,
    device: Annotated[Optional[str], _option(_RUN, "cpu, cuda, ...; default: CUDA where there is one.")] = None,
    seed: Annotated[int, _option(_RUN, "Of everything random.", min=0)] = 0,
    save_every: Annotated[int, _option(_RUN, "Steps between saved states; 0: once an epoch.", min=0)] = 0,
    log_every: Annotated[int, _option(_RUN, "Steps between rows of metrics.csv.", min=1)] = 10,
    resume: Annotated[
        bool, _option(_RUN, "Go on from the last saved state, with the very same steps, if there is one.", "--resume")
    ] = False,
):  # fmt: skip
    """Train a classifier. Stop it as you like: --resume takes the steps it would have taken.

    With --config, a segmentor or detector is trained by OpenMMLab instead, as the config says; of the other options
    only --out, --resume and --cfg-options count then.

    The folder of the run gets model.safetensors (last epoch), best.safetensors, metrics.csv, and what TensorBoard reads
    where that is installed. Several processes: see the last example.
    """

    if config:
        from linescan.openmmlab.runner import train_config

        train_config(config, to, resume, cfg_options or ())
        return
    if data is None or to is None:
        raise InputError("training needs --data and --out, or --config")
    from linescan.engine.training import Recipe
    from linescan.engine.training import train as run

    recipe = Recipe(
        data=data, val=val, holdout=holdout, model=model, model_args=model_args(model_arg), pretrained=pretrained,
        checkpoint=checkpoint, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, min_lr=min_lr, warmup=warmup,
        weight_decay=weight_decay, layer_decay=layer_decay, clip_grad=clip_grad, augment=augment, erasing=erasing,
        mixup=mixup, cutmix=cutmix, smoothing=smoothing, ema=ema, drop_path=drop_path, bf16=bf16,
        grad_checkpointing=grad_checkpointing, seed=seed,
    )  # fmt: skip
    workers = worker_count(workers, data)
    try:
        run(recipe, to, device=device, resume=resume, workers=workers, save_every=save_every, log_every=log_every)
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume goes on from the last state saved in {to}")
        raise typer.Exit(130) from None


@command(
    "linescan evaluate --data digits --checkpoint runs/demo/model.safetensors",
    "linescan evaluate --data imagenet/val --model vim_tiny_patch16_224 --batch 128 --precision bf16",
)
def evaluate(
    data: Annotated[str, typer.Option("--data", "-d", help="A folder of classes, or `digits` (those held out).")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Batch = 64,
    workers: Workers = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Measure accuracy on labelled pictures. A broken one is named and left out; the exit status is then 1."""
    from linescan.engine.cards import restore
    from linescan.engine.data import Samples, evaluation_batches
    from linescan.engine.image_sets import Digits, Folder
    from linescan.engine.processes import Processes, pick_device
    from linescan.engine.scores import score

    us = Processes(0, 1, pick_device(device))
    restored, card = restore(model, checkpoint, **model_args(model_arg))
    if data == "digits":
        pictures = Digits(held_out=True)
    else:
        folder = Folder(data)
        # Class folders bear the names of the classes, or (ImageNet's synsets) stand in their order.
        known = set(folder.classes) <= set(card.classes)
        pictures = Folder(data, classes=card.classes) if known else folder
    if len(pictures.classes) != len(card.classes):
        raise InputError(f"{data} has {len(pictures.classes)} classes, the model {len(card.classes)}")
    samples = Samples(pictures, card.preprocess, card.preprocess.transform())
    batches = evaluation_batches(samples, batch, workers=worker_count(workers, data), pin=us.device.type == "cuda")
    with progress_bar("evaluating", len(samples)) as advance:
        scores = score(restored.to(us.device), batches, us, precision.dtype, advance)
    for index in scores.broken:
        say(("left out", "yellow"), f" {pictures.names[index]}: not an image, or damaged")
    if as_json:
        show_json({**vars(scores), "broken": [pictures.names[i] for i in scores.broken]})
    else:
        show(
            "top-1 ",
            (f"{scores.top1:.2f} %", "bold green"),
            f", top-5 {scores.top5:.2f} %, loss {scores.loss:.4f} on {scores.images} images",
        )
    raise typer.Exit(1 if scores.broken else 0)
