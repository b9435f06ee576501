"""Optimisers and schedules of the learning rate, by their names in timm."""

from difflib import get_close_matches

import timm
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError
from .recipe import Recipe

__all__ = ["build_optimizer", "build_schedule", "groups_of"]


def groups_of(recipe: Recipe, module: nn.Module, by_layer: bool = True) -> list[dict]:
    """The parameters of `module` that want gradients, in groups by weight decay and by layer, as timm has them.

    Vectors and what the module's `no_weight_decay` names are not decayed; layers are those of its `group_matcher`, for
    `--layer-decay`, if `by_layer`.
    """
    skip = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
    if recipe.layer_decay is None or not by_layer:
        return param_groups_weight_decay(module, recipe.weight_decay, no_weight_decay_list=skip)
    return param_groups_layer_decay(
        module, recipe.weight_decay, no_weight_decay_list=skip, layer_decay=recipe.layer_decay
    )


def build_optimizer(recipe: Recipe, groups: list[dict]) -> Optimizer:
    """The recipe's optimiser.

    Args:
        groups: of parameters; each may have a `weight_decay`, and an `lr_scale` that multiplies the learning rate.

    Raises:
        InputError: no such optimiser, or one that cannot be used here.
    """
    name = recipe.optimizer.lower()
    known = list_optimizers()
    if name.removeprefix("lookahead_") not in known:
        near = get_close_matches(name, known, 3) or known
        raise InputError(f"--optimizer must be one of timm's, such as {', '.join(near[:8])}, not {recipe.optimizer!r}")
    args = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "momentum": recipe.momentum}
    if recipe.betas:
        args["betas"] = recipe.betas
    try:
        optimizer = create_optimizer_v2(groups, name, **args)
    except Exception as error:  # constructors of 80 optimisers raise anything; some need packages of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--optimizer {recipe.optimizer} cannot be used: {reason}") from error
    if recipe.betas and "betas" not in optimizer.param_groups[0]:  # timm drops them in silence
        raise InputError(f"--optimizer {recipe.optimizer} has no --betas")
    return optimizer


class Bent:
    """A schedule that after its warm-up stands still for some steps, or falls and rises in turn.

    Args:
        schedule: of what is left of the run, or of the first fall.
        warmup: its steps.
        hold: steps to stand still for.
        period: steps of a fall with its warm-up, and of a rise; None for one fall.
    """

    def __init__(self, schedule: Scheduler, warmup: int, hold: int, period: int | None):
        self.schedule, self.warmup, self.hold, self.period = schedule, warmup, hold, period

    def step_update(self, step: int) -> None:
        if step >= self.warmup:
            step -= self.hold
            if self.period:
                step = abs((step + self.period) % (2 * self.period) - self.period)  # back and forth over the fall
            step = max(step, self.warmup)
        self.schedule.step_update(step)


def build_schedule(recipe: Recipe, optimizer: Optimizer, per_epoch: int) -> Scheduler | Bent:
    """The recipe's schedule: `step_update(step)` sets the learning rates of a step, a function of its number alone.

    Args:
        per_epoch: steps in an epoch.

    Raises:
        InputError: durations that do not fit into the run, or a schedule that the installed timm is too old for.
    """
    total, unit = (recipe.steps, 1) if recipe.steps else (recipe.epochs, per_epoch)
    name, args = recipe.schedule, {}
    warmup, falling = min(recipe.warmup, total), (recipe.period or total) - recipe.hold
    if recipe.hold and warmup >= falling:
        raise InputError(f"--hold {recipe.hold:g} leaves nothing of {total} for the learning rate to fall in")
    if recipe.period and warmup >= falling:
        raise InputError(f"--period {recipe.period:g} must be longer than --warmup {warmup:g}")
    if name == "constant":
        name, args = "step", {"decay_rate": 1.0, "decay_epochs": total}
    elif name == "step":
        args = {"decay_rate": recipe.decay_rate or 0.1, "decay_epochs": recipe.decay_every}
    elif name == "multistep":
        args = {
            "decay_rate": recipe.decay_rate or 0.1,
            "decay_milestones": [fall + 0.5 / unit for fall in recipe.falls],
        }
        # timm's falls one step before a milestone; half a step later is the step that was asked for
    elif name == "poly":
        args = {"decay_rate": recipe.decay_rate or 1.0}
    try:
        schedule, _ = create_scheduler_v2(
            optimizer, name, num_epochs=falling, warmup_epochs=warmup, warmup_lr=0.0,
            min_lr=recipe.lowest_lr, step_on_epochs=False, updates_per_epoch=unit, **args,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"--schedule {recipe.schedule}: {error}") from None
    if schedule is None:
        raise InputError(f"timm {timm.__version__} has no --schedule {name}: `pip install -U timm` brings it")
    if not (recipe.hold or recipe.period):
        return schedule
    period = max(round(recipe.period * unit), 1) if recipe.period else None
    return Bent(schedule, round(warmup * unit), round(recipe.hold * unit), period)
