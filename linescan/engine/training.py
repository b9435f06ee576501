"""The training loop.

A run lives in a folder:

    recipe.json          what was asked for
    state.pt             everything needed to go on: weights, their average, the optimiser, the step
    model.safetensors    the weights after the last whole epoch (their average, if one is kept), for use
    best.safetensors     the same after the best epoch so far
    metrics.csv, tensorboard/

Files are replaced in one stroke, and all randomness is a function of the seed and the step (see data.py). A run that is
killed at any moment and resumed therefore takes the very steps it would have taken.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linescan.checkpoint import CheckpointError, load_checkpoint

from ..errors import Diverged, InputError
from .atomic import atomic, sweep
from .cards import ModelCard, build, preprocess_of, save_model
from .data import Samples, Steps, evaluation_batches, seed_all, training_batches
from .image_sets import open_data
from .metrics import Log
from .processes import Processes, processes
from .progress import progress_bar, say
from .scores import Scores, precision, score

__all__ = ["Recipe", "Training", "train"]


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run computes. The defaults suit a tiny model and a folder of pictures.

    Attributes:
        data, val, holdout: see `linescan.engine.image_sets.open_data`.
        model, model_args: `timm.create_model(model, **model_args)`; classes and channels follow the data.
        pretrained: start from the published weights.
        checkpoint: start from the weights in this file; another classifier's are left out.
        epochs, batch, accumulate: `batch` pictures in one forward pass of one process, `accumulate` passes in a step.
        lr, min_lr, warmup: the learning rate rises from 0 over `warmup` epochs and falls to `min_lr` along a cosine.
        weight_decay, layer_decay, clip_grad: of AdamW; of the rate from layer to layer; of the gradient's norm.
        augment, erasing: see `linescan.media.preprocess.Preprocess.transform`. None: by the data.
        mixup, cutmix, smoothing: strengths; 0 for none.
        ema: decay of the moving average of the weights; 0 for none. It starts as a plain average.
        drop_path: stochastic depth.
        bf16: compute in bfloat16 under autocast.
        grad_checkpointing: trade time for memory.
        seed: of everything random.
    """

    data: str
    val: str | None = None
    holdout: float = 0.1
    model: str = "vim_tiny_patch16_224"
    model_args: dict = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    epochs: int = 100
    batch: int = 64
    accumulate: int = 1
    lr: float = 5e-4
    min_lr: float = 1e-5
    warmup: float = 5.0
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None
    augment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    ema: float = 0.0
    drop_path: float = 0.0
    bf16: bool = False
    grad_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch", "accumulate", "lr"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("erasing", "smoothing", "ema", "drop_path", "holdout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        for name in ("mixup", "cutmix", "warmup", "min_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, and is {getattr(self, name)}")
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise InputError(f"mixup and cutmix pair pictures up: the batch must be even, not {self.batch}")


