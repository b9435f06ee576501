#!/usr/bin/env python
"""MambaAD on solar cells: trained on good cells alone, which of the others are defective? Beside two baselines.

    pip install elpv-dataset
    python tools/solar_anomalies.py

The images are those of tools/solar_cells.py, as are the held-out ones. The teacher, whose features all three methods
read, is a ResNet-18 that is trained here to tell patches of twelve photographs apart, those that scikit-image ships,
as in `make demo-pixels`: no weights are fetched, and no solar cell is seen. Mono- and polycrystalline cells are
classes of one set, as in MVTec-AD: one model is trained on both, and scores are means over the types. The baselines
are a Gaussian for each place of the feature map (as in PaDiM, arXiv 2011.08785) and the distance from the nearest of
4,000 features (as in PatchCore, arXiv 2106.08265). The same command again goes on where it was stopped.
docs/examples/solar-cells.md has the results.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import typer  # noqa: E402
from solar_cells import copy_file, linescan, read_cells  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from linescan.demos.pixels.anomaly import write_patches  # noqa: E402
from linescan.engine.anomaly_scores import ranking  # noqa: E402
from linescan.engine.anomaly_sets import AnomalySet, find_anomalies  # noqa: E402
from linescan.engine.atomic import atomic  # noqa: E402
from linescan.engine.cards import restore  # noqa: E402
from linescan.engine.progress import progress_bar, say  # noqa: E402
from linescan.errors import InputError  # noqa: E402

NETWORK = {"teacher": "resnet18", "directions": 2, "d_state": 4, "depths": "[1,1,1,1]", "drop_path_rate": 0}


def solar_anomalies(
    steps: Annotated[int, typer.Option(min=1)] = 60,
    size: Annotated[int, typer.Option(min=64, help="Side of the images in pixels.")] = 128,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/solar-anomalies"),
):
    """Train a small MambaAD on good solar cells, and compare it with two baselines."""
    write_cells(to)
    teacher, run = to / "teacher", to / "mambaad"
    write_patches(to / "patches", np.random.default_rng(0))
    linescan(
        "train", "--data", to / "patches", "--out", teacher, "--model", "resnet18", "--model-arg", "img_size=64",
        "--steps", 100, "--batch", 32, "--lr", 1e-3, "--warmup", 10, "--augment", "crop", "--evaluate-every", 100,
        "--workers", 0, "--device", "cpu", "--resume",
    )  # fmt: skip
    words = (word for name, value in NETWORK.items() for word in ("--model-arg", f"{name}={value}"))
    linescan(
        "train", "--task", "anomaly", "--data", to / "cells", "--out", run, *words, "--size", size, "--batch", 8,
        "--steps", steps, "--schedule", "cosine", "--lr", 2e-3, "--warmup", 10, "--evaluate-every", steps,
        "--teacher-checkpoint", teacher / "model.safetensors", "--workers", 0, "--device", "cpu", "--resume",
    )  # fmt: skip
    said, _ = linescan(
        "evaluate", "--task", "anomaly", "--data", to / "cells", "--checkpoint", run / "model.safetensors", "--json",
        "--out", to / "report", "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    own = {category: values["image_auroc"] for category, values in json.loads(said)["classes"].items()}
    scores = {"MambaAD": own, **by_baselines(run, to / "cells")}
    with atomic(to / "results.json") as file:
        file.write(json.dumps(scores, indent=1).encode())
    print(f"| AUROC | {' | '.join(own)} | mean |\n|---" + "|---" * (len(own) + 1) + "|")
    for name, values in scores.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*values.values(), mean(values.values()))) + " |")


def write_cells(folder: Path) -> None:
    """cells/, in MVTec-AD's layout: the types are its classes."""
    for source, probability, crystal, held_out in read_cells():
        kind, place = "defective" if probability > 0.5 else "good", folder / "cells" / crystal
        if held_out:
            copy_file(source, place / "test" / kind)
        elif kind == "good":
            copy_file(source, place / "train" / "good")


def gaussians(train: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Of features (N, places, channels): the largest Mahalanobis distance from the Gaussian of its place, (N,)."""
    centre = train.mean(0)
    spread = torch.einsum("npc,npd->pcd", train - centre, train - centre) / (len(train) - 1)
    root = torch.linalg.cholesky(spread + 0.01 * torch.eye(len(spread[0])))
    return torch.linalg.solve_triangular(root, (test - centre).permute(1, 2, 0), upper=False).norm(dim=1).amax(0)


def nearest(train: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """The largest distance from the nearest of 4,000 features."""
    rows = train.flatten(0, 1)
    bank = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:4000]]
    return torch.stack([torch.cdist(one, bank).amin(1).amax() for one in test])


BASELINES = {"Gaussian for each place (PaDiM-like)": gaussians, "nearest neighbour (PatchCore-like)": nearest}


@torch.inference_mode()
def by_baselines(run: Path, cells: Path) -> dict[str, dict[str, float]]:
    """By baseline and type of cells the AUROC of images, on the features of MambaAD's teacher."""
    model, card = restore(checkpoint=run / "model.safetensors")
    found = find_anomalies(cells)

    def features(images) -> torch.Tensor:
        """(N, 256 places, 100 channels) of all images."""
        chosen, parts = torch.randperm(448, generator=torch.Generator().manual_seed(0))[:100], []
        with progress_bar("reading features", len(images)) as advance:
            for batch in DataLoader(AnomalySet(images, found.categories, card.preprocess), batch_size=32):
                maps = [F.avg_pool2d(x, 3, 1, 1) for x in model.teacher.eval()(batch["input"])]
                maps = [F.adaptive_avg_pool2d(x, 16).flatten(2).mT for x in maps]
                parts.append(torch.cat(maps, 2)[..., chosen])
                advance(len(parts[-1]))
        return torch.cat(parts)

    train, test = features(found.train), features(found.test)
    train_of, test_of = (torch.tensor([one.category for one in images]) for images in (found.train, found.test))
    defects = torch.tensor([bool(one.defect) for one in found.test])
    scores: dict[str, dict[str, float]] = {}
    for name, method in BASELINES.items():
        both, kinds = method(train, test), (name, f"{name}, for each type")
        scores |= {kind: {} for kind in kinds}
        for number, category in enumerate(found.categories):
            chosen = test_of == number
            alone = method(train[train_of == number], test[chosen])
            for kind, values in zip(kinds, (both[chosen], alone)):
                scores[kind][category] = ranking(defects[chosen].numpy(), values.numpy())[0]
    return scores


def main() -> None:
    """Runs it; what the user can fix is told in one line."""
    try:
        typer.run(solar_anomalies)
    except InputError as error:
        sys.exit(f"solar_anomalies: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    say("done")


if __name__ == "__main__":
    main()
