"""Training that is killed, and training in several processes: real ones, through the command line."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from linescan.engine.metrics import read_metrics
from linescan.engine.processes import processes
from linescan.engine.recipe import Run
from linescan.engine.training import Training
from linescan.tasks.recipes import RECIPES

from ..conftest import ENVIRONMENT, SMALL, command, write_images
from ..runs import Forked, be_linescan, contents, finish, in_two, kill_and_resume, linescan, rows_of, same, train_as_two

# Everything random is on, and every kind of state is kept.
RECIPE = (
    "train", "-d", "images", "--holdout", 0.25, "-e", 12, "-b", 4, "--accumulate", 2, "--augment", "standard",
    "--erasing", 0.5, "--mixup", 0.8, "--cutmix", 1, "--ema", 0.9, "--drop-path", 0.2, "--save-every", 1,
    "--log-every", 1, "--workers", 0, "--device", "cpu", *SMALL,
)  # fmt: skip


def _killed_while_writing(moment: str, count: int, *args: str) -> None:
    """`linescan ARGS`, killed when it is about to (or half way through) write the run's state for the n-th time."""
    save, replace, states = torch.save, os.replace, 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_half(state, file):
        nonlocal states
        states += 1
        save(state, file)
        if states == count and moment == "half":
            file.flush()
            file.truncate(file.tell() // 2)
            die()

    def rename(a, b):
        if states == count and str(b).endswith("state.pt") and moment == "before":
            die()
        replace(a, b)
        if states == count and str(b).endswith("state.pt") and moment == "after":
            die()

    torch.save, os.replace = save_half, rename
    be_linescan(*args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder with the images and a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("interruption")
    write_images(folder / "images")
    finish(folder, RECIPE, "whole")
    assert contents(folder / "whole")[0]["step"] == 36
    return folder


@pytest.mark.slow
def test_killed_at_random_moments(whole):
    """kill -9, again and again, whenever it falls; then the very same end."""
    kill_and_resume(whole, RECIPE, "random", times=3, rows=14)
    assert same(contents(whole / "random"), contents(whole / "whole"))


@pytest.mark.slow
def test_killed_while_writing(whole):
    """Half a state on the disk; a whole one without its name; a whole one with it and nothing after."""
    for moment, count in (("half", 5), ("before", 3), ("after", 4)):
        args = map(str, (*RECIPE, "-o", "writing", "--resume"))
        process = Forked(whole, _killed_while_writing, moment, count, *args).end()
        assert process.returncode == -signal.SIGKILL, process.stderr
        left = [p.name for p in (whole / "writing").iterdir() if p.name.endswith(".partial")]
        assert left == ([] if moment == "after" else [".state.pt.partial"])
        torch.load(whole / "writing" / "state.pt", weights_only=True)
    finish(whole, RECIPE, "writing")
    assert same(contents(whole / "writing"), contents(whole / "whole"))
    assert not list((whole / "writing").glob(".*"))


def test_stopped_from_the_keyboard(tmp_path):
    write_images(tmp_path / "images")
    process = linescan(tmp_path, *RECIPE, "-o", "run", "--epochs", 1000)
    while process.process.is_alive() and rows_of(tmp_path / "run") < 2:
        time.sleep(0.01)
    os.kill(process.process.pid, signal.SIGINT)
    done = process.end()
    assert done.returncode == 130 and "--resume continues" in done.stderr and "Traceback" not in done.stderr


def _agree(recipe: dict, out: str) -> None:
    with processes("cpu") as together:
        training = Training(RECIPES[recipe["task"]].from_dict(recipe), out, together, Run(log_every=1))
        scores = training.run()
        states = [*training.bare.state_dict().values(), *training.ema.module.state_dict().values()]
        mine = torch.cat([t.double().flatten() for t in states])
        all = [torch.empty_like(mine) for _ in range(together.count)]
        dist.all_gather(all, mine)
        seen = [None] * together.count
        dist.all_gather_object(seen, (scores["top1"], training.step))
        print(json.dumps({"equal": all[0].equal(all[1]), "seen": seen}))


@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2)
    recipe = dict(task="classify", data="digits", model=SMALL[1], model_args=args, epochs=1, batch=40, ema=0.9)
    said = json.loads(in_two(tmp_path, _agree, recipe, "two")[0].stdout)
    assert said["equal"] and said["seen"][0] == said["seen"][1] and said["seen"][0][1] == 18

    # The command, alone: one process with twice the batch sees the same images in the same steps.
    finish(tmp_path, (*"train -d digits -e 1 -b 80 --ema 0.9 --log-every 1".split(), *SMALL), "one")
    for a, b in zip(*(read_metrics(tmp_path / run / "metrics.csv") for run in ("one", "two")), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])


@pytest.mark.slow
def test_torchrun_runs_the_command(tmp_path):
    torchrun = "torch.distributed.run --standalone --nproc_per_node=2 -m linescan"
    args = ("train", "-d", "digits", "-o", "run", "-b", 360, *SMALL)
    done = subprocess.run(
        command(*args, "-e", 1, module=torchrun), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in (done.stderr, train_as_two(tmp_path, *args, "-e", 2, "--resume").stderr):
        assert "on 2 x cpu" in said and said.count("epochs of 2 steps of 720 images") == 1
    assert (tmp_path / "run" / "model.safetensors").exists()
