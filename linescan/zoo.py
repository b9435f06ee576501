"""The zoo: every model of every task, with what its authors publish of it.

A family registers its models in a table at the end of its own file. A fact is stated once, at the highest level at
which it holds: for the whole table, for a model, or for a tag (one published file of weights). The nearest statement
wins; `args`, `preprocess` and `metrics` are merged.

    register(
        Vim,
        paper="ICML 2024, arXiv 2401.09417",
        licence="Apache-2.0",
        models={
            "vim_tiny_patch16_224": {
                "args": {"embed_dim": 192},
                "params": 7.148,
                "weights": {"in1k": {"hub": "hustvl/Vim-tiny-midclstok", "file": "...", "metrics": {"top1": 76.1}}},
            },
        },
        ...
    )

Backbones register through `linescan.backbones.contract.register`, which adds timm's entry points; whole models of other
tasks call `register` here and need no timm. This module is below all families: it knows only the packages that hold
them, which are imported at the first question.
"""

import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Mapping

from .arguments import check_arguments, optional_arguments
from .errors import InputError, one_line
from .notices import notice

__all__ = [
    "LICENCES",
    "Entry",
    "connect",
    "create_model",
    "entries",
    "fetch",
    "fetch_address",
    "find",
    "is_model",
    "list_models",
    "register",
    "tags",
]

LICENCES = {
    "Apache-2.0": "permissive",
    "MIT": "permissive",
    "BSD-3-Clause": "permissive",
    "GPL-3.0": "copyleft",
    "AGPL-3.0": "copyleft",
    "CC-BY-NC-4.0": "non-commercial",
    "CC-BY-NC-SA-4.0": "non-commercial",
    "NVIDIA-NC": "non-commercial",
    "S-Lab-1.0": "non-commercial",
    "none": "none",
}
"""The terms of each licence that an entry can name. "none": the authors state no licence, so nothing is granted."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model with one of its published weights. None where the authors give no number.

    Attributes:
        name, tag: together `full_name`; the tag is empty for a model without published results.
        task: what the model answers: "classification", "segmentation", ...
        family: the system; by default the name of the file that defines `cls`.
        cls, args: `cls(**args)` is the model that these weights belong to.
        inputs: the shape of each tensor of one sample, in the order of `forward`'s arguments, without the batch axis.
        preprocess: how samples are made into these tensors; its keys are those of the task.
        first_conv, classifier: names of the layers whose shapes follow the input channels and the classes.
        hub, file: repository and file on the Hugging Face Hub.
        url: the address of the file, where it is not on the Hub.
        page: where to get the file by hand, where it has no address of its own.
        metrics: published results by name, in the unit of the paper (accuracy, IoU and AP in per cent, PSNR in dB).
        data: the data set of the weights.
        params: parameters in millions.
        gmacs: multiply-adds for one sample in billions ("FLOPs" in most papers).
        paper: where it was published, as "venue year, arXiv number".
        code: the official repository.
        licence: of the published weights, a key of `LICENCES`.
        build: (entry, pretrained, **arguments) -> the model.
    """

    name: str
    tag: str = ""
    task: str
    cls: type[Any]
    family: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    first_conv: str | tuple[str, ...] = ()
    classifier: str | tuple[str, ...] = ()
    hub: str | None = None
    file: str | None = None
    url: str | None = None
    page: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    data: str | None = None
    params: float | None = None
    gmacs: float | None = None
    paper: str
    code: str | None = None
    licence: str
    build: Callable = field(repr=False)

    @property
    def reads_points(self) -> bool:
        """Whether its samples are point clouds (points, channels)."""
        return self.inputs[0][-1] < 8

    def __post_init__(self):
        if not self.family:
            object.__setattr__(self, "family", self.cls.__module__.rpartition(".")[2])
        if self.licence not in LICENCES:
            raise ValueError(f"{self.name}: licence is one of {', '.join(LICENCES)}, not {self.licence!r}")

    @property
    def full_name(self) -> str:
        """`name.tag`, or the name where there is no tag."""
        return f"{self.name}.{self.tag}" if self.tag else self.name

    @property
    def arxiv(self) -> str | None:
        """The paper's number in arXiv."""
        found = re.search(r"arXiv (\d{4}\.\d{4,5})", self.paper)
        return found[1] if found else None

    @property
    def terms(self) -> str:
        """What kind of licence it is: a value of `LICENCES`."""
        return LICENCES[self.licence]

    @property
    def fetchable(self) -> bool:
        """Whether `fetch` can download the weights."""
        return bool(self.url or (self.hub and self.file))

    @property
    def address(self) -> str | None:
        """Where the weights are: the address of the file, else the page to get it from, else None."""
        if self.hub and self.file:
            return f"https://huggingface.co/{self.hub}/resolve/main/{self.file}"
        return self.url or self.page

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `cls`: `given` over the entry's own. A mapping completes the entry's mapping.

        The word "none" stands for None where the class takes None as a value: timm, and a command line, drop None.

        Raises:
            InputError: a value that its argument cannot have (`linescan.arguments`).
        """
        optional, args = optional_arguments(self.cls), dict(self.args)
        for name, value in given.items():
            if isinstance(value, Mapping):
                value = {**args.get(name, {}), **value}
            args[name] = None if value == "none" and name in optional else value
        check_arguments(self.cls, args)
        return args

    def facts(self) -> dict:
        """All of it as plain values, with the tags that the model has."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cls", "build", "name")}
        there = [entry.tag for entry in tags(self.name) if entry.tag]
        return {"model": self.name, **own, "tags": there, "terms": self.terms, "weights": self.address}


