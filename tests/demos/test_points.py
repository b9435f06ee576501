"""`make demo-points` on a small scale: its trainings in processes, its files, and a training that fails."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from linescan.demos.points import TRAININGS, demo_points
from linescan.demos.trainings import train_all
from linescan.media.points import read_points
from linescan.tasks.points import PointClassifier

SMALL = {name: {"points": 128, "batch": 8} for name in ("pointmamba", "mamba3d", "parts")}
SHORT = {n: replace(recipe, steps=3, warmup=0.0, **SMALL.get(n, {})) for n, recipe in TRAININGS.items()}


@pytest.mark.slow
def test_everything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr("linescan.demos.points.VOTES", 2)
    out = tmp_path / "demo"
    metrics = demo_points(out, SHORT)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["mamba3d"]["top1"] <= 100 and metrics["parts"]["instance_miou"] > 0
    assert metrics["lion"]["map"] >= 0 and len(list((out / "streets").iterdir())) == 12
    for name in ("demo.png", "parts.png", "street.png"):
        with Image.open(out / name) as image:
            assert image.width >= 1200
    assert "1,024 points" in (out / "parts.html").read_text()
    scans = sorted((out / "scans").iterdir())
    assert len(scans) == 12 and set(read_points(scans[0]).labels.tolist()) == {0, 1}
    named = PointClassifier(checkpoint=out / "pointmamba" / "model.safetensors")(scans[0])
    assert named[0].label in set("0123456789")


def test_a_training_that_fails_names_its_log(tmp_path):
    broken = replace(SHORT["pointmamba"], model_args={"groups": 0})
    with pytest.raises(RuntimeError, match="see .*bad/training.log"):
        train_all({tmp_path / "bad": broken}, 1)
    assert "at least 1" in (tmp_path / "bad" / "training.log").read_text()
