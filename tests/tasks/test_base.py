"""The task of docs/add-a-task.md: it runs as it is written, and everything that the page promises holds for it."""

import csv
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.recipe import Run
from linescan.engine.training import Training, train
from linescan.errors import InputError

from ..runs import Forked, in_two, same, state_of

PAGE = Path(__file__).parents[2] / "docs" / "add-a-task.md"
TASK, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def page() -> dict:
    """What the page's file defines."""
    names = {"__name__": "denoise"}
    exec(compile(TASK, str(PAGE), "exec"), names)
    return names


def test_it_runs_as_it_is_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(USE, str(PAGE), "exec"), dict(page))
    scores = float(capsys.readouterr().out.split()[0])
    run = tmp_path / "runs" / "denoise"
    with open(run / "metrics.csv") as file:
        header = next(csv.reader(file))
    assert header == ["step", "epoch", "lr", "loss", "pixels", "edges", "val_psnr", "val_worst_psnr", "seconds"]
    rows = read_metrics(run / "metrics.csv")
    assert rows[-1]["val_psnr"] == pytest.approx(scores, abs=0.06) and rows[-1]["val_worst_psnr"] < rows[-1]["val_psnr"]
    trained = [row for row in rows if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["pixels"] + row["edges"], rel=1e-4) for row in trained)
    assert trained[-1]["loss"] < 0.7 * trained[0]["loss"]
    assert scores > -20 * math.log10(0.5)  # a good deal better than grey


def test_its_random_data_are_the_same_when_resumed(page, tmp_path):
    """Noise is drawn anew in each epoch, and is that of the step, however often the run was stopped."""
    recipe = page["DenoisingRecipe"]("digits", epochs=2, batch=240, ema=0.5, clip_grad=1.0, optimizer="lamb")
    Training(recipe, tmp_path / "whole", ALONE).run()
    training = Training(recipe, tmp_path / "parts", ALONE, Run(save_every=1))
    take_step, training.take_step = (
        training.take_step,
        lambda batches: training.step == 4 and 1 / 0 or take_step(batches),
    )
    with pytest.raises(ZeroDivisionError):
        training.run()
    Training(recipe, tmp_path / "parts", ALONE, Run(resume=True)).run()
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    other = replace(recipe, seed=1)
    Training(other, tmp_path / "other", ALONE).run()
    assert not same(state_of(tmp_path / "whole")["trained"], state_of(tmp_path / "other")["trained"])


def test_its_options_are_checked_and_its_defaults_are_its_own(page):
    recipe = page["DenoisingRecipe"]("digits")
    assert recipe.lr == 2e-3 and recipe.load() is page["DenoisingTask"]
    with pytest.raises(InputError, match="^--noise must be above 0, not nan$"):
        page["DenoisingRecipe"]("digits", noise=math.nan)


def test_the_best_is_the_highest_or_the_lowest(page, tmp_path):
    """By `primary` and `higher`: of scores that get worse, the first are kept."""
    recipe = page["DenoisingRecipe"]("digits", epochs=3, batch=720)
    for higher, expected in ((True, 3.0), (False, 1.0)):
        training = Training(recipe, tmp_path / str(higher), ALONE)
        training.task.evaluator.higher = higher
        values = iter((1.0, 2.0, 3.0))
        training.evaluate = lambda: {"psnr": next(values), "worst_psnr": 0.0}
        training.run()
        assert training.best == expected
        last, best = (tmp_path / str(higher) / f"{name}.safetensors" for name in ("model", "best"))
        assert (last.read_bytes() == best.read_bytes()) == higher


def _denoise(batch: int, out: str) -> None:
    sys.path.insert(0, ".")
    from denoise import DenoisingRecipe

    train(DenoisingRecipe("digits", epochs=1, batch=batch), out, device="cpu", log_every=1)


@pytest.mark.slow
def test_two_processes_score_alike(tmp_path):
    """Rows of scores are joined over processes; both write and say nothing twice."""
    (tmp_path / "denoise.py").write_text(TASK)
    one = Forked(tmp_path, _denoise, 80, "one").end()
    assert one.returncode == 0, one.stderr
    for said in (one.stderr, "".join(process.stderr for process in in_two(tmp_path, _denoise, 40, "two"))):
        assert said.count("held out:") == 1
    one, two = (read_metrics(tmp_path / out / "metrics.csv") for out in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3), (name, a["step"])
