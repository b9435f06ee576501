"""`make demo-pixels`, cut short: every step of it runs, and what it says is what its own files say."""

import json

import numpy as np
import pytest
from PIL import Image

from linescan.demos import pixels
from linescan.demos.pixels import restoration
from linescan.engine.metrics import read_metrics
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


def test_parts():
    assert list(pixels.PARTS) == ["restoration"]
    with pytest.raises(InputError, match="a part of the demo is one of 'restoration', not 'sound'"):
        pixels.demo_pixels("nowhere", parts=["sound"])
