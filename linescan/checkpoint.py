"""Reading published checkpoints: safely, whatever their nesting, and strictly into a model.

Files from outside are never unpickled: safetensors files are read as such, PyTorch files through the restricted
unpickler of `torch.load(weights_only=True)`. Training files often carry small objects beside their weights (an
`argparse.Namespace`, a log buffer); those known by name are replaced by inert stand-ins, anything else is refused.
"""

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Callable, Mapping, Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import CheckpointError

__all__ = ["CheckpointError", "read_meta", "read_state_dict", "load_checkpoint", "rename", "strip_prefix"]

# Where published files keep their weights, in order of preference; the plain weights come before an average of them,
# as most authors' own evaluation has it. Where they evaluate the average, the model's `checkpoint_nesting` says so.
NESTING = (
    "state_dict", "model", "module", "model_state", "model_state_dict", "base_model", "net", "params",
    "state_dict_ema", "model_ema", "ema_model", "ema", "params_ema",
)  # fmt: skip

WRAPPERS = ("module.", "_orig_mod.")

# Objects that training programs leave beside the weights.
BENIGN = (
    "mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.ConfigDict", "yacs.config.CfgNode",
    "easydict.EasyDict", "omegaconf.dictconfig.DictConfig", "pathlib.PosixPath", "pathlib.WindowsPath",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray", "builtins.getattr",
)  # fmt: skip


class _Inert:
    """Stands for an object of a checkpoint that is not a weight; holds nothing and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _read_torch(path: Path) -> object:
    try:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):  # the format before torch 1.6 cannot be listed ahead of reading
        foreign = set()
    refused = sorted(foreign - set(BENIGN) - {"argparse.Namespace"})
    if refused:
        raise CheckpointError(f"{path} would run code on loading ({', '.join(refused[:3])}); refused")
    stand_ins = [(type("Inert", (_Inert,), {}), name) for name in sorted(foreign & set(BENIGN))]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol: what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Unsupported global" in str(error) or "Weights only load failed" in reason:
            raise CheckpointError(f"{path} holds objects other than weights, or is damaged; refused") from None
        raise CheckpointError(f"{path} is damaged or cut short ({reason})") from None


def _read(path: Path) -> object:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give a checkpoint file (.safetensors, .pth)")
    with open(path, "rb") as file:
        head = file.read(16)
    if len(head) < 16:
        raise CheckpointError(f"{path} is empty or cut short ({path.stat().st_size} bytes)")
    if head[8:9] == b"{":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is a damaged or truncated safetensors file ({error})") from None
    if head[:4] == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short: its zip directory is missing")
        return _read_torch(path)
    if head[:1] == b"\x80":
        return _read_torch(path)
    raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch file (it starts with {head[:8]!r})")


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def read_state_dict(path: str | Path, prefer: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights in a checkpoint file, with the nesting of common training programs undone.

    Args:
        path: a safetensors or PyTorch file. Wrapper prefixes (`module.`, `_orig_mod.`) are removed from the keys.
        prefer: entries to take the weights from, where the file has them, before any other ("state_dict_ema").

    Raises:
        CheckpointError: the file is missing, damaged, holds no weights, or holds objects that would run code.
    """
    path = Path(path)
    content = _read(path)
    while not _is_state(content):
        inner = next((content[k] for k in (*prefer, *NESTING) if isinstance(content, Mapping) and k in content), None)
        if inner is None:
            found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(f"{path} holds no weights (found: {found or 'nothing'})")
        content = inner
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    for wrapper in WRAPPERS:
        if all(key.startswith(wrapper) for key in state):
            state = strip_prefix(state, wrapper)
    return state


def read_meta(path: str | Path) -> dict:
    """What a checkpoint file holds under `meta`, as OpenMMLab's do (classes of the dataset, among others); else empty.

    Raises:
        CheckpointError: as `read_state_dict`, of files that cannot be read.
    """
    content = _read(Path(path))
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return dict(meta) if isinstance(meta, Mapping) else {}


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Only the entries whose key starts with `prefix`, without it; all of `state` if there are none."""
    inner = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return inner or dict(state)


def rename(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str | Callable]]) -> dict[str, Tensor]:
    """The same tensors under other keys: every rule (pattern, replacement), as of `re.sub`, in turn."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


def _adapt_to_task(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fits published ImageNet weights to another number of classes or input channels, as timm does."""
    from timm.models import adapt_input_conv

    own = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", {}) or {}
    heads = cfg.get("classifier") or ()
    for name in (heads,) if isinstance(heads, str) else heads:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state and (key not in own or own[key].shape != state[key].shape):
                del state[key]
                if key in own:
                    state[key] = own[key]
    convs = cfg.get("first_conv") or ()
    for name in (convs,) if isinstance(convs, str) else convs:
        key = f"{name}.weight"
        if key in state and key in own and own[key].shape[1] != state[key].shape[1]:
            weight = state[key]
            frames = weight.ndim == 5  # a video stem: adapt as if its time axis were one more row of pixels
            weight = weight.flatten(2, 3) if frames else weight
            state[key] = adapt_input_conv(own[key].shape[1], weight).reshape(own[key].shape)
    return state


def load_checkpoint(model: nn.Module, path: str | Path, *, adapt: bool = False) -> nn.Module:
    """Loads a published or own checkpoint into `model`, strictly.

    The model's `checkpoint_filter(state)` maps the original file's keys and layouts to ours; its `checkpoint_nesting`
    names the entries that its authors take the weights from, where that is not the usual one.

    Args:
        model: any linescan model (or any module; without a filter the keys must agree as they are).
        path: a safetensors or PyTorch file.
        adapt: keep the model's own classifier where the file's has another number of classes (or the model has none),
            and fold the stem's weights to another number of input channels, as timm does for pretrained models.

    Returns:
        `model`.

    Raises:
        CheckpointError: the file cannot be read, or a key is missing, left over, or of another shape.
    """
    if not model.state_dict():
        return model  # made of operators alone: there is nothing to load
    state = read_state_dict(path, getattr(model, "checkpoint_nesting", ()))
    if hasattr(model, "checkpoint_filter"):
        try:
            state = model.checkpoint_filter(state)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of {type(model).__name__} ({error})") from None
    if adapt:
        state = _adapt_to_task(state, model)
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        parts = []
        if missing:
            parts.append(f"{len(missing)} keys missing (first: {missing[0]})")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
        if shapes:
            key = shapes[0]
            parts.append(
                f"{len(shapes)} of another shape (first: {key} is {tuple(state[key].shape)}, "
                f"the model has {tuple(own[key].shape)})"
            )
        raise CheckpointError(f"{path} is not a checkpoint of this {type(model).__name__}: {'; '.join(parts)}")
    model.load_state_dict(state)
    return model
