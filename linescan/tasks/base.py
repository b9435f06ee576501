"""The training side that all tasks share; their user's side is `linescan.tasks.tool.Tool`."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checkpoint import CheckpointError, load_checkpoint
from ..engine.cards import ModelCard, build, read_card
from ..engine.optimisers import groups_of
from ..engine.recipe import Recipe
from ..engine.scores import Evaluator, Totals

__all__ = ["HeldOutLosses", "Task", "build_model", "load_weights"]


class Task(nn.Module, ABC):
    """What is trained, on what, and how it is scored: all that `linescan.engine.training` must know of a task.

    A task is built from its recipe. Its `__init__` sets `model`, `data` and `evaluator`; `forward` turns a batch into
    losses. Teachers, criteria and other modules that are not trained are attributes like any other: the whole task is
    moved to the device, but only `model` is optimised, averaged, wrapped for several processes, and saved.
    Weights to start from are loaded by `load_weights`, when `__init__` and all else have accepted the recipe and its
    data: nothing is fetched in vain. docs/add-a-task.md builds one.

    Attributes:
        recipe: what a run is asked to do.
        losses: names of the losses that `forward` returns, as columns of metrics.csv; "loss" first, the one that is
            minimised.
        unit: what a sample is called in messages.
        listed: the zoo's name of the task, for those whose models are all of one.
        model: what is trained. Several networks are one module that holds them.
        data: the training set; see `linescan.engine.data` for what it may have beside items.
        evaluator: the held-out set and its scores.
        step: how many steps were taken before that of `forward`, for losses that change in the course of a run.
    """

    losses: ClassVar[tuple[str, ...]] = ("loss",)
    unit: ClassVar[str] = "samples"
    listed: ClassVar[str]

    recipe: Recipe
    model: nn.Module
    data: Dataset
    evaluator: Evaluator
    step: int = 0

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe

    @classmethod
    def resolve(cls, recipe: Recipe) -> Recipe:
        """The recipe, complete: with the model, and its arguments, that the card of its checkpoint names.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is one of another model.
        """
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        if card is None:
            return replace(recipe, model=recipe.model or recipe.default_model)
        if recipe.model and recipe.model.partition(".")[0] != card.model.partition(".")[0]:
            raise CheckpointError(f"{recipe.checkpoint} is a checkpoint of {card.model}, not of {recipe.model}")
        if card.quantised:
            raise CheckpointError(f"{recipe.checkpoint} is quantised; training starts from weights that are not")
        args = {name: value for name, value in card.args.items() if name not in ("num_classes", "in_chans")}
        return replace(recipe, model=recipe.model or card.model, model_args=args | recipe.model_args)

    def load_weights(self) -> None:
        """Loads the weights that the recipe starts from.

        Raises:
            InputError, CheckpointError: they cannot be had, or are not the model's.
        """
        load_weights(self.product(self.model), self.recipe, self.card().args)

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The losses of a batch, by `losses`, and the model's `output`; each loss is a mean over the samples.

        Args:
            model: `self.model`, wrapped for several processes, or its moving average.
            batch: what the data set's samples were collated to, on the device. Random numbers are seeded by the step.
        """

    def product(self, model: nn.Module) -> nn.Module:
        """What is saved for use, out of `self.model` or its moving average."""
        return model

    @abstractmethod
    def card(self) -> ModelCard:
        """What the saved file says of itself."""

    def parameter_groups(self) -> list[dict]:
        """Groups of parameters for the optimiser; each may have a `weight_decay` and an `lr_scale`."""
        return groups_of(self.recipe, self.model)

    def checkpoint_gradients(self) -> None:
        """Makes `model` recompute activations in the backward pass, for `--grad-checkpointing`."""
        self.model.set_grad_checkpointing()

    @classmethod
    def judge(cls, recipe: Recipe, model: nn.Module, card: ModelCard) -> Evaluator:
        """What scores a finished model on `recipe.data`, for `linescan evaluate`; for recipes that say `judges`.

        Args:
            recipe: of which only the fields with `scoring` count, `data` and `batch`.
            model, card: what was trained, and how it wants its samples.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """What is trained on, in a few words."""
        return f"{len(self.data)} {self.unit} to train on, {len(self.evaluator.data)} held out"


class HeldOutLosses(Evaluator):
    """The task's own losses on held-out data, where nothing better can be measured.

    Args:
        task: the task.
        data: the held-out set.
    """

    primary = "loss"
    higher = False

    def __init__(self, task: Task, data: Dataset):
        self.task, self.data = task, data
        self.names = task.losses

    def measure(self, model: nn.Module, batch: Any, totals: Totals) -> None:
        result = self.task(model, batch)
        size = len(result["output"])
        totals.add(samples=size, **{name: result[name].double() * size for name in self.names})

    def scores(self, totals: Totals) -> dict[str, float]:
        return {name: (totals[name] / totals["samples"]).item() for name in self.names}


def build_model(recipe: Recipe, **args) -> nn.Module:
    """The recipe's model, without weights (`load_weights`); `recipe.model_args` override `args`.

    Raises:
        InputError: it cannot be built so.
    """
    drop_path = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    return build(recipe.model, **{**drop_path, **args, **recipe.model_args})


def load_weights(model: nn.Module, recipe: Recipe, args: dict) -> None:
    """Loads the published weights or the checkpoint, as the recipe says, into its model.

    Args:
        model: the recipe's.
        recipe: what to start from.
        args: that build the model.

    Raises:
        InputError, CheckpointError: the weights cannot be had, or are not the model's.
    """
    if recipe.pretrained:
        model.load_state_dict(build(recipe.model, pretrained=True, **args).state_dict())
    if recipe.checkpoint:
        load_checkpoint(model, recipe.checkpoint, adapt=True)
