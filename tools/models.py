#!/usr/bin/env python
"""Measures every registered model and writes docs/models.md: parameters and multiply-adds beside the published ones."""

from itertools import groupby
from pathlib import Path

import timm
import torch
from rich.progress import track

from linescan import zoo
from linescan.backbones.feature_maps import dense_maps
from linescan.engine.cards import measure

OUT = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Models

Written by `make models`. Parameters in millions and multiply-adds in billions: as published, and as measured here on
the model as registered, for one input of its size (224 px; 8 frames for video), counted by torch over matrix products,
convolutions and scans. Papers differ in what they count: most leave scans out, or count 9 N operations a channel and
token. A dash means that the authors give no number. Dense maps are the channels and strides that `LinescanBackbone` has
by default.
"""

COLUMNS = (
    "| model | params, published | measured | GMACs, published | measured | top-1 | dense maps | source | licence |\n"
)


def row(name: str) -> str:
    facts = zoo.find(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    params, macs = measure(model, model.pretrained_cfg["input_size"])

    maps = "-"
    if not getattr(model, "num_frames", 0):
        maps = ", ".join(f"{m['channels']} / {m['stride']}" for m in dense_maps(name))

    def show(value, digits):
        return "-" if value is None else f"{value:.{digits}f}"

    cells = (
        f"`{name}`", show(facts.params, 3), f"{params / 1e6:.3f}", show(facts.gmacs, 2), f"{macs / 1e9:.2f}",
        show(facts.metrics.get("top1"), 1), maps, facts.paper, facts.licence,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |\n"


def main() -> None:
    parts = [HEAD]
    names = [entry.name for entry in zoo.entries(task="classification")]
    rows = {name: row(name) for name in track(names, "measuring")}
    for group, members in groupby(names, lambda name: zoo.find(name).family):
        parts += [f"\n## {group}\n\n", COLUMNS, "|---" * 9 + "|\n", *(rows[n] for n in members)]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("".join(parts))
    print(f"{len(names)} models in {OUT}")


if __name__ == "__main__":
    main()
