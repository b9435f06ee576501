"""`linescan compare`: variants of one model under one recipe, in small."""

import csv
import json
import os
import signal
import subprocess
import time

import pytest
from matplotlib.figure import Figure
from PIL import Image

from linescan.engine.benchmark import Measurement
from linescan.errors import InputError
from linescan.tasks import compare
from linescan.tasks.compare import Outcome, Score, Variant
from linescan.tasks.recipes import ClassificationRecipe

from ..conftest import ENVIRONMENT, command

TINY = ("--epochs", "1", "--model-arg", "embed_dim=16", "--model-arg", "depth=2", "--sizes", "16,32")


def test_variants_are_all_combinations_and_named_by_what_differs():
    made = compare.variants(["s6", "s6+softmax"], ["row,-row"], ["mean", "gate"])
    assert [v.name for v in made] == ["s6, mean", "s6, gate", "s6+softmax, mean", "s6+softmax, gate"]
    assert made[2].args == {"mixer": ("s6", "softmax"), "routes": "row,-row", "merge": "mean"}
    assert made[0].folder == compare.variants(["s6"], ["row,-row"], ["mean"])[0].folder == "s6_row,-row_mean"
    assert [v.args for v in compare.variants(["gla", "gla"])] == [{"mixer": "gla"}]
    assert len(compare.variants(["all"])) == len({v.folder for v in compare.variants(["all"])}) > 20
    with pytest.raises(InputError, match="a mixer is one of 's6', .*, not 'lstm'"):
        compare.variants(["s6+lstm"])


@pytest.mark.slow
def test_models_on_equal_terms(linescan_here, tmp_path):
    args = "compare", "--out", tmp_path, "--mixers", "s6,s6+softmax", "--routes", "row,hilbert", *TINY
    status, shown, said = linescan_here(*args, "--seeds", "2", "--jobs", "2")
    page = json.loads((tmp_path / "compare.json").read_text())
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_name = {result["variant"]["name"]: result for result in page["results"]}
    for name in ("s6", "s6+softmax"):
        result = by_name[name]
        assert status == 0 and set(result["scores"]) == {"0", "1"}, said
        assert 0 < result["scores"]["0"] <= 100 and [c["size"] for c in result["costs"]] == [16, 32]
        for seed in "01":
            recipe = json.loads((tmp_path / f"{name}_row,hilbert" / seed / "recipe.json").read_text())
            mixer = name.split("+") if "+" in name else name
            assert recipe["model_args"]["mixer"] == mixer and recipe["model_args"]["routes"] == "row,hilbert"
            assert recipe["seed"] == int(seed) and recipe["model_args"]["embed_dim"] == 16 and recipe["epochs"] == 1
            (row,) = (row for row in rows if (row["model"], row["seed"]) == (name, seed))
            assert float(row["top1"]) == result["scores"][seed]
        assert f"| {name} | {result['parameters']:,} | " in (tmp_path / "compare.md").read_text()
        assert name in shown
    assert by_name["s6"]["parameters"] > by_name["s6+softmax"]["parameters"]
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size == (1560, 1200)

    # Again, with routes that do not exist: what is finished is not trained again.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/state.pt")}
    args = "compare", "--out", tmp_path, "--mixers", "s6", *TINY, "--routes", "row,hilbert"
    status, shown, said = linescan_here(*args, "--routes", "spiral9")
    assert status == 1 and "failed s6, spiral9 with seed 0: cannot build scan_tiny" in said
    assert all(path.stat().st_mtime_ns == before for path, before in written.items()) and len(written) == 4
    status, shown, said = linescan_here(*args, "--lr", "1e-3", "--no-times")
    assert status == 1 and "is a run with --lr 0.003, not 0.001" in said
    status, shown, said = linescan_here(*args, "--no-times")
    page = json.loads((tmp_path / "compare.json").read_text())
    assert status == 0 and not page["results"][0]["costs"] and page["results"][0]["parameters"], said
    assert (tmp_path / "compare.md").read_text().startswith("| model | parameters | top1 |\n")
    recipe = tmp_path / "s6_row,hilbert" / "0" / "recipe.json"
    args = "--out", tmp_path, "--mixers", "s6", "--routes", "row,hilbert", "--recipe", recipe, "--no-times"
    status, shown, said = linescan_here("compare", *args)
    assert status == 0 and all(path.stat().st_mtime_ns == before for path, before in written.items()), said


