"""Building, measuring, saving and restoring models by their timm names."""

import json
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import linescan  # noqa: F401  (registers the models)
from linescan.checkpoint import CheckpointError, load_checkpoint

from ..errors import InputError
from ..media.preprocess import Preprocess
from .atomic import atomic

__all__ = ["build", "preprocess_of", "measure", "ModelCard", "save_model", "read_card", "restore"]

_KEY = "linescan"  # of our entry in a safetensors file's metadata


def build(name: str, **args) -> nn.Module:
    """`timm.create_model`, with one clear line for what goes wrong.

    Raises:
        InputError: no such model, or it cannot be built with these arguments.
    """
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 3)
        raise InputError(
            f"unknown model {name!r}; " + (f"near it: {', '.join(near)}" if near else "`linescan list` shows all")
        )
    try:
        model = timm.create_model(name, **args)
    except Exception as error:  # a constructor may raise anything at all
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        given = ", ".join(f"{k}={v}" for k, v in args.items())
        raise InputError(f"cannot build {name} with {given or 'its defaults'}: {reason}") from error
    height, width = _sides(args.get("img_size") or model.pretrained_cfg["input_size"][1:])
    smallest = getattr(model, "min_size", 1)
    if min(height, width) < smallest:
        raise InputError(f"{name} reads pictures of at least {smallest}x{smallest} pixels, not {height}x{width}")
    return model


def _sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


def preprocess_of(model: nn.Module, in_chans: int | None = None, img_size: int | tuple | None = None) -> Preprocess:
    """What the model's `pretrained_cfg` asks for, at another size or number of channels if given."""
    cfg = timm.data.resolve_model_data_config(model)
    channels, height, width = cfg["input_size"]
    mean, std = cfg["mean"], cfg["std"]
    if in_chans and in_chans != channels:
        channels, mean, std = in_chans, (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
    if img_size:
        height, width = _sides(img_size)
    return Preprocess(
        (channels, height, width), tuple(mean), tuple(std), cfg["interpolation"], 1.0 if img_size else cfg["crop_pct"]
    )


def measure(model: nn.Module, size: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one image or clip), counted by torch: matrix products, convolutions and scans."""
    model = model.eval()
    first = next(model.parameters())
    if frames := getattr(model, "num_frames", 0):
        size = (size[0], frames, *size[1:])
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, *size, dtype=first.dtype, device=first.device))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@dataclass(frozen=True)
class ModelCard:
    """What a file of weights says about itself, so that it can be used without being told anything.

    Attributes:
        model, args: `timm.create_model(model, **args)` builds it.
        classes: their names.
        preprocess: how it wants its pictures.
        trained: what is known of the training (epoch, step, accuracy).
    """

    model: str
    args: dict
    classes: list[str]
    preprocess: Preprocess
    trained: dict = field(default_factory=dict)


def save_model(path: str | Path, model: nn.Module, card: ModelCard) -> None:
    """Writes weights and card into one safetensors file, which is whole or absent at any moment."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(asdict(card))})
    with atomic(path) as file:
        file.write(content)


def read_card(path: str | Path) -> ModelCard | None:
    """The card of a safetensors file that linescan has written; None for any other file.

    Raises:
        CheckpointError: the file is missing, or is a damaged safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder; give a file' if path.is_dir() else 'does not exist'}")
    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{":  # not a safetensors file
            return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            card = (file.metadata() or {}).get(_KEY)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is a damaged or truncated safetensors file ({error})") from None
    if card is None:
        return None
    values = json.loads(card)
    return ModelCard(**{**values, "preprocess": Preprocess.from_dict(values["preprocess"])})


def restore(name: str | None = None, checkpoint: str | Path | None = None, **args) -> tuple[nn.Module, ModelCard]:
    """A model with weights, and what must be known to use it.

    Args:
        name: a timm name; not needed where the checkpoint is one that linescan has written.
        checkpoint: a file of weights. Without it, the published ones are fetched from the Hub.
        args: for `timm.create_model`; override those of the checkpoint's card.

    Raises:
        InputError: neither is given, they contradict each other, or the published weights cannot be had.
        CheckpointError: the file cannot be read, or is one of another model.
    """
    card = read_card(checkpoint) if checkpoint else None
    if card and name and name != card.model:
        raise CheckpointError(f"{checkpoint} is a checkpoint of {card.model}, not of {name}")
    name = name or (card.model if card else None)
    if name is None:
        what = f"{checkpoint} does not say which model it is of" if checkpoint else "no model and no checkpoint given"
        raise InputError(f"{what}; name one with --model (`linescan list` shows them)")
    if card:
        card = _at_size(card, args.get("img_size"))
        args = {**card.args, **args}
    model = build(name, **args, **({} if checkpoint else {"pretrained": True}))
    if checkpoint:
        load_checkpoint(model, checkpoint)
    if card:
        return model, replace(card, args=args)
    preprocess = preprocess_of(model, args.get("in_chans"), args.get("img_size"))
    return model, ModelCard(name, args, class_names(model), preprocess)


def _at_size(card: ModelCard, img_size: int | tuple | None) -> ModelCard:
    if img_size is None:
        return card
    size = (card.preprocess.channels, *_sides(img_size))
    return replace(card, preprocess=replace(card.preprocess, size=size))


def class_names(model: nn.Module) -> list[str]:
    """Names for a published classifier's outputs: ImageNet's or Kinetics' where there are so many, else numbers."""
    count = model.num_classes
    known = {1000: "imagenet-1k", 21841: "imagenet-21k", 21843: "imagenet-21k-goog"}
    if getattr(model, "num_frames", 0):
        from torchvision.models.video import R3D_18_Weights

        kinetics = R3D_18_Weights.KINETICS400_V1.meta["categories"]
        return list(kinetics) if count == len(kinetics) else [str(i) for i in range(count)]
    if count not in known:
        return [str(i) for i in range(count)]
    info = timm.data.ImageNetInfo(known[count])
    return [info.index_to_description(i) for i in range(count)]
