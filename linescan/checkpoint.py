"""Checkpoints: weights out of a file, whatever its nesting, and strictly into a model.

`linescan.tensorfile` reads the file and runs nothing in it. `read_state_dict` finds the weights among what a training
program left, `load_checkpoint` brings them to a model's names and shapes, and `fit` is the one place that compares
them with the model.
"""

import json
import re
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from .errors import CheckpointError, one_line
from .notices import notice
from .tensorfile import OddTensor, read_file, read_metadata

__all__ = [
    "CheckpointError",
    "fit",
    "fit_shapes",
    "load_checkpoint",
    "load_state",
    "read_card",
    "read_meta",
    "read_state_dict",
    "readable",
    "rename",
    "strip_prefix",
]

# Where published files keep their weights, in order of preference; the plain weights come before an average of them,
# as most authors' own evaluation has it. Where they evaluate the average, the model's `checkpoint_nesting` says so.
NESTING = (
    "state_dict", "model", "module", "model_state", "model_state_dict", "base_model", "net", "params",
    "state_dict_ema", "model_ema", "ema_model", "ema", "params_ema",
)  # fmt: skip

# Prefixes of what wraps a whole model: parallel training and compilation; a trainer's or timm's feature module.
WRAPPERS = ("module.", "_orig_mod.")
OUTER_WRAPPERS = ("model.", "ema_model.")

# Wrappers themselves, by class, and where they keep the model.
INNER = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod", "FeatureGetterNet": "model"}

# The entry of linescan's own files that says what they are: in the header of a safetensors file as JSON, in the state
# of a training as it is.
CARD = "linescan"


# -- reading ----------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path, prefer: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights in a checkpoint file, with the nesting of common training programs undone.

    Args:
        path: a safetensors or PyTorch file. The prefixes of wrappers (`module.`, `_orig_mod.`) are removed.
        prefer: entries to take the weights from, where the file has them, before any other ("state_dict_ema").

    Raises:
        CheckpointError: the file is missing or damaged, holds no weights, or weights that are not dense tensors.
    """
    path = Path(path)
    content = read_file(path)
    names, seen = (*prefer, *NESTING), []
    while isinstance(content, Mapping) and not any(content is value for value in seen):
        seen.append(content)
        inner = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(v, (Tensor, OddTensor)) for v in content.values()):
        found = ", ".join(one_line(key) for key in list(content)[:5]) if isinstance(content, Mapping) else None
        raise CheckpointError(f"{path} holds no weights (found: {found or type(content).__name__})")
    state = {}
    for key, value in content.items():
        if isinstance(value, OddTensor):
            raise CheckpointError(f"{path}: {one_line(key)} is a {value.kind} tensor; linescan reads dense ones")
        if isinstance(value, Tensor):
            if not isinstance(key, str):
                raise CheckpointError(f"{path} holds tensors, but not under names (first: {one_line(key)})")
            state[key] = value
    return unwrap(state, WRAPPERS)


def unwrap(state: dict[str, Tensor], wrappers: Sequence[str]) -> dict[str, Tensor]:
    """Without prefixes that all keys have, in any order; the counter of torch's averaged models goes with them."""
    names = [key for key in state if key != "n_averaged"]
    found = next((w for w in wrappers if names and all(name.startswith(w) for name in names)), None)
    return state if found is None else unwrap({name[len(found) :]: state[name] for name in names}, wrappers)


def read_meta(path: str | Path) -> dict:
    """What a checkpoint file holds under `meta`, as OpenMMLab's do (classes of the dataset, among others); else empty.

    Raises:
        CheckpointError: as `read_state_dict`, of files that cannot be read.
    """
    content = read_file(path, tensors=False)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return dict(meta) if isinstance(meta, Mapping) else {}


