"""MMEngine's trainings when they are killed: at any moment a whole checkpoint is there, and reading it runs nothing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.evaluator import BaseMetric, Evaluator  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner, find_latest_checkpoint  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import linescan.openmmlab  # noqa: E402, F401
from linescan.checkpoint import CheckpointError  # noqa: E402
from linescan.engine import atomic as files  # noqa: E402
from linescan.openmmlab.resumable import load_from_disk  # noqa: E402


class Crash(BaseException):
    """Stands for the end of the process."""


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1, bias=False)

    def forward(self, x, mode="tensor"):
        if mode == "predict":
            return [self.line.weight.item()]
        return {"loss": (self.line(x) - 3 * x).square().mean()}


class Nearness(BaseMetric):
    """How near the slope is to the right one; of the type that mmseg's scores have."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return {"nearness": np.float32(-abs(results[0] - 3))}


def toy_runner(work_dir, best=None, **kwargs):
    """MMEngine's Runner, of a line through points, that saves after every iteration, and the best by a score."""
    hook = {"type": "AtomicCheckpointHook", "by_epoch": False, "interval": 1, "max_keep_ckpts": 2}
    if best:
        hook |= {"save_best": best, "rule": "greater"}
        loader = DataLoader(TensorDataset(torch.rand(1, 1)))
        kwargs |= {"val_dataloader": loader, "val_evaluator": Evaluator(Nearness()), "val_cfg": {"type": "ValLoop"}}
    return Runner(
        Line(), str(work_dir), train_dataloader=DataLoader(TensorDataset(torch.rand(8, 1))),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 6, "val_interval": 1},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "Adam", "lr": 0.1}}, log_level="ERROR",
        default_hooks={"checkpoint": hook}, experiment_name=f"{work_dir}_{len(os.listdir(work_dir))}", **kwargs,
    )  # fmt: skip


def crash_at(monkeypatch, call, step, runner):
    """Trains until the process ends at the step-th call of a function of os."""
    calls, real = [], getattr(os, call)

    def crash(*args):
        calls.append(args)
        if len(calls) == step:
            raise Crash
        return real(*args)

    monkeypatch.setattr(files.os, call, crash)
    with pytest.raises(Crash):
        runner.train()
    monkeypatch.undo()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", range(1, 13, 3))
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_whenever_it_ends_there_is_something_to_go_on_from(tmp_path, monkeypatch, call, step):
    crash_at(monkeypatch, call, step, toy_runner(tmp_path))
    latest = find_latest_checkpoint(str(tmp_path))
    if latest is None:
        assert step <= 3  # before the first was whole
    else:
        assert load_from_disk(latest)["meta"]["iter"] == int(Path(latest).stem[5:])
    toy_runner(tmp_path, resume=True).train()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_5.pth", "iter_6.pth"]
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_6.pth")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [8, 9, 10])
def test_whenever_it_ends_there_are_best_weights(tmp_path, monkeypatch, step):
    """In iteration 2, before there are the best weights, the checkpoint that names them, and its name."""
    crash_at(monkeypatch, "replace", step, toy_runner(tmp_path, "nearness"))
    best = [load_from_disk(path)["meta"]["iter"] for path in tmp_path.glob("best_*")]
    assert sorted(best) == ([1] if step == 8 else [1, 2])
    toy_runner(tmp_path, "nearness", resume=True).train()
    slope = load_from_disk(tmp_path / "best_nearness_iter_6.pth")["state_dict"]["line.weight"]
    assert torch.equal(slope, load_from_disk(tmp_path / "iter_6.pth")["state_dict"]["line.weight"])
    assert not list(tmp_path.glob("best_*_[345].pth"))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["LINESCAN_TEST_BOMB"],)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_training_runs_nothing_that_a_file_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LINESCAN_TEST_BOMB", str(tmp_path / "exploded"))
    torch.save({"state_dict": {}, "meta": Bomb()}, tmp_path / "iter_1.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_1.pth"))
    with pytest.raises(CheckpointError, match="refused"):
        toy_runner(tmp_path, resume=True).train()
    toy_runner(tmp_path).train()
    whole = load_from_disk(tmp_path / "iter_6.pth")
    whole["meta"]["config"] = "import os\nos.mkdir(os.environ['LINESCAN_TEST_BOMB'])"  # MMEngine would run it
    torch.save(whole, tmp_path / "iter_6.pth")
    toy_runner(tmp_path, resume=True).train()
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "iter_1.pth").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CheckpointError, match="damaged"):
        load_from_disk(tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_from_disk(tmp_path / "iter_2.pth")
