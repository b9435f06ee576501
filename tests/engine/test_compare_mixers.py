"""tools/compare_mixers.py, in small."""

import csv
import importlib.util
import json

import pytest
from PIL import Image

from linescan.errors import InputError

from ..conftest import REPOSITORY

OPTIONS = dict(routes="row,hilbert", merge="gate", epochs=1, dim=16, depth=1, seed=0, threads=1)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_mixers", REPOSITORY / "tools" / "compare_mixers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_compare_two_mixers(tool, tmp_path, capsys):
    tool.compare("s6,softmax", to=tmp_path, **OPTIONS)
    results = json.loads((tmp_path / "compare.json").read_text())
    assert [r["mixer"] for r in results] == ["s6", "softmax"]
    for result in results:
        card = json.loads((tmp_path / result["mixer"] / "recipe.json").read_text())
        assert card["model_args"]["mixer"] == result["mixer"] and card["model_args"]["routes"] == "row,hilbert"
        assert len(result["curve"]) == 1 and 0 < result["top1"] <= 100 and result["seconds"] > 0
    assert results[0]["parameters"] > results[1]["parameters"] > 1000  # s6 has parameters of its own for each route
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mixer"], row["epoch"]) for row in rows] == [("s6", "1"), ("softmax", "1")]
    assert float(rows[0]["top1"]) == results[0]["top1"]
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size == (1820, 1120)

    written = (tmp_path / "softmax" / "state.pt").stat().st_mtime_ns
    tool.compare("softmax", to=tmp_path, **OPTIONS)  # finished runs are not trained again
    assert (tmp_path / "softmax" / "state.pt").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "compare.json").read_text())[0]["top1"] == results[1]["top1"]
    with pytest.raises(InputError, match="is a run with --seed 0, not 1; --resume"):
        tool.compare("softmax", to=tmp_path, **{**OPTIONS, "seed": 1})


def test_unknown_mixer(tool, tmp_path):
    with pytest.raises(InputError, match="unknown mixer 'lstm'; there are: s6, ssd, "):
        tool.compare("s6,lstm", to=tmp_path, **OPTIONS)
