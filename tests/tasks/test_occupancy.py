"""Volumes around scans: SemanticKITTI's layout, training, scores, and files in, volumes out."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from linescan.cli import app
from linescan.engine.cards import read_card
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.recipe import Run
from linescan.engine.scores import Totals
from linescan.engine.training import Training
from linescan.engine.volume_sets import IGNORED, VolumeSamples, open_volumes
from linescan.errors import InputError
from linescan.heads.points.occupancy import Volume
from linescan.media.clouds import ScanPreprocess
from linescan.tasks.point_occupancy import VolumeIoU
from linescan.tasks.recipes import OccupancyRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = {"low": [0, -3.2, -0.8], "high": [3.2, 3.2, 0.8], "cells": [16, 32, 8]}
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    """SemanticKITTI's folder: two scans to train on, two held out, of a road with a car on it, and what is unknown."""
    root = tmp_path_factory.mktemp("semantic")
    dice = np.random.default_rng(0)
    for sequence in ("00", "08"):
        folder = root / "dataset" / "sequences" / sequence
        for name in ("velodyne", "labels", "voxels"):
            (folder / name).mkdir(parents=True)
        for i in range(2):
            cells = np.zeros((16, 32, 8), np.uint16)
            cells[:, :, 0] = 40
            cells[5:9, 4 + 9 * i : 8 + 9 * i, 1:4] = 252  # a car that moves is a car
            cells[0, 0, 7] = 99  # something without a class
            seen = np.argwhere(cells > 0)
            seen = seen[dice.random(len(seen)) < 0.6]
            points = (seen + dice.uniform(0.05, 0.95, seen.shape)) * 0.2 + (0, -3.2, -0.8)
            np.column_stack([points, dice.random(len(points))]).astype(np.float32).tofile(
                folder / "velodyne" / f"{i:06}.bin"
            )
            labels = cells[tuple(seen.T)].astype(np.uint32) | np.uint32(7 << 16)  # with the number of an object
            labels.tofile(folder / "labels" / f"{i:06}.label")
            hit = np.zeros(cells.shape, np.uint8)
            hit[tuple(seen.T)] = 1
            unknown = np.zeros(cells.shape, np.uint8)
            unknown[12:] = 1
            for suffix, values in ((".bin", np.packbits(hit)), (".label", cells), (".invalid", np.packbits(unknown))):
                values.tofile(folder / "voxels" / f"{i:06}{suffix}")
    return root


def test_volumes_are_read_and_mirrored(kitti):
    train, held_out = open_volumes(str(kitti))
    assert [p.parts[-3] for p in (*train, *held_out)] == ["00", "00", "08", "08"]
    samples = VolumeSamples(train, ScanPreprocess(), **SPACE)
    item = samples[1]
    target, hit = item["target"], item["occupancy"]
    assert sorted(target.unique().tolist()) == [0, 1, 9, IGNORED]
    assert target[6, 14, 2] == 1 and target[3, 3, 0] == 9 and (target[12:] == IGNORED).all()
    assert target[0, 0, 7] == IGNORED  # it is there, and nobody knows what it is
    place = ((item["points"][:, :3] - torch.tensor(SPACE["low"])) / 0.2).long()
    assert (hit[tuple(place.T)] == 1).all() and hit.sum() == len(place.unique(dim=0))
    known = item["labels"] > 0
    assert (target[tuple(place[known].T)].long() == item["labels"][known])[place[known][:, 0] < 12].all()
    mirrored = VolumeSamples(train, ScanPreprocess(), **SPACE, augment=True)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        other = mirrored[1]
        place = ((other["points"][:, :3] - torch.tensor(SPACE["low"])) / 0.2).long()
        assert (other["occupancy"][tuple(place.T)] == 1).all()
        seen.add((bool((other["target"][:4] == IGNORED).all()), bool(other["target"][6, 14, 2] == 1)))
    assert len(seen) > 1


