#!/usr/bin/env python
"""Writes docs/models.md (every model, published beside measured) and docs/weights.md (every file) from the zoo."""

from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import torch
from rich.progress import track

import linescan
from linescan import zoo
from linescan.backbones.feature_maps import dense_maps
from linescan.engine.cards import measure_inputs

DOCS = Path(__file__).parents[1] / "docs"

MODELS = """# Models

Written by `make models`. Parameters in millions and multiply-adds in billions: as published, and as measured here on
the model as registered, for one sample of its size, counted by torch over matrix products, convolutions and scans.
Papers differ in what they count: most leave scans out, or count 9 N operations per channel and token. A dash means that
the authors give no number. Results are those of the first tag; [weights.md](weights.md) has all. Dense maps are the
channels and strides that `LinescanBackbone` has by default.
"""

WEIGHTS = """# Weights

Written by `make models`. linescan ships no weights: `pretrained=True` fetches the authors' own file, on first use, from
where they publish it, and prints its licence.

    linescan.create_model("vim_tiny_patch16_224.in1k", pretrained=True)               # a model of any task
    linescan.create_model("vim_tiny_patch16_224", pretrained=True, num_classes=10)    # with a new classifier
    linescan.load_checkpoint(linescan.create_model("vim_tiny_patch16_224"), "vim_t_midclstok_76p1acc.pth")

The name before the dot is the model, the part behind it the tag: one published file. A tag decides the classes, frames
and size of the model as well, unless arguments say otherwise. Classifiers are timm models too, under the same names.

Where the table says *by hand*, the authors publish a page but no address of the file: download it there, and load it
with `linescan.load_checkpoint(model, PATH)`, or on the command line with `--checkpoint PATH`. Files are read without
running anything in them: safetensors, and PyTorch's formats of all ages. What does not fit the model is an error that
says what is missing or left over; with `adapt=True` stems and classifiers of other channels and classes adapt as timm's
do.

`linescan list --licence permissive` lists by licence. Licences are those of the weights; results are the authors' own.

| licence | terms |
|---|---|
"""


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def results(entry: zoo.Entry) -> str:
    return ", ".join(f"{name} {value}" for name, value in entry.metrics.items()) or "-"


def maps(entry: zoo.Entry) -> str:
    """The channels and strides of a backbone's dense maps; classifiers of clips and whole models have none."""
    if entry.task != "classification" or len(entry.inputs[0]) != 3:
        return "-"
    return ", ".join(f"{m['channels']} / {m['stride']}" for m in dense_maps(entry.name))


def row(entry: zoo.Entry) -> str:
    with torch.device("meta"):
        model = linescan.create_model(entry.name)
    if "scan_features" in entry.preprocess:  # what is computed depends on how many voxels a scan fills
        params, macs = sum(p.numel() for p in model.parameters()), None
    else:
        params, macs = measure_inputs(model, entry.inputs)
    size = " + ".join("x".join(map(str, shape)) for shape in entry.inputs)
    cells = (
        f"`{entry.name}`", number(entry.params, 3), f"{params / 1e6:.3f}", number(entry.gmacs, 2),
        number(macs and macs / 1e9, 2), size, results(entry), maps(entry), entry.licence,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def models_page() -> str:
    columns = (
        "model", "params, published", "measured", "GMACs, published", "measured", "input", "result", "dense maps",
        "licence",
    )  # fmt: skip
    every = zoo.entries()
    rows = {entry.name: row(entry) for entry in track(every, "measuring")}
    parts = [MODELS]
    for task, members in groupby(sorted(every, key=lambda entry: (entry.task, entry.family)), lambda entry: entry.task):
        parts.append(f"\n## {task.capitalize()}\n")
        for family, group in groupby(members, lambda entry: entry.family):
            group = list(group)
            source = group[0].paper + (f", {group[0].code}" if group[0].code else "")
            parts += [f"\n### {family}\n\n{source}\n\n| {' | '.join(columns)} |\n", "|---" * len(columns) + "|\n"]
            parts += [rows[entry.name] for entry in group]
    return "".join(parts)


def weights_page() -> str:
    parts = [WEIGHTS]
    terms = {"none": "no licence: the authors grant nothing"}
    used = {entry.licence for name in zoo.list_models() for entry in zoo.tags(name)}
    parts += [f"| {name} | {terms.get(kind, kind)} |\n" for name, kind in zoo.LICENCES.items() if name in used]
    for family, group in groupby(zoo.entries(), lambda entry: entry.family):
        rows = [
            f"| `{entry.full_name}` | {entry.data} | {results(entry)} | {file_of(entry)} | {entry.licence} |\n"
            for default in group
            for entry in zoo.tags(default.name)
            if entry.tag
        ]
        if rows:
            parts += [f"\n## {family}\n\n| weights | data | result | file | licence |\n|---|---|---|---|---|\n", *rows]
    return "".join(parts)


def file_of(entry: zoo.Entry) -> str:
    if entry.fetchable:
        name = Path(entry.file or urlsplit(entry.url).path).name
        return f"[{name}]({entry.address})"
    return f"by hand: [page]({entry.page})" if entry.page else "not published"


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for name, page in (("weights.md", weights_page), ("models.md", models_page)):
        (DOCS / name).write_text(page())
        print(DOCS / name)


if __name__ == "__main__":
    main()
