"""MMEngine trainings that survive `kill -9`: checkpoints that are whole or absent, resumed as if nothing had happened.

    custom_imports = dict(imports=['linescan.openmmlab'])
    default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=50, max_keep_ckpts=2))
    custom_hooks = [dict(type='IterationSeedHook')]

MMEngine's own hook writes in place, points to the new file in place, and removes the old one first; a process killed
among these leaves nothing to resume from, or no best weights.
"""

import pickle
from collections import deque
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, set_random_seed

from ..checkpoint import CheckpointError
from ..engine.atomic import atomic, sweep

__all__ = ["AtomicBackend", "AtomicCheckpointHook", "IterationSeedHook", "load_from_disk", "refuse_pickles"]


class AtomicBackend(LocalBackend):
    """Local files; those written are whole or absent."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes to a file, whose folder is made."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with atomic(filepath) as file:
            file.write(obj)


register_backend("atomic", AtomicBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's, but a process killed at any moment leaves a `last_checkpoint` that names a whole file.

    What is resumed from is read by `load_from_disk`, which runs nothing that a file says.

    Args:
        args, kwargs: of `CheckpointHook`, without `backend_args` and `file_client_args`: files are local.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, backend_args={"backend": "atomic"}, **kwargs)

    def before_run(self, runner) -> None:
        super().before_run(runner)
        refuse_pickles()

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # type: ignore[has-type]  # without a bound: what falls out has to be removed
        if is_main_process() and Path(self.out_dir).is_dir():
            sweep(self.out_dir)

    def _save_checkpoint_with_step(self, runner, step, meta):
        """First the file, then the pointer to it, then the end of older ones."""
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        if self.max_keep_ckpts > 0:
            if step not in self.keep_ckpt_ids:
                self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        with atomic(Path(runner.work_dir) / "last_checkpoint") as file:
            file.write(self.last_ckpt.encode())
        while 0 < self.max_keep_ckpts < len(self.keep_ckpt_ids):
            Path(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids.popleft())).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        """First the best weights and a checkpoint that names them, then the end of those before."""
        before: list[str] = []
        self.file_backend.remove = before.append  # MMEngine removes them first
        super()._save_best_checkpoint(runner, metrics)
        del self.file_backend.remove
        best = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
        for path in set(before) - best:
            Path(path).unlink(missing_ok=True)


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Chance in iteration i (dropout, sampling of proposals) depends on the run's seed and on i alone.

    With data whose order is seeded (`InfiniteSampler`) and whose pipeline leaves nothing to chance, a training that was
    resumed takes the very steps of one that never stopped.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        set_random_seed(runner.seed + runner.iter)


# -- reading ----------------------------------------------------------------------------------------------------------


def _statistic(owner: object, name: str):
    """Stands for `getattr` in a checkpoint: the log's buffers refer to their class's methods, nothing else may."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"attribute {name} of {owner}")
    return getattr(owner, name)


NUMBERS = "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]

# What MMEngine saves of a training beside tensors: the log, in numpy arrays, and scores as numpy's numbers.
TRUSTED = [
    HistoryBuffer, (_statistic, "builtins.getattr"), np.ndarray, np.dtype, *{type(np.dtype(code)) for code in NUMBERS},
    np._core.multiarray._reconstruct, np._core.multiarray.scalar,  # type: ignore[attr-defined]
]  # fmt: skip


def load_from_disk(filename: str | Path, map_location=None) -> dict:
    """A checkpoint of MMEngine's: tensors, plain values and the log; nothing in the file is run.

    The text of a config (`meta["config"]`) is left out: MMEngine would run it as a program when it resumes.

    Raises:
        CheckpointError: the file is missing or damaged, or holds other objects.
    """
    try:
        with torch.serialization.safe_globals(TRUSTED):
            checkpoint = torch.load(filename, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{filename} does not exist") from None
    except Exception as error:  # a pickle can raise anything; torch's own advice for it is to trust the file
        raise CheckpointError(
            f"{filename} is damaged, or holds other things than tensors and a training's log; refused"
        ) from error
    if isinstance(checkpoint, dict) and isinstance(meta := checkpoint.get("meta"), dict):
        meta.pop("config", None)
    return checkpoint


def refuse_pickles() -> None:
    """From now on MMEngine reads local checkpoints by `load_from_disk`.

    On its own it goes on to unpickle what the restricted reading refuses, which runs whatever the file says.
    """
    CheckpointLoader.register_scheme("", load_from_disk, force=True)
