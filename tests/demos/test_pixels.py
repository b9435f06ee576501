"""`make demo-pixels`, cut short: every step of it runs, and what it says is what its own files say."""

import json

import numpy as np
import pytest
from PIL import Image

from linescan.demos import pixels
from linescan.demos.pixels import anomaly, pairs, restoration
from linescan.engine.digit_scenes import render_pair
from linescan.engine.image_sets import Digits
from linescan.engine.metrics import read_metrics
from linescan.engine.training import train
from linescan.errors import InputError


@pytest.mark.slow
def test_the_demo_writes_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(restoration, "TRAIN", ("rocket", "motorcycle_left"))
    monkeypatch.setattr(restoration, "HELD_OUT", ("chelsea",))
    short = {}
    for name, job in restoration.jobs().items():
        filters = {word: settings[:1] for word, settings in job.filters.items() if word in ("median", "bicubic")}
        short[name] = job._replace(recipe={**job.recipe, "steps": 2, "batch": 1, "warmup": 0}, filters=filters)
    monkeypatch.setattr(restoration, "jobs", lambda: short)
    (tmp_path / "restoration" / "denoise").mkdir(parents=True)
    (tmp_path / "restoration" / "denoise" / "state.pt").write_bytes(b"of an older demo")
    scores = pixels.demo_pixels(tmp_path, parts=["restoration"])
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    denoise, enlarge = scores["restoration"]["denoise"], scores["restoration"]["enlarge"]
    assert set(denoise) == {"degraded", "median", "MambaIRv2"} and set(enlarge) == {"bicubic", "MambaIRv2"}
    assert denoise["degraded"] == pytest.approx(20 * np.log10(255 / restoration.NOISE), abs=0.3)
    assert denoise["median"] > denoise["degraded"] + 2 and 30 < enlarge["bicubic"] < 40
    for name, said in scores["restoration"].items():
        rows = read_metrics(tmp_path / "restoration" / name / "metrics.csv")
        assert said["MambaIRv2"] == pytest.approx(rows[-1]["val_psnr"], abs=1e-3)
    with Image.open(tmp_path / "restoration" / "restoration.png") as drawn:
        assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 20


@pytest.mark.slow
def test_anomalies_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(anomaly, "SHARES", {"train": 4, "good": 2, "pasted": 2})
    monkeypatch.setattr(anomaly, "TEACHER", anomaly.TEACHER | {"steps": 1, "batch": 4, "warmup": 0})
    monkeypatch.setattr(anomaly, "MAMBAAD", anomaly.MAMBAAD | {"steps": 2, "batch": 4, "warmup": 0})
    scores = pixels.demo_pixels(tmp_path, parts=["anomaly"])["anomaly"]
    assert scores == json.loads((tmp_path / "scores.json").read_text())["anomaly"]
    [row] = [r for r in read_metrics(tmp_path / "anomaly" / "mambaad" / "metrics.csv") if "val_aupro" in r]
    assert scores["image_auroc"] == row["val_image_auroc"] and scores["aupro"] == row["val_aupro"]
    with Image.open(tmp_path / "anomaly" / "anomaly.png") as drawn:
        assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 20


@pytest.mark.slow
def test_pairs_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "SCENES", {"train": 4, "val": 5})
    monkeypatch.setattr(pairs, "RECIPE", pairs.RECIPE | {"steps": 2, "batch": 2, "warmup": 0})
    monkeypatch.setattr(pairs, "train_all", lambda runs: [train(one, out, device="cpu") for out, one in runs.items()])
    scores = pixels.demo_pixels(tmp_path, parts=["pairs"])["pairs"]
    assert scores == json.loads((tmp_path / "scores.json").read_text())["pairs"]
    assert list(scores) == ["both", "image", "thermal"]
    for name, said in scores.items():
        [row] = [r for r in read_metrics(tmp_path / "pairs" / name / "metrics.csv") if "val_miou" in r]
        assert said["miou"] == row["val_miou"]
    place = tmp_path / "pairs" / "scenes"
    read = {name: [(place / name / "val" / part / "003.png").read_bytes() for part in ("images", "extra", "masks")]
            for name in scores}  # fmt: skip
    image, thermal, mask = read["both"]
    assert read["image"] == [image, image, mask] and read["thermal"] == [thermal, thermal, mask]
    with Image.open(tmp_path / "pairs" / "pairs.png") as drawn:
        assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 20


def test_every_digit_is_seen_in_one_of_two_images():
    digits, seen = Digits(held_out=True), []
    for i in range(20):
        scene, thermal = render_pair(digits, np.random.default_rng(i), 64, 3)
        brightness, heat = scene.image.astype(float).mean(-1), thermal.astype(float)
        canvas = ~scene.masks.any(0)
        for mask in scene.masks:
            bright, warm = (x[mask].mean() > x[canvas].max() * 0.9 for x in (brightness, heat))
            assert bright != warm
            seen.append(bright)
    assert 0.3 < np.mean(seen) < 0.7


def test_a_pasted_defect_is_where_its_mask_says():
    dice = np.random.default_rng(0)
    image, mask = anomaly.paste(np.zeros((128, 128, 3), np.uint8), np.full((128, 128, 3), 200, np.uint8), dice)
    assert ((image == 200).all(-1) == mask).all() and 200 < mask.sum() < 1600
    assert not mask[0].any() and not mask[:, -1].any(), "whole, inside the image"


def test_parts():
    assert list(pixels.PARTS) == ["restoration", "anomaly", "pairs"]
    with pytest.raises(InputError, match="a part of the demo is one of 'restoration', 'anomaly', 'pairs', not 'sound'"):
        pixels.demo_pixels("nowhere", parts=["sound"])