PACKAGES = ("linescan.backbones", "linescan.heads")
"""What registers models when it is imported."""

_ENTRIES: dict[str, dict[str, Entry]] = {}  # by name, then by tag; the first tag is the default


def _registered() -> dict[str, dict[str, Entry]]:
    for package in PACKAGES:
        import_module(package)
    return _ENTRIES


def register(cls: type | None, models: Mapping[str, Mapping], **common) -> list[Entry]:
    """Adds a family's models; returns their entries.

    Args:
        cls: the class of the models; None where each model names its own as `cls`.
        models: by name, the facts of each model, and under `weights` by tag the facts of each published file. A model
            without published results has no `weights`. The first tag is the default.
        common: facts of all models. See `Entry` for what can be stated.

    Raises:
        ValueError: a name is registered already, or a licence is unknown.
        TypeError: a fact that `Entry` does not know, or one that is missing.
    """
    common = {"build": _build, **({"cls": cls} if cls else {}), **common}
    added = []
    for name, model in models.items():
        if name in _ENTRIES:
            raise ValueError(f"two models are registered as {name}")
        model = dict(model)
        weights = model.pop("weights", None) or {"": {}}
        _ENTRIES[name] = {tag: Entry(name=name, tag=tag, **_merge(common, model, own)) for tag, own in weights.items()}
        added += _ENTRIES[name].values()
    return added


def _merge(*levels: Mapping) -> dict:
    merged: dict = {}
    for level in levels:
        for key, value in level.items():
            merged[key] = {**merged.get(key, {}), **value} if key in ("args", "preprocess", "metrics") else value
    return merged


def find(name: str) -> Entry:
    """The entry of `name` or `name.tag`; without a tag that of the default one.

    Raises:
        InputError: no such model or tag; near names are given.
    """
    known_models = _registered()
    model, _, tag = name.partition(".")
    if model not in known_models:
        near = get_close_matches(name, known_models, 3)
        raise InputError(
            f"unknown model {name!r}; " + (f"near it: {', '.join(near)}" if near else "`linescan list` shows all")
        )
    known = known_models[model]
    if tag and tag not in known:
        there = ", ".join(t for t in known if t)
        raise InputError(f"{model} has no tag {tag!r}; " + (f"there are: {there}" if there else "it has none"))
    return known[tag] if tag else next(iter(known.values()))


def is_model(name: str) -> bool:
    """Whether `name`, or `name.tag`, is registered."""
    model, _, tag = name.partition(".")
    known = _registered().get(model)
    return known is not None and (not tag or tag in known)


def tags(name: str) -> list[Entry]:
    """The entries of all tags of a model, the default first. Raises InputError: no such model."""
    return list(_ENTRIES[find(name).name].values())


def entries(pattern: str = "", task: str | None = None, licence: str | None = None) -> list[Entry]:
    """The models that match, each with its default tag, sorted by family and name.

    Args:
        pattern: part of a name, or a pattern with * and ?; in any case.
        task: only models for this task.
        licence: only models whose weights have this licence, or licences of these terms (a key or a value of
            `LICENCES`, in any case).

    Raises:
        InputError: no model of any kind has this task, or there is no such licence.
    """
    every = [next(iter(by_tag.values())) for by_tag in _registered().values()]
    if task is not None and task not in (there := sorted({e.task for e in every})):
        raise InputError(f"no model is for the task {task!r}; there are: {', '.join(there)}")
    named = {word.lower() for pair in LICENCES.items() for word in pair}
    if licence is not None and licence.lower() not in named:
        raise InputError(f"unknown licence {licence!r}; there are: {', '.join(LICENCES)}, and their terms: "
                         f"{', '.join(dict.fromkeys(LICENCES.values()))}")  # fmt: skip
    pattern = pattern.lower()
    pattern = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = [
        entry
        for entry in every
        if fnmatchcase(entry.name.lower(), pattern)
        and task in (None, entry.task)
        and (licence is None or licence.lower() in (entry.licence.lower(), entry.terms))
    ]
    return sorted(found, key=lambda entry: (entry.family, entry.name))


def list_models(pattern: str = "", task: str | None = None, licence: str | None = None) -> list[str]:
    """The names of the models that match, sorted; arguments and errors as for `entries`."""
    return sorted(entry.name for entry in entries(pattern, task, licence))


