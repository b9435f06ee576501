"""The training loop, of any task.

A run lives in a folder:

    recipe.json          what was asked for
    state.pt             everything needed to continue: weights, their average, the optimiser, the step
    model.safetensors    the weights after the last evaluation (their average, if one is kept), for use
    best.safetensors     the same after the best evaluation so far
    metrics.csv, tensorboard/

Files are replaced whole, and all randomness is a function of the seed and the step (see data.py). A run that is killed
at any moment and resumed therefore takes the very steps it would have taken.

What is trained, on what, and how it is scored is a task's (`linescan.tasks.base.Task`); nothing here knows one from
another.
"""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linescan.checkpoint import CARD, CheckpointError
from linescan.tensorfile import read_file

from ..errors import Diverged, InputError
from .atomic import atomic, expect_folder, sweep
from .cards import save_model
from .data import seed_all, steps_of, to_device, training_batches
from .metrics import Log
from .optimisers import build_optimizer, build_schedule
from .processes import Processes, interruptible, processes
from .progress import progress_bar, say
from .recipe import Recipe, Run, flag
from .scores import evaluate, expect_readable, precision

__all__ = ["Training", "train"]

LENGTHS = ("epochs", "steps")  # what may be raised when a run is resumed


class Training:
    """A run under way.

    Args:
        recipe: what to do.
        out: the folder of the run.
        processes: those that work together.
        run: how to carry it out. With `resume` it continues from the folder's state (or starts, if there is none yet);
            without, a folder that has one is refused.

    Raises:
        InputError, CheckpointError: the data, the model, the folder's state or the recipe cannot be used.
    """

    def __init__(self, recipe: Recipe, out: str | Path, processes: Processes, run: Run = Run()):
        self.recipe, self.out, self.processes, self.how = recipe, Path(out), processes, run
        state = self._read_state()

        task_class = recipe.load()
        if state:  # as the run was started, whatever has become of its checkpoint; the weights are in the state
            lengths = {name: getattr(recipe, name) for name in LENGTHS}
            self.started = replace(recipe.from_dict(state["started"]), **lengths)
            ready = self.started.resumed()
        else:
            self.started = ready = task_class.resolve(recipe)
        seed_all(recipe.seed, "weights", device=processes.device)
        self.task = task_class(ready)
        self.task.to(processes.device)
        self.bare: nn.Module = self.task.model
        if recipe.grad_checkpointing:
            self.task.checkpoint_gradients()

        self.steps = steps_of(self.task.data, recipe.batch, recipe.accumulate, processes.count, recipe.seed)
        per_epoch = self.steps.per_epoch
        self.last = recipe.steps or recipe.epochs * per_epoch
        if recipe.steps:
            self.between = recipe.evaluate_every or max(recipe.steps // 10, 1)
        else:
            self.between = (recipe.evaluate_every or 1) * per_epoch
        self.optimizer = build_optimizer(recipe, self.task.parameter_groups())
        self.scheduler = build_schedule(recipe, self.optimizer, per_epoch)
        expect_readable(self.task.evaluator)
        expect_folder(self.out)
        self.task.load_weights()  # when all else is accepted: they may have to be fetched
        self.ema = ModelEmaV3(self.bare, recipe.ema, use_warmup=True) if recipe.ema else None

        self.step = 0
        self.best: float | None = None
        self.scores: dict[str, float] | None = None  # of the last evaluation
        self.seconds = 0.0  # of training, in all processes that this run has had
        self.losses = torch.zeros(
            len(self.task.losses), device=processes.device
        )  # summed since the last row of the log
        self.rows = 0  # steps in that sum
        self.broken: set[str] = set()
        if state:
            self._restore(state)
        self.model = self.bare
        if processes.count > 1:
            device = processes.device
            self.model = DistributedDataParallel(self.bare, [device] if device.type == "cuda" else None)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Trains to the end of the recipe; returns the scores of the last evaluation."""
        processes = self.processes
        if self.step >= self.last and self.scores:
            if processes.first:
                say(f"{self.out} is finished, after {self._length()}: {self._said(self.scores)}")
            return self.scores
        if processes.first:
            self._describe()
            sweep(self.out)
        columns = ("step", "epoch", "lr", *self.task.losses, *map(self._column, self.task.evaluator.names), "seconds")
        log = Log(self.out, self.step, columns) if processes.first else None
        batches = iter(
            training_batches(
                self.task.data, self.steps, processes.rank, self.step, self.last, self._workers(self.task.data),
                pin=processes.device.type == "cuda",
            )
        )  # fmt: skip
        started = time.monotonic() - self.seconds
        self.model.train()
        try:
            bar = progress_bar("training", self.last, self.step, show=processes.first)
            with interruptible() as check, bar as advance:
                while self.step < self.last:
                    check()
                    self.take_step(batches)
                    self.seconds = time.monotonic() - started
                    judged = self.step % self.between == 0 or self.step == self.last
                    if judged or self.step % self.how.log_every == 0 or self.step % self.steps.per_epoch == 0:
                        losses = self._mean_losses()
                        if log:
                            log.write(**self._when(), lr=self.lr, **losses, seconds=self.seconds)
                        advance(0, f"epoch {self.epoch}  loss {losses['loss']:.3f}")
                    if judged:
                        self.scores = self.evaluate()
                        self.seconds = time.monotonic() - started
                        if log:
                            self._report(log, self.scores)
                    if judged or (self.how.save_every and self.step % self.how.save_every == 0):
                        self.save()
                    advance()
        finally:
            self.model = self.bare  # the wrapper must be gone before its process group: some exits crash otherwise
            if log:
                log.close()
        return self.scores

    def take_step(self, batches) -> None:
        """One step of the optimiser, from the next `accumulate` batches."""
        recipe, processes = self.recipe, self.processes
        dtype = torch.bfloat16 if recipe.bf16 else torch.float32
        self.scheduler.step_update(self.step)
        self.task.step = self.step
        for part in range(recipe.accumulate):
            content, size, broken = next(batches)
            self._name_broken(broken)
            if not size:
                raise InputError(f"none of the {len(self.task.data)} training samples can be read; see above")
            content = to_device(content, processes.device)
            seed_all(recipe.seed, "step", self.step, processes.rank, part, device=processes.device)
            more = processes.count > 1 and part + 1 < recipe.accumulate
            with self.model.no_sync() if more else nullcontext():
                with precision(processes.device, dtype):
                    result = self._forward(content)
                (result["loss"] / recipe.accumulate).backward()
            self.losses += torch.stack([result[name].detach().float() for name in self.task.losses]) / recipe.accumulate
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.bare.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.rows += 1
        if self.ema:
            self.ema.update(self.bare, step=self.step)

    def _forward(self, content) -> dict[str, Tensor]:
        try:
            return self.task(self.model, content)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel"):
                raise
            why = "a norm over the batch sees a single value of each channel"
            raise InputError(f"{why}; a larger --batch, or larger inputs, are needed") from error

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the weights as they would be used."""
        for buffer in self.weights.buffers():  # running means differ by what each process has seen in the last step
            if buffer.is_floating_point():
                self.processes.copy_from_first(buffer)
        evaluator = self.task.evaluator
        workers = self._workers(evaluator.data)
        result = evaluate(evaluator, self.weights, self.processes, batch=self.recipe.batch, workers=workers)
        self._name_broken(result.broken)
        return result.scores

    @property
    def weights(self) -> nn.Module:
        """What is trained, as it would be used: its moving average where one is kept."""
        return self.ema.module if self.ema else self.bare

    @property
    def epoch(self) -> int:
        """The number of the epoch that the last step belonged to, from 1."""
        return max(self.step - 1, 0) // self.steps.per_epoch + 1

    @property
    def lr(self) -> float:
        """The learning rate of the last step (the highest of all groups)."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _workers(self, data) -> int:
        if self.how.workers is not None:
            return self.how.workers
        return 0 if getattr(data, "in_memory", False) else min(4, os.cpu_count() or 1)

    def _when(self) -> dict[str, int]:
        return {"step": self.step, "epoch": self.epoch}

    def _column(self, name: str) -> str:
        return f"val_{name}"

    def _mean_losses(self) -> dict[str, float]:
        """The mean of each loss since the last call, over all processes."""
        means = (self.processes.sum(self.losses.clone()) / (self.rows * self.processes.count)).tolist()
        self._check(means)
        self.losses.zero_()
        self.rows = 0
        return dict(zip(self.task.losses, means))

    def _check(self, losses: list[float]) -> None:
        for name, loss in zip(self.task.losses, losses):
            if loss != loss or abs(loss) == float("inf"):
                state = self.out / "state.pt"
                kept = f"the state before is in {state}" if state.exists() else "no state had been saved yet"
                raise Diverged(
                    f"{name} is {loss} after step {self.step}; a lower --lr, a longer --warmup, --clip-grad 1 or no "
                    f"--bf16 may help ({kept})"
                )

    def _name_broken(self, messages: list[str]) -> None:
        for message in dict.fromkeys(messages):
            if message not in self.broken:
                say(("left out", "yellow"), f" {message}")
        self.broken |= set(messages)

    # -- what is written --------------------------------------------------------------------------------------------

    def _length(self) -> str:
        recipe = self.recipe
        return f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs} epochs of {self.steps.per_epoch} steps"

    def _said(self, scores: dict[str, float]) -> str:
        return self.task.evaluator.describe(scores)

    def _describe(self) -> None:
        processes = self.processes
        millions = sum(p.numel() for p in self.bare.parameters() if p.requires_grad) / 1e6
        name = self.started.model or self.recipe.task
        say((name, "bold"), f"  {millions:.2f} M parameters, {self.task.describe()}")
        say(
            f"{self._length()} of {self.steps.per_step} {self.task.unit} on {processes.count} x {processes.device}"
            + (f", from step {self.step}" if self.step else "")
            + f", into {self.out}"
        )
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic(self.out / "recipe.json") as file:
            file.write(json.dumps(self.recipe.as_dict(), indent=2).encode() + b"\n")

    def _report(self, log: Log, scores: dict[str, float]) -> None:
        """After an evaluation: a row, a line, and the weights for use."""
        judged = {self._column(name): value for name, value in scores.items()}
        log.write(**self._when(), **judged, seconds=self.seconds)
        where = f"step {self.step}/{self.last}" if self.recipe.steps else f"epoch {self.epoch:>3}/{self.recipe.epochs}"
        say(f"{where}  held out: {self._said(scores)}  ({self.seconds:.0f} s)")
        model, card = self._product({**self._when(), **judged})
        save_model(self.out / "model.safetensors", model, card)
        if self.task.evaluator.better(scores, self.best):
            self.best = scores[self.task.evaluator.primary]
            save_model(self.out / "best.safetensors", model, card)

    def _product(self, trained: dict) -> tuple:
        return self.task.product(self.weights), replace(self.task.card(), trained=trained)

    def save(self) -> None:
        """Writes state.pt, which is a checkpoint as well: it has the weights for use, and their card."""
        self._check(self.processes.sum(self.losses.clone()).tolist())
        if not self.processes.first:
            return
        state = {
            CARD: self.task.card().as_dict(),
            "recipe": self.recipe.as_dict(),
            "started": self.started.as_dict(),
            "steps": self.steps.facts,
            "step": self.step,
            "best": self.best,
            "scores": self.scores,
            "seconds": self.seconds,
            "losses": self.losses.tolist(),  # a tensor here would look like a weight
            "rows": self.rows,
            "model": self.task.product(self.weights).state_dict(),  # of the same storage: takes no room
            "trained": self.bare.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic(self.out / "state.pt") as file:
            torch.save(state, file)

    def _read_state(self) -> dict | None:
        path = self.out / "state.pt"
        if not path.exists():
            return None
        if not self.how.resume:
            raise InputError(f"{self.out} already holds a run; --resume continues it, another --out starts a new one")
        state: Any = read_file(path)
        try:
            before, started = state["recipe"], state["started"]
            if not isinstance(before, dict) or not isinstance(started, dict):
                raise TypeError
        except Exception:
            raise CheckpointError(f"{path} is not the state of a run, or is damaged") from None
        now = json.loads(json.dumps(self.recipe.as_dict()))
        new = {field.name: field.default for field in fields(self.recipe) if field.name not in before}
        before = new | json.loads(json.dumps(before))  # options that came after the run began are at their defaults
        raised = []
        for name in now:
            was, wanted = before.get(name), now[name]
            if was == wanted:
                continue
            if name in LENGTHS and was is not None and wanted is not None and wanted > was:
                raised.append(f"{flag(name)} raised from {was} to {wanted}: from step {state['step']} on the learning "
                              f"rate follows the schedule of the longer run")  # fmt: skip
                continue
            raise InputError(
                f"{self.out} is a run with {flag(name)} {was}, not {wanted}; --resume continues a run as it is, or "
                "with more --epochs or --steps (--checkpoint starts a new one from its weights)"
            )
        for line in raised if self.processes.first else ():
            say(line)
        return state

    def _restore(self, state: dict) -> None:
        for name, now in self.steps.facts.items():
            if state["steps"].get(name) != now:
                raise InputError(
                    f"{self.out} is a run with {name}={state['steps'].get(name)}, not {now}; its steps would differ"
                )
        try:
            self.bare.load_state_dict(state["trained"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{self.out / 'state.pt'} is the state of another model ({reason})") from None
        for name in ("step", "best", "scores", "seconds", "rows"):
            setattr(self, name, state[name])
        self.losses = torch.tensor(state["losses"], device=self.processes.device)


def train(recipe: Recipe, out: str | Path, **run) -> dict[str, float]:
    """Runs `recipe` in the folder `out`, alone or as one of torchrun's processes; returns the held-out scores.

    Args:
        recipe: one of `linescan.tasks.recipes`.
        out: the folder of the run.
        run: fields of `Run`: `device`, `workers`, `save_every`, `log_every`, `resume`.

    Raises:
        InputError, CheckpointError: something given cannot be used.
        Diverged: the loss is no longer a number.
    """
    how = Run(**run)
    with processes(how.device) as together:
        return Training(recipe, out, together, how).run()