def read_card(path: str | Path) -> dict | None:
    """What one of linescan's own files, or the state of a training, says about itself; None for any other file.

    The values are as the file has them; `linescan.engine.cards.read_card` checks them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    content = read_metadata(path)
    if of_pickle := content is None:
        content = read_file(path, tensors=False)
    if not isinstance(content, Mapping) or CARD not in content:
        return None
    try:
        card = content[CARD] if of_pickle else json.loads(content[CARD])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its card is not JSON ({one_line(error)})") from None
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: its card is a {type(card).__name__}, not a table")
    return card


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


def fit_shapes(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same tensors in the model's shapes, where these only split axes, join neighbours or drop those of size 1.

    (routes * D, N) -> (routes, D, N); a 1x1 convolution (C', C, 1, 1) -> (C', C). Others are left as they are.
    """

    def borders(shape: Sequence[int]) -> set[int]:
        return {prod(shape[:i]) for i in range(1, len(shape) + 1)}

    out, own = dict(state), {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in state.keys() & own.keys():
        theirs, ours = borders(state[key].shape), borders(own[key])
        if state[key].numel() == prod(own[key]) and (theirs <= ours or theirs >= ours):
            out[key] = state[key].reshape(own[key])
    return out


# -- loading ----------------------------------------------------------------------------------------------------------


def _nothing(key: str) -> bool:
    return False


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    optional: Callable[[str], bool] = _nothing,
    dropped: Callable[[str], bool] = _nothing,
    name: str | None = None,
) -> tuple[list[str], list[str]]:
    """Loads `state` into `module`, strictly.

    Args:
        module: what is filled.
        state: tensors by the names that the module has for them.
        source: the file, for the message.
        optional: key of the module -> whether the state may lack it; it stays as it is.
        dropped: key of the state -> whether the module may lack it; it is left out.
        name: of the module, for the message; by default that of its class.

    Returns:
        The keys that were dropped, and those of the module that stay as they are.

    Raises:
        CheckpointError: a key is missing or left over, of another shape, or of a type that is no number of this kind;
            the line has the count and the first of each. The module is unchanged.
    """
    own = module.state_dict()
    left_out = [key for key in state if key not in own and dropped(key)]
    kept = [key for key in own if key not in state and optional(key)]
    missing = [key for key in own if key not in state and key not in set(kept)]
    unexpected = [key for key in state if key not in own and key not in set(left_out)]
    both = [key for key in own if key in state]
    shapes = [key for key in both if own[key].shape != state[key].shape]
    types = [key for key in both if own[key].is_floating_point() and not state[key].is_floating_point()]
    wrong = []
    if missing:
        wrong.append(f"{len(missing)} keys missing (first: {missing[0]})")
    if unexpected:
        wrong.append(f"{len(unexpected)} unexpected (first: {one_line(unexpected[0])})")
    if shapes:
        key = shapes[0]
        wrong.append(
            f"{len(shapes)} of another shape (first: {key} is {tuple(state[key].shape)}, "
            f"the model has {tuple(own[key].shape)})"
        )
    if types:
        wrong.append(f"{len(types)} of another type (first: {types[0]} is {state[types[0]].dtype})")
    if wrong:
        name = name or type(module).__name__
        raise CheckpointError(f"{source} is not a checkpoint of this {name}: {'; '.join(wrong)}")
    module.load_state_dict({key: state[key] for key in both}, strict=False)
    return left_out, kept