def test_scores_are_those_of_the_benchmark():
    target = torch.tensor([0, 0, 1, 1, 2, 2, IGNORED, 3]).view(1, 2, 2, 2)
    said = torch.tensor([0, 1, 1, 2, 2, 2, 1, 0]).view(1, 2, 2, 2)

    class Fixed(torch.nn.Module):
        def forward(self, points, lengths, occupancy):
            logits = torch.nn.functional.one_hot(said, 5).permute(0, 4, 1, 2, 3).float()
            return Volume(logits, [], [], [], torch.ones(1))

    evaluator, totals = VolumeIoU(None, 5), Totals()
    evaluator.measure(Fixed(), {"points": None, "lengths": None, "occupancy": None, "target": target}, totals)
    scores = evaluator.scores(totals)
    assert scores["miou"] == pytest.approx(100 * np.mean([1 / 3, 2 / 3, 0]))  # class 4 is neither there nor found
    assert scores["iou"] == pytest.approx(100 * 4 / 6)
    assert (scores["precision"], scores["recall"]) == (pytest.approx(80), pytest.approx(80))


def test_trains_is_scored_and_completes_files(kitti, tmp_path):
    recipe = OccupancyRecipe(str(kitti), epochs=3, batch=2, model_args={**SPACE, "drop_rate": 0.0})
    training = Training(recipe, tmp_path / "run", ALONE, Run(workers=0))
    scores = training.run()
    judged = [row["val_iou"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "val_iou" in row]
    assert len(judged) == 3 and scores["iou"] == judged[-1] > judged[0] + 0.5
    weights = str(tmp_path / "run" / "best.safetensors")
    card = read_card(weights)
    assert card.classes[:2] == ["empty", "car"] and card.preprocess == ScanPreprocess(("intensity",))
    runner = CliRunner()
    scored = runner.invoke(app, ["evaluate", "--task", "point-occupancy", "--data", str(kitti), "-c", weights, "--json",
                                 "--device", "cpu", "--workers", "0"])  # fmt: skip
    assert scored.exit_code == 0, scored.output
    folder = tmp_path / "scans"
    shutil.copytree(kitti / "dataset" / "sequences" / "08" / "velodyne", folder)
    (folder / "broken.bin").write_bytes(b"12345")
    out = tmp_path / "out"
    done = runner.invoke(app, ["points", "occupancy", str(folder), "-c", weights, "-o", str(out), "--device", "cpu"])
    assert done.exit_code == 1 and "broken.bin" in done.output
    volume = np.load(out / "volumes" / "000000.npy")
    assert volume.shape == (16, 32, 8) and volume.dtype == np.uint8 and (volume > 0).any()
    assert (out / "classes.txt").read_text().splitlines()[0] == "empty"
    for name in ("cells/000001.ply", "pages/000001.html", "overlays/000000.jpg"):
        assert (out / name).is_file(), name
    said = runner.invoke(app, ["points", "occupancy", str(folder / "000000.bin"), "-c", weights, "-o", str(out),
                               "--json", "--no-overlays", "--no-pages", "--device", "cpu"])  # fmt: skip
    assert sum(json.loads(said.stdout)[0]["answer"]["cells"].values()) == (volume > 0).sum()


def test_wrong_folders_and_volumes_have_one_line(kitti, tmp_path):
    with pytest.raises(InputError, match="SemanticKITTI has sequences/00/voxels"):
        open_volumes(str(tmp_path))
    train, _ = open_volumes(str(kitti))
    with pytest.raises(InputError, match="4096 cells, not 256x256x32"):
        VolumeSamples(train, ScanPreprocess(), (0, -25.6, -2), (51.2, 25.6, 4.4), (256, 256, 32))[0]
    with pytest.raises(InputError, match="completes no scenes"):
        Training(OccupancyRecipe(str(kitti), model="vim_tiny_patch16_224"), tmp_path / "x", ALONE, Run(workers=0))