@pytest.mark.slow
def test_a_killed_comparison_goes_on(linescan_here, tmp_path):
    args = "compare", "--out", tmp_path, "--mixers", "softmax,s6", *TINY, "--routes", "row", "-e", "2", "--no-times"
    process = subprocess.Popen(command(*args), env=ENVIRONMENT, stderr=subprocess.PIPE)
    while not (tmp_path / "softmax_row" / "0" / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=600)  # until no process of the comparison holds the pipe any more
    assert not (tmp_path / "compare.json").exists()
    assert linescan_here(*args)[0] == 0
    results = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert [list(result["scores"]) for result in results] == [["0"], ["0"]]


def ended_by_name(recipe, folder, device):
    """A run that takes no time, or that the system ends."""
    if folder.parent.name == "s6":
        os.kill(os.getpid(), signal.SIGKILL)
    return Score(float(recipe.seed), "top1", True)


def test_a_run_that_is_killed_takes_no_other_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "_train", ended_by_name)
    made = compare.variants(["gla", "s6", "softmax"])
    done = []
    outcomes, kind = compare.train_all(
        ClassificationRecipe("digits"), made, tmp_path, seeds=2, progress=lambda n, description: done.append(n)
    )
    assert [outcome.scores for outcome in outcomes] == [{0: 0.0, 1: 1.0}, {}, {0: 0.0, 1: 1.0}] and kind.name == "top1"
    assert outcomes[1].errors == dict.fromkeys((0, 1), "its process was ended from outside") and len(done) == 6


def test_the_table_ranks_and_the_page_has_room_for_all(tmp_path):
    outcomes = [
        Outcome(
            Variant(f"m{i}", {}), {0: float(i), 1: i + 2.0}, {}, 1000 * i,
            [Measurement(f"m{i}", size, 1e-3 * size * i, 1.0, size * 1.0) for size in (16, 64)],
        )
        for i in range(1, 31)
    ]  # fmt: skip
    outcomes.append(Outcome(Variant("broken", {}), errors={0: "no"}))
    rows = compare.table(outcomes, Score(0.0, "top1", True))
    assert rows[0] == ["model", "parameters", "top1", "ms at 16 px", "ms at 64 px", "MB at 64 px"]
    assert rows[1] == ["m30", "30,000", "31.00 ± 1.41", "480.0", "1920.0", "64"]
    assert rows[-1] == ["broken", "-", "failed", "-", "-", "-"]
    assert compare.table(outcomes, Score(0.0, "loss", False))[1][0] == "m1"
    with open(tmp_path / "page.png", "wb") as file:
        compare.draw(outcomes, Score(0.0, "top1", True), "digits", file)
    with Image.open(tmp_path / "page.png") as page:
        assert page.convert("L").crop((600, 100, 900, 1150)).getextrema()[0] < 120, "names between the panels"

    figure = Figure()
    axis = figure.add_subplot()
    axis.plot([1, 2, 3], [10.0, 50.0, 90.0])
    compare._label(axis, [("low", 1, 10.0, "k"), ("high", 3, 90.0, "k"), ("middle", 2, 50.0, "k")])
    heights = {text.get_text(): text.xyann[1] for text in axis.texts}
    assert heights["low"] < 0.1 and heights["middle"] == pytest.approx(0.5) and heights["high"] > 0.9


def test_options_that_do_not_fit_are_one_line(linescan_here, tmp_path):
    for args, said in (
        (["--mixers", "lstm"], "a mixer is one of"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--bogus", "1"], "No such option: --bogus"),
        (["--sizes", "big"], "--sizes is numbers with commas between"),
        (["--task", "sing"], "--task must be one of classify"),
        (["--data", "digits", "--config", "x"], "are compared by training each"),
    ):
        status, _, line = linescan_here("compare", "--out", tmp_path / "new", *args)
        assert status == 2 and said in line, line
    assert not (tmp_path / "new").exists()