class Training:
    """A run under way.

    Args:
        recipe: what to do.
        out: the folder of the run.
        us: this process among its fellows.
        resume: go on from the folder's state (or start, if it holds none yet) rather than refuse a folder that has one.
        workers: processes that load pictures, each.
        save_every: steps between two saved states; 0: at the end of each epoch only.
        log_every: steps between two rows of metrics.csv.

    Raises:
        InputError, CheckpointError: the data, the model, the folder's state or the recipe cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        us: Processes,
        resume: bool = False,
        workers: int = 0,
        save_every: int = 0,
        log_every: int = 10,
    ):
        self.recipe, self.out, self.us = recipe, Path(out), us
        self.workers, self.save_every, self.log_every = workers, save_every, log_every
        state = self._read_state(resume)

        pictures, held_out = open_data(recipe.data, recipe.val, recipe.holdout)
        seed_all(recipe.seed, "weights")
        args = {"num_classes": len(pictures.classes), "in_chans": pictures.channels, **recipe.model_args}
        drop_path = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
        self.bare = build(recipe.model, pretrained=recipe.pretrained and not state, **drop_path, **args)
        if getattr(self.bare, "num_frames", 0):
            raise InputError(f"{recipe.model} reads videos; training takes models of pictures")
        if self.bare.num_classes != len(pictures.classes):
            raise InputError(f"num_classes={self.bare.num_classes}, but the data have {len(pictures.classes)} classes")
        if recipe.checkpoint and not state:
            load_checkpoint(self.bare, recipe.checkpoint, adapt=True)
        if recipe.grad_checkpointing:
            self.bare.set_grad_checkpointing()
        self.bare.to(us.device)
        preprocess = preprocess_of(self.bare, args["in_chans"], args.get("img_size"))
        self.card = ModelCard(recipe.model, args, list(pictures.classes), preprocess)

        augment = recipe.augment or ("light" if recipe.data == "digits" else "rand-m9-mstd0.5-inc1")
        self.samples = Samples(pictures, preprocess, preprocess.transform(augment, recipe.erasing), recipe.seed)
        self.held_out = Samples(held_out, preprocess, preprocess.transform())
        self.steps = Steps(len(pictures), recipe.batch, recipe.accumulate, us.count, recipe.seed)
        self.last = recipe.epochs * self.steps.per_epoch

        self.mixup, self.criterion = None, nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(pictures.classes)
            )
            self.criterion = SoftTargetCrossEntropy()
        self.optimizer = create_optimizer_v2(
            self.bare, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            "cosine",
            num_epochs=recipe.epochs,
            warmup_epochs=min(recipe.warmup, recipe.epochs),
            warmup_lr=0.0,
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps.per_epoch,
        )
        self.ema = ModelEmaV3(self.bare, recipe.ema, use_warmup=True) if recipe.ema else None

        self.step = 0
        self.best = -1.0
        self.seconds = 0.0  # of training, in all processes that this run has had
        self.loss = torch.zeros((), device=us.device)  # summed since the last row of the log
        self.rows = 0  # steps in that sum
        self.broken: set[str] = set()
        if state:
            self._restore(state)
        self.model = self.bare
        if us.count > 1:
            self.model = DistributedDataParallel(self.bare, [us.device] if us.device.type == "cuda" else None)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Scores:
        """Trains to the end of the recipe; returns the held-out scores of the last epoch."""
        if self.us.first:
            self._describe()
            sweep(self.out)
        log = Log(self.out, self.step) if self.us.first else None
        pin = self.us.device.type == "cuda"
        batches = iter(
            training_batches(self.samples, self.steps, self.us.rank, self.step, self.last, self.workers, pin)
        )
        scores = None
        started = time.monotonic() - self.seconds
        self.model.train()
        try:
            with progress_bar("training", self.last, self.step, show=self.us.first) as advance:
                while self.step < self.last:
                    self.take_step(batches)
                    self.seconds = time.monotonic() - started
                    end_of_epoch = self.step % self.steps.per_epoch == 0
                    if end_of_epoch or self.step % self.log_every == 0:
                        loss = self._mean_loss()
                        if log:
                            log.write(**self._when(), lr=self.lr, loss=loss, seconds=self.seconds)
                        advance(0, f"epoch {self.epoch}/{self.recipe.epochs}  loss {loss:.3f}")
                    if end_of_epoch:
                        scores = self.evaluate()
                        self.seconds = time.monotonic() - started
                        if log:
                            self._report(log, scores)
                    if end_of_epoch or (self.save_every and self.step % self.save_every == 0):
                        self.save()
                    advance()
        finally:
            self.model = self.bare  # the wrapper must be gone before its process group: some exits crash otherwise
            if log:
                log.close()
        if scores is None:  # resumed after its last step
            scores = self.evaluate()
        return scores

    def take_step(self, batches) -> None:
        """One step of the optimiser, from the next `accumulate` batches."""
        recipe, us = self.recipe, self.us
        self.scheduler.step_update(self.step)
        for part in range(recipe.accumulate):
            images, labels = self._mend(*next(batches))
            images, labels = images.to(us.device, non_blocking=True), labels.to(us.device, non_blocking=True)
            seed_all(recipe.seed, "step", self.step, us.rank, part)
            if self.mixup:
                images, labels = self.mixup(images, labels)
            alone = us.count > 1 and part + 1 < recipe.accumulate
            with self.model.no_sync() if alone else nullcontext():
                with precision(us.device, torch.bfloat16 if recipe.bf16 else torch.float32):
                    logits = self.model(images)
                loss = self.criterion(logits.float(), labels) / recipe.accumulate
                loss.backward()
            self.loss += loss.detach()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.bare.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.rows += 1
        if self.ema:
            self.ema.update(self.bare, step=self.step)

    def evaluate(self) -> Scores:
        """Held-out scores of the weights as they would be used."""
        samples, us = self.held_out, self.us
        workers = min(self.workers, 1 + len(samples) // self.recipe.batch)
        batches = evaluation_batches(samples, self.recipe.batch, us.rank, us.count, workers)
        scores = score(self.weights, batches, us)
        self._name_broken([samples.images.names[i] for i in scores.broken])
        return scores

    @property
    def weights(self) -> nn.Module:
        """The model as it would be used: the moving average where one is kept."""
        return self.ema.module if self.ema else self.bare

    @property
    def epoch(self) -> int:
        """The number of the epoch that the last step belonged to, from 1."""
        return max(self.step - 1, 0) // self.steps.per_epoch + 1

    @property
    def lr(self) -> float:
        """The learning rate of the last step (of the layer nearest to the output)."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _when(self) -> dict[str, int]:
        return {"step": self.step, "epoch": self.epoch}

    def _mean_loss(self) -> float:
        """The mean loss since the last call, over all processes."""
        loss = self.us.sum(self.loss.clone()).item() / (self.rows * self.us.count)
        self._check(loss)
        self.loss.zero_()
        self.rows = 0
        return loss

    def _check(self, loss: float) -> None:
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(
                f"the loss is {loss} after step {self.step}; a lower --lr, a longer --warmup, --clip-grad 1 or no "
                f"--bf16 may help (the last good state is kept in {self.out})"
            )

    def _mend(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Broken pictures' places filled with others of the batch; their names said once."""
        readable = labels >= 0
        if readable.all():
            return images, labels
        self._name_broken([self.samples.images.names[i] for i in indices[~readable].tolist()])
        if not readable.any():
            raise InputError("a whole batch of pictures cannot be read; the first: " + min(self.broken))
        good = readable.nonzero()[:, 0]
        source = torch.arange(len(labels))
        source[~readable] = good[torch.arange(int((~readable).sum())) % len(good)]
        return images[source], labels[source]

    def _name_broken(self, names: list[str]) -> None:
        for name in names:
            if name not in self.broken:
                say(("left out", "yellow"), f" {name}: not an image, or damaged")
        self.broken |= set(names)

    # -- what is written --------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        recipe, us = self.recipe, self.us
        count = sum(p.numel() for p in self.bare.parameters())
        say(
            (recipe.model, "bold"),
            f"  {count / 1e6:.2f} M parameters, {len(self.card.classes)} classes, "
            f"{len(self.samples)} pictures to learn from, {len(self.held_out)} held out",
        )
        say(
            f"{recipe.epochs} epochs of {self.steps.per_epoch} steps of {self.steps.per_step} pictures on "
            f"{us.count} x {us.device}" + (f", from step {self.step}" if self.step else "") + f", into {self.out}"
        )
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic(self.out / "recipe.json") as file:
            file.write(json.dumps(asdict(recipe), indent=2).encode() + b"\n")

    def _report(self, log: Log, scores: Scores) -> None:
        """The end of an epoch: a row, a line, and the weights for use."""
        log.write(
            **self._when(), val_loss=scores.loss, val_top1=scores.top1, val_top5=scores.top5, seconds=self.seconds
        )
        say(
            f"epoch {self.epoch:>3}/{self.recipe.epochs}  held out: loss {scores.loss:.3f}, top-1 {scores.top1:.2f} %  "
            f"({self.seconds:.0f} s)"
        )
        trained = {**self._when(), "val_top1": scores.top1, "val_loss": scores.loss}
        card = ModelCard(self.card.model, self.card.args, self.card.classes, self.card.preprocess, trained)
        save_model(self.out / "model.safetensors", self.weights, card)
        if scores.top1 > self.best:
            self.best = scores.top1
            save_model(self.out / "best.safetensors", self.weights, card)

    def save(self) -> None:
        """Writes state.pt."""
        self._check(self.us.sum(self.loss.clone()).item())
        if not self.us.first:
            return
        state = {
            "recipe": asdict(self.recipe),
            "steps": asdict(self.steps),
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "loss": self.loss,
            "rows": self.rows,
            "model": self.bare.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic(self.out / "state.pt") as file:
            torch.save(state, file)

    def _read_state(self, resume: bool) -> dict | None:
        path = self.out / "state.pt"
        if not path.exists():
            return None
        if not resume:
            raise InputError(f"{self.out} already holds a run; --resume goes on with it, another --out starts anew")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = state["recipe"]
        except Exception:
            raise CheckpointError(f"{path} is not the state of a run, or is damaged") from None
        now = json.loads(json.dumps(asdict(self.recipe)))
        for name in now:
            if before.get(name) != now[name]:
                raise InputError(
                    f"{self.out} is a run with {name}={before.get(name)}, not {now[name]}; --resume goes on with a "
                    "run as it is (--checkpoint starts a new one from its weights)"
                )
        return state

    def _restore(self, state: dict) -> None:
        if state["steps"] != asdict(self.steps):
            name, now = next((k, v) for k, v in asdict(self.steps).items() if state["steps"].get(k) != v)
            raise InputError(
                f"{self.out} is a run with {name}={state['steps'].get(name)}, not {now}; its steps would differ"
            )
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.step, self.best, self.seconds, self.rows = (state[k] for k in ("step", "best", "seconds", "rows"))
        self.loss = state["loss"].to(self.us.device)


def train(recipe: Recipe, out: str | Path, *, device: str | None = None, **options) -> Scores:
    """Runs `recipe` in the folder `out`, alone or as one of torchrun's processes; returns the held-out scores.

    Args:
        device: by default CUDA where there is one.
        options: `resume`, `workers`, `save_every`, `log_every` of `Training`.

    Raises:
        InputError, CheckpointError: something given cannot be used.
        Diverged: the loss is no longer a number.
    """
    with processes(device) as us:
        return Training(recipe, out, us, **options).run()