def create_model(name: str, pretrained: bool = False, **args):
    """The model of any task that `name` stands for.

        linescan.create_model("vim_tiny_patch16_224", num_classes=10)
        linescan.create_model("videomamba_video_tiny_patch16_224.breakfast_f64", pretrained=True)

    Args:
        name: a registered name; with a tag (`name.tag`) the model is the one that these weights belong to.
        pretrained: load the published weights, which `fetch` downloads. Where classes or input channels differ, the
            classifier is left as it is initialised and the stem is adapted.
        args: of the model's class, over the entry's own (`Entry.arguments`); for classification also those of
            `timm.create_model`.

    Raises:
        InputError: no such model or tag, or its weights cannot be fetched.
        CheckpointError: the weights do not fit the model.
    """
    entry = find(name)
    return entry.build(entry, pretrained, **args)


def _build(entry: Entry, pretrained: bool, **args):
    """Builds a model whose class needs nothing but its arguments."""
    model = entry.cls(**entry.arguments(args))
    if pretrained:
        from .checkpoint import load_checkpoint

        load_checkpoint(model, fetch(entry), adapt=True)
    return model


# -- weights ----------------------------------------------------------------------------------------------------------

_said: set[str] = set()  # models whose licence this process has printed


def fetch(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """The published weights as a local file, downloaded on first use; their licence is printed once per process.

    Raises:
        InputError: the authors give no address (the line names the page and how to load the file), or the download
            fails. The first failed connection is the answer.
    """
    if not entry.fetchable and entry.page:
        raise InputError(
            f"the weights of {entry.full_name} have no address that can be fetched: get the file from {entry.page} "
            f"and load it with {BY_HAND}"
        )
    if not entry.fetchable:
        raise InputError(f"no weights of {entry.full_name} are published; a file of your own loads with {BY_HAND}")
    hub = bool(entry.hub and entry.file)
    return _fetch(_Hub(entry, cache_dir) if hub else _Address(entry.url, cache_dir), lambda: _print_licence(entry))


def fetch_address(url: str, cache_dir: str | Path | None = None) -> Path:
    """The file at an address as a local one, downloaded on first use. Raises InputError as `fetch`."""
    return _fetch(_Address(url, cache_dir), lambda: None)


def _fetch(source, announce: Callable[[], None]) -> Path:
    try:
        if source.path is None:
            connect(source.url)
        announce()
        return source.path or source.download()
    except Exception as error:  # network libraries raise errors of many kinds
        raise InputError(
            f"cannot fetch {source.url}: {one_line(error)}; a file that you have loads with {BY_HAND}"
        ) from error


BY_HAND = "`linescan.load_checkpoint(model, PATH)` or `--checkpoint PATH`"


def _print_licence(entry: Entry) -> None:
    if entry.full_name in _said:
        return
    _said.add(entry.full_name)
    source = f"weights of {entry.full_name} ({entry.hub or entry.url})"
    if entry.terms == "none":
        notice(f"{source}: their authors state no licence; ask them before any use beyond looking at them", loud=True)
    elif entry.terms == "non-commercial":
        notice(f"{source}: licence {entry.licence}, for non-commercial use only", loud=True)
    else:
        notice(f"{source}: licence {entry.licence}")


class _Hub:
    """A file on the Hugging Face Hub; `path` is that of the copy in its cache, or None."""

    def __init__(self, entry: Entry, cache_dir: str | Path | None):
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        self.where: dict[str, Any] = {"repo_id": entry.hub, "filename": entry.file, "cache_dir": cache_dir}
        self.url = hf_hub_url(entry.hub, entry.file)
        cached = try_to_load_from_cache(**self.where)
        self.path = Path(cached) if isinstance(cached, str) else None

    def download(self) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(**self.where))


class _Address:
    """A file with an address of its own; `path` is that of the copy beside torch's, or None."""

    def __init__(self, url: str, cache_dir: str | Path | None):
        from urllib.parse import unquote, urlparse

        import torch

        self.url = url
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
        # Different systems publish files of the same name.
        name = f"{sha256(self.url.encode()).hexdigest()[:8]}-{Path(unquote(urlparse(self.url).path)).name}"
        self.target = folder / name
        self.path = self.target if self.target.exists() else None

    def download(self) -> Path:
        import torch

        self.target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self.url, str(self.target))
        return self.target


def connect(url: str) -> None:
    """Asks the server once. Downloaders try again for half a minute where there is no network.

    Raises:
        OSError: no connection, or none is wanted. An answer of any kind will do, and so will a certificate that is
            unknown here: downloaders have their own.
    """
    import os
    import ssl
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("offline (HF_HUB_OFFLINE)")
    try:
        urlopen(Request(url, method="HEAD"), timeout=10).close()
    except HTTPError:
        pass
    except URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise OSError(f"no connection ({error.reason})") from None
