"""Building, measuring, saving and restoring models by their names."""

import json
import math
import re
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.flop_counter import FlopCounterMode

from .. import checkpoint as checkpoints
from .. import zoo
from ..checkpoint import CARD, CheckpointError, load_state, read_state_dict
from ..errors import InputError, one_line
from ..media.clouds import PointPreprocess, ScanPreprocess
from ..media.labels import class_names as names_of_data
from ..media.preprocess import Preprocess
from ..media.volumes import VolumePreprocess
from ..notices import notice
from ..quantise import Recipe as Quantisation
from ..quantise import arithmetic, restructure
from .atomic import atomic

__all__ = [
    "ModelCard",
    "build",
    "class_names",
    "measure",
    "measure_inputs",
    "plain_preprocess",
    "points_of",
    "preprocess_of",
    "read_card",
    "restore",
    "save_model",
    "segmentor_preprocess",
]


# -- building ---------------------------------------------------------------------------------------------------------


def build(name: str, **args) -> nn.Module:
    """A model of linescan or timm, with one clear line for what goes wrong.

    Args:
        name: a registered name, with or without a tag.
        args: as for `linescan.create_model`; `pretrained` among them. An `img_size` is for all models: those that take
            images of any size as they are (a ResNet) are built without it.

    Raises:
        InputError: no such model, or it cannot be built with these arguments.
    """
    own = zoo.is_model(name.partition(".")[0])
    if not own and not timm.is_model(name):
        near = get_close_matches(name, {*zoo.list_models(), *timm.list_models()}, 3)
        raise InputError(
            f"unknown model {name!r}; " + (f"near it: {', '.join(near)}" if near else "`linescan list` shows all")
        )
    if own:
        zoo.find(name)
    try:
        if args.get("pretrained") and not own:
            _reach(name)
        size = _sides(args["img_size"]) if args.get("img_size") is not None else None
        model = _create(zoo.create_model if own else timm.create_model, name, args)
    except Exception as error:  # a constructor may raise anything at all
        given = one_line(", ".join(f"{k}={v}" for k, v in args.items())) if args else "its defaults"
        raise InputError(f"cannot build {name} with {given}: {one_line(error, 400)}") from error
    height, width = size or (getattr(model, "pretrained_cfg", {}).get("input_size") or (math.inf, math.inf))[-2:]
    smallest = getattr(model, "min_size", 1)
    if min(height, width) < smallest:
        raise InputError(f"{name} reads images of at least {smallest}x{smallest} pixels, not {height}x{width}")
    return model


def _reach(name: str) -> None:
    """Asks the server once for the weights of a model of timm, which would try for a minute, unless they are here.

    Raises:
        InputError: there is no connection.
    """
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
        return
    url = f"https://huggingface.co/{cfg.hf_hub_id}"
    try:
        zoo.connect(url)
    except OSError as error:
        raise InputError(f"cannot fetch {url}: {error}; a file that you have loads with {zoo.BY_HAND}") from None


def _create(create: Callable[..., nn.Module], name: str, args: dict) -> nn.Module:
    try:
        return create(name, **args)
    except TypeError as error:
        if "img_size" not in args or "unexpected keyword argument 'img_size'" not in str(error):
            raise
        return create(name, **{key: value for key, value in args.items() if key != "img_size"})