@contextmanager
def readable(source: str | Path, name: str) -> Iterator[None]:
    """For a `checkpoint_filter`: what it raises where a file is not of its model becomes one CheckpointError.

    Args:
        source: the file.
        name: of the model.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source} is not a checkpoint of {name} ({one_line(error)})") from None


def load_checkpoint(
    model: nn.Module, path: str | Path, *, adapt: bool = False, img_size: int | Sequence[int] | None = None
) -> nn.Module:
    """Loads a published or own checkpoint into `model`, strictly.

    The model's `checkpoint_filter(state)` maps the original file's keys and layouts to linescan's, and resamples
    position tables to the model's grid. Its `checkpoint_nesting` names the entries that its authors take the weights
    from, where that is not the usual one. A `features_only` model takes what it has of the file.

    Args:
        model: any linescan model (or any module; without a filter the keys must agree as they are).
        path: a safetensors or PyTorch file.
        adapt: as timm does for pretrained models: where the file's classifier is of another shape, or has none, keep
            the model's own, and say so; bring the stem's weights to another number of input channels.
        img_size: at which the file was trained, if its position table is not square and neither the table nor
            `pretrained_cfg` tells its grid.

    Returns:
        `model`.

    Raises:
        CheckpointError: the file cannot be read, or a key is missing, left over, or of another shape.
    """
    if not model.state_dict():
        return model  # made of operators alone: there is nothing to load
    nesting = getattr(_innermost(model), "checkpoint_nesting", ())
    return load_state(model, read_state_dict(path, nesting), path, adapt=adapt, img_size=img_size)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    adapt: bool = False,
    img_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """As `load_checkpoint`, of the tensors that `read_state_dict` has read from `source`."""
    inner = _innermost(model)
    if not any(key.startswith(OUTER_WRAPPERS) for key in inner.state_dict()):
        state = unwrap(dict(state), OUTER_WRAPPERS)
    if hasattr(inner, "checkpoint_filter"):
        options = {} if img_size is None else {"img_size": img_size}
        with readable(source, type(inner).__name__):
            state = inner.checkpoint_filter(state, **options)
    optional, useless = _nothing, _nothing
    if pruned := type(model).__name__ == "FeatureGetterNet":
        useless = getattr(inner, "is_useless", _nothing)
    if adapt or pruned:
        own = inner.state_dict()
        state = {key: _with_channels(value, own.get(key)) for key, value in state.items()}
        optional = _classifier(inner)
        what = "classifier" if hasattr(inner, "num_classes") else "head"
        state = _without_other_classifier(state, own, optional, source, what)
    fit(inner, state, source, optional=optional, dropped=lambda key: optional(key) or useless(key))
    return model


def _innermost(model: nn.Module) -> nn.Module:
    while (name := INNER.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def _with_channels(weight: Tensor, own: Tensor | None) -> Tensor:
    """A convolution's weights (O, I, ...) for as many input channels as `own` has, as timm does: one channel sums all,
    others repeat the file's, scaled so that the sum over them stays."""
    if own is None or weight.ndim < 4 or weight.ndim != own.ndim or weight.shape[1] == own.shape[1]:
        return weight
    if (weight.shape[0], *weight.shape[2:]) != (own.shape[0], *own.shape[2:]):
        return weight
    before, after = weight.shape[1], own.shape[1]
    if after == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-after // before)
    return weight.repeat(1, repeats, *(1 for _ in weight.shape[2:]))[:, :after] * (before / after)


def _classifier(model: nn.Module) -> Callable[[str], bool]:
    """Whether a key is one of the layers whose shapes follow the classes."""
    names = (
        getattr(model, "classifiers", None) or (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    )
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return lambda key: key.startswith(prefixes)


def _without_other_classifier(
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    of_classifier: Callable[[str], bool],
    path: str | Path,
    what: str,
) -> dict[str, Tensor]:
    """Leaves out layers of a classifier that the model has in another shape, and says so."""
    mine = [key for key in own if of_classifier(key)]
    other = [key for key in mine if key in state and state[key].shape != own[key].shape]
    missing = [key for key in mine if key not in state]
    if what == "head" and (other or missing):
        notice(f"{path}: {len(other) + len(missing)} of the head's {len(mine)} tensors are of another shape in the "
               "file; they are left out, and the model's own are untrained")  # fmt: skip
    elif other:
        classes = f"{len(state[other[-1]])} classes, the model's of {len(own[other[-1]])}"
        notice(f"{path}: the file's classifier is of {classes}; it is left out, and the model's own is untrained")
    elif missing and len(missing) == len(mine):
        notice(f"{path} has no classifier; the model's own is untrained")
    return {key: value for key, value in state.items() if key not in other}