def _sides(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(f"img_size is a number of pixels, or height and width, not {img_size!r}")
    return sides


def preprocess_of(model: nn.Module, in_chans: int | None = None, img_size: int | tuple | None = None) -> Preprocess:
    """What the model's `pretrained_cfg` asks for, at another size or number of channels if given."""
    cfg = timm.data.resolve_model_data_config(model)
    channels, height, width = cfg["input_size"]
    mean, std = cfg["mean"], cfg["std"]
    if in_chans and in_chans != len(mean):
        channels, mean, std = in_chans, (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
    if img_size:
        height, width = _sides(img_size)
    crop_pct = 1.0 if img_size else cfg["crop_pct"]
    crop_mode = cfg["crop_mode"] if cfg["crop_mode"] in CROP_MODES else "center"
    return Preprocess((channels, height, width), tuple(mean), tuple(std), cfg["interpolation"], crop_pct, crop_mode)


def plain_preprocess(channels: int) -> Preprocess:
    """Of networks that take images of any size as they are, in 0..1."""
    return Preprocess((channels, 1, 1), (0.0,) * channels, (1.0,) * channels)


def segmentor_preprocess(entry: zoo.Entry, size: tuple[int, int] | None = None) -> Preprocess:
    """Of a segmentation model, in 0..1: (height, width) `size`, or the entry's, is what images are resized to.

    1 x 1 stands for none. How values are normalised is for the entry to say.
    """
    plain = plain_preprocess(sum(shape[0] for shape in entry.inputs))
    return replace(plain, size=(plain.channels, *(size or entry.preprocess.get("size", (1, 1)))))


def points_of(entry: zoo.Entry) -> PointPreprocess:
    """How a published model of clouds wants them; of coordinates alone."""
    return PointPreprocess(entry.inputs[0][0], **entry.preprocess)


def class_names(model: nn.Module, name: str | None = None) -> list[str]:
    """The names of a published classifier's outputs, by the data set of its weights; numbers where they are unknown.

    A model for another task has none.

    Args:
        model: the classifier.
        name: of its entry in the zoo; by default what timm's configuration says.
    """
    if not hasattr(model, "num_classes"):
        return []
    cfg = getattr(model, "pretrained_cfg", None) or {}
    full = name or ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    count = model.num_classes
    known = {1000: "ImageNet-1K", 21841: "ImageNet-21K", 21843: "ImageNet-21K-Google"}
    data = zoo.find(full).data if full and zoo.is_model(full) else known.get(count)
    names = names_of_data(data) if data else None
    return names if names and len(names) == count else [str(i) for i in range(count)]


def measure(model: nn.Module, size: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one image or clip), counted by torch: matrix products, convolutions and scans."""
    frames = getattr(model, "num_frames", 0)
    return measure_inputs(model, [(size[0], frames, *size[1:]) if frames else size])


def measure_inputs(model: nn.Module, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(parameters, multiply-adds of one sample), of a model with any inputs.

    Args:
        model: on any device, "meta" included.
        shapes: of each input, without the batch axis, as `zoo.Entry.inputs` has them.
    """
    model = model.eval()
    first = next(model.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*(torch.zeros(1, *shape, dtype=first.dtype, device=first.device) for shape in shapes))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


# -- cards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCard:
    """What a file of weights says about itself, so that it can be used without being told anything.

    Attributes:
        model, args: `linescan.create_model(model, **args)` builds it.
        classes: their names.
        preprocess: how images, clouds or volumes are made into its inputs.
        trained: what is known of the training (epoch, step, scores).
        quantised: of a quantised model `method` and `bits`, as `linescan.quantise.Recipe` takes them, and `arithmetic`,
            in words; else empty.
    """

    model: str
    args: dict
    classes: list[str]
    preprocess: Preprocess | PointPreprocess | ScanPreprocess | VolumePreprocess
    trained: dict = field(default_factory=dict)
    quantised: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        """Plain values, as a file has them; numbers that JSON has not are None."""
        values = asdict(self)
        values["trained"] = {k: v if not isinstance(v, float) or math.isfinite(v) else None
                             for k, v in self.trained.items()}  # fmt: skip
        if not self.quantised:
            del values["quantised"]
        return values

    @classmethod
    def from_dict(cls, values: object) -> "ModelCard":
        """The inverse of `as_dict`, of values that anyone may have written.

        Raises:
            ValueError: something is missing, unknown, of another type, or out of range; the message names it.
        """
        values = _table(values, "the card", ("model", "args", "classes", "preprocess"), ("trained", "quantised"))
        if not isinstance(values["model"], str) or not NAME.fullmatch(values["model"]):
            raise ValueError(f"model is a name, not {_shown(values['model'])}")
        args = _table(values["args"], "args")
        for key, value in args.items():
            if not key.isidentifier() or key in NOT_OF_MODELS:
                raise ValueError(f"args has {_shown(key)}, which is no argument of a model")
            _check_plain(value, f"args.{key}")
        classes = values["classes"]
        if not isinstance(classes, list) or len(classes) > MOST_CLASSES:
            raise ValueError(f"classes is a list of names, not {_shown(classes)}")
        for name in classes:
            if not isinstance(name, str) or len(name) > LONGEST:
                raise ValueError(f"a class has a name, not {_shown(name)}")
        trained = _table(values.get("trained", {}), "trained")
        for key, value in trained.items():
            _check_plain(value, f"trained.{key}")
        preprocess = _preprocess(values["preprocess"])
        return cls(values["model"], args, list(classes), preprocess, trained, _quantised(values.get("quantised", {})))


def _quantised(values: object) -> dict:
    if not _table(values, "quantised"):
        return {}
    values = _table(values, "quantised", ("method", "bits"), ("arithmetic",))
    try:
        Quantisation(values["method"], values["bits"])
    except InputError as error:
        raise ValueError(f"quantised: {one_line(error)}") from None
    _check_plain(values.get("arithmetic", ""), "quantised.arithmetic")
    return values


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")  # of models; never a path or an address
MOST_CLASSES = 2**17
LARGEST_SIDE = 2**16
MOST_CHANNELS = 2**12
LARGEST = 2**17  # of an integer among arguments
LONGEST = 1000  # of a text

# What decides where weights come from, or where the model goes: never a matter of a file.
NOT_OF_MODELS = {
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cls", "features_only", "no_jit",
    "out_indices", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pruned",
    "scriptable",
}  # fmt: skip

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
CROP_MODES = ("center", "squash")


def _shown(value: object) -> str:
    if isinstance(value, (str, float, bool, type(None))):
        return one_line(repr(value), 60)
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else "a very large integer"
    return f"a {type(value).__name__}"


def _table(values: object, what: str, required: Sequence[str] | None = None, optional: Sequence[str] = ()) -> dict:
    """`values`, which must be a dictionary; with `required`, of these keys and perhaps the optional ones."""
    if not isinstance(values, dict) or len(values) > LONGEST or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{what} is a table, not {_shown(values)}")
    if required is not None:
        if missing := [key for key in required if key not in values]:
            raise ValueError(f"{what} has no {', '.join(missing)}")
        if unknown := [key for key in values if key not in (*required, *optional)]:
            raise ValueError(f"{what} has {_shown(unknown[0])}, which is unknown")
    return values


def _check_plain(value: object, what: str, depth: int = 4) -> None:
    """Numbers, texts, and lists and tables of them; small enough to be an argument."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        fine = abs(value) <= LARGEST
    elif isinstance(value, float):
        fine = math.isfinite(value)
    elif isinstance(value, str):
        fine = len(value) <= LONGEST
    elif isinstance(value, (list, tuple)) and depth and len(value) <= LONGEST:
        for item in value:
            _check_plain(item, what, depth - 1)
        return
    elif isinstance(value, dict) and depth:
        for key, item in _table(value, what).items():
            _check_plain(item, f"{what}.{key}", depth - 1)
        return
    else:
        fine = False
    if not fine:
        raise ValueError(f"{what} is {_shown(value)}")


def _numbers(value: Any, what: str, count: int) -> tuple[float, ...]:
    fine = isinstance(value, (list, tuple)) and len(value) == count
    if not fine or not all(type(v) in (int, float) and math.isfinite(v) and abs(v) <= 1e6 for v in value):
        raise ValueError(f"preprocess.{what} is {count} finite numbers, not {_shown(value)}")
    return tuple(value)


def _preprocess(values: object) -> Preprocess | PointPreprocess | ScanPreprocess | VolumePreprocess:
    if isinstance(values, dict) and "spacing" in values:
        try:
            return VolumePreprocess(**_table(values, "preprocess", ("spacing", "intensity", "window")))
        except (InputError, TypeError) as error:
            raise ValueError(f"preprocess: {one_line(error)}") from None
    if isinstance(values, dict) and "scan_features" in values:
        try:
            return ScanPreprocess(**_table(values, "preprocess", ("scan_features",)))
        except InputError as error:
            raise ValueError(f"preprocess: {one_line(error)}") from None
    if isinstance(values, dict) and "up" in values:
        values = _table(values, "preprocess", ("points", "up"), ("features", "normalise"))
        try:
            return PointPreprocess(**values)
        except InputError as error:
            raise ValueError(f"preprocess: {one_line(error)}") from None
    values = _table(values, "preprocess", ("size", "mean", "std"), ("interpolation", "crop_pct", "crop_mode"))
    size = values["size"]
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(type(n) is int for n in size):
        raise ValueError(f"preprocess.size is channels, height and width, not {_shown(size)}")
    if not 1 <= size[0] <= MOST_CHANNELS or not all(1 <= side <= LARGEST_SIDE for side in size[1:]):
        raise ValueError(f"preprocess.size is {tuple(size)}")
    mean, std = (_numbers(values[name], name, size[0]) for name in ("mean", "std"))
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f"preprocess.std is {std}, and must be more than 0")
    interpolation = values.get("interpolation", "bicubic")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"preprocess.interpolation is {_shown(interpolation)}; there are {', '.join(INTERPOLATIONS)}")
    (crop_pct,) = _numbers([values.get("crop_pct", 1.0)], "crop_pct", 1)
    if not 0.01 <= crop_pct <= 1:
        raise ValueError(f"preprocess.crop_pct is {crop_pct}, and must be from 0.01 to 1")
    crop_mode = values.get("crop_mode", "center")
    if crop_mode not in CROP_MODES:
        raise ValueError(f"preprocess.crop_mode is {_shown(crop_mode)}; there are {', '.join(CROP_MODES)}")
    return Preprocess(tuple(size), mean, std, interpolation, crop_pct, crop_mode)


# -- files ------------------------------------------------------------------------------------------------------------


def save_model(path: str | Path, model: nn.Module, card: ModelCard) -> None:
    """Writes weights and card into one safetensors file, which is whole or absent at any moment."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={CARD: json.dumps(card.as_dict(), allow_nan=False)})
    with atomic(path) as file:
        file.write(content)


def read_card(path: str | Path) -> ModelCard | None:
    """The card of a file, or of the state of a training, that linescan has written; None for any other file.

    Raises:
        CheckpointError: the file is missing or damaged, or its card is.
    """
    values = checkpoints.read_card(path)
    if values is None:
        return None
    try:
        return ModelCard.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: its card is damaged: {error}") from None


def restore(name: str | None = None, checkpoint: str | Path | None = None, **args) -> tuple[nn.Module, ModelCard]:
    """A model with weights, and what must be known to use it.

    Args:
        name: a registered or timm name; not needed where the checkpoint is one that linescan has written.
        checkpoint: a file of weights. Without it, the published ones are fetched.
        args: as for `linescan.create_model`; override those of the checkpoint's card.

    Raises:
        InputError: neither is given, they contradict each other, or the published weights cannot be had.
        CheckpointError: the file cannot be read, or is one of another model.
    """
    card = read_card(checkpoint) if checkpoint else None
    if card and name and name.partition(".")[0] != card.model.partition(".")[0]:
        raise CheckpointError(f"{checkpoint} is a checkpoint of {card.model}, not of {name}")
    if card:
        return _from_card(card, checkpoint, args)
    if name is None:
        what = f"{checkpoint} does not say which model it is of" if checkpoint else "no model and no checkpoint given"
        raise InputError(f"{what}; name one with --model (`linescan list` shows them)")
    model = build(name, **args, **({} if checkpoint else {"pretrained": True}))
    if checkpoint:
        checkpoints.load_checkpoint(model, checkpoint)
    entry = zoo.find(name) if zoo.is_model(name) else None
    if entry and entry.task == "restoration":
        return model, ModelCard(name, args, [], plain_preprocess(model.in_chans))
    if entry and entry.task == "segmentation":
        known = names_of_data(entry.data) if entry.data and "num_classes" not in args else None
        return model, ModelCard(name, args, known or [], segmentor_preprocess(entry))
    if entry and entry.task == "volume-segmentation":
        return model, ModelCard(name, args, [], VolumePreprocess(**entry.preprocess))
    if entry and "up" in entry.preprocess:
        preprocess = points_of(entry)
    elif entry and "scan_features" in entry.preprocess:
        preprocess = ScanPreprocess(**entry.preprocess)
    else:
        preprocess = preprocess_of(model, args.get("in_chans"), args.get("img_size"))
    return model, ModelCard(name, args, class_names(model, name), preprocess)


def _from_card(card: ModelCard, path: str | Path, args: dict) -> tuple[nn.Module, ModelCard]:
    state = read_state_dict(path)
    all_args = {**card.args, **args}
    try:
        with _no_larger_than(state):
            if not args:
                _build_without_values(card)
            model = build(card.model, **all_args)
    except _TooLarge:
        raise CheckpointError(f"{path}: its card is of a larger model than its weights") from None
    except InputError as error:
        if args:
            raise
        raise CheckpointError(f"{path}: its card is of no model: {error}") from None
    if card.quantised:
        method, bits = card.quantised["method"], card.quantised["bits"]
        restructure(model, Quantisation(method, bits))
        notice(f"{path}: quantised by {method} to {bits}; {arithmetic(model)}")
    load_state(model, state, path)
    classes = getattr(model, "num_classes", None)
    told_apart = (1, 2) if classes == 1 else (classes,)  # one output finds one class, or tells two apart
    if card.classes and classes is not None and len(card.classes) not in told_apart:
        raise CheckpointError(f"{path}: its card names {len(card.classes)} classes, its model has {classes}")
    if args.get("img_size") is not None:
        size = (card.preprocess.channels, *_sides(args["img_size"]))
        card = replace(card, preprocess=replace(card.preprocess, size=size))
    return model, replace(card, args=all_args)


class _TooLarge(BaseException):
    """Passes through constructors, and whatever they catch."""


@contextmanager
def _no_larger_than(state: dict[str, Tensor]) -> Iterator[None]:
    """Ends the building of a model that becomes much larger than the weights it is for. Raises _TooLarge."""
    room = [4 * len(state) + 100, 4 * sum(value.numel() for value in state.values()) + 2**16]
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if threading.get_ident() == thread and parameter is not None:
            room[0] -= 1
            room[1] -= parameter.numel()
            if min(room) < 0:
                raise _TooLarge

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _build_without_values(card: ModelCard) -> None:
    """Builds the model on the meta device, where a large one takes no memory before it is known to be too large."""
    try:
        with torch.device("meta"):
            build(card.model, **card.args)
    except InputError:
        pass  # some models need values to be built; what is wrong with the arguments is said by the next try
