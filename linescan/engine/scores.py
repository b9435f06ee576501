"""Scores on held-out data: totals over batches and processes, and what is computed from them."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import InputError
from .data import evaluation_batches, to_device
from .processes import Processes

__all__ = ["Evaluation", "Evaluator", "Totals", "evaluate", "expect_readable", "precision"]


class Totals:
    """What scores are computed from: sums and rows, over all batches and all processes.

    totals.add(loss=..., correct=...)             # summed, in float64
    totals.keep(score=..., label=...)             # joined along the first axis, on the CPU

    After `reduce`, `totals["loss"]` is the sum, and `totals["score"]` all rows (in no particular order, but rows of one
    `keep` stay together).
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Adds to the sum of each name; a tensor of any shape, always the same for one name."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def keep(self, **rows: Tensor) -> None:
        """Keeps rows under each name; shapes agree but for the first axis."""
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value.detach().cpu())

    def reduce(self, processes: Processes) -> None:
        """Sums and joins over all processes; every process then has the same."""
        shapes: dict[str, tuple] = {}
        for theirs in processes.share({name: tuple(total.shape) for name, total in self._sums.items()}):
            shapes |= theirs  # a process without a batch has none
        for name in sorted(shapes):
            mine = self._sums.get(name, torch.zeros(shapes[name], dtype=torch.float64))
            self._sums[name] = processes.sum(mine.to(processes.device))
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        joined: dict[str, list[Tensor]] = {}
        for theirs in processes.share(rows):
            for name, part in theirs.items():
                joined.setdefault(name, []).append(part)
        self._rows = {name: [torch.cat(parts)] for name, parts in joined.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The sum, on the CPU, or the rows under this name."""
        return self._sums[name].cpu() if name in self._sums else torch.cat(self._rows[name])


class Evaluator(ABC):
    """Scores models on a held-out set.

    Attributes:
        data: the set; what its items are, `measure` knows.
        names: of the scores, in the order of metrics.csv.
        primary: the score that tells which weights are the best.
        higher: whether more of it is better.
        batch: samples in one forward pass, where it is not for the user to choose.
    """

    data: Dataset
    names: ClassVar[tuple[str, ...]]
    primary: ClassVar[str]
    higher: ClassVar[bool] = True
    batch: int | None = None

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any, totals: Totals) -> None:
        """Adds what a batch contributes to the totals; the model is in evaluation mode, gradients are off."""

    @abstractmethod
    def scores(self, totals: Totals) -> dict[str, float]:
        """The scores, by `names`, from the totals over all batches and processes."""

    def describe(self, scores: dict[str, float]) -> str:
        """The scores as a reader wants them."""
        return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())

    def report(self, totals: Totals, folder: Path, title: str) -> tuple[dict, list[Path]]:
        """Writes more than scores: a page to read, tables for programs.

        Args:
            totals: over all data.
            folder: made if it is missing.
            title: of the page.

        Returns:
            What was found, in JSON's types, and the files.

        Raises:
            InputError: there is no such page for this task.
        """
        raise InputError("there is a page (--out) for classification only")

    def better(self, scores: dict[str, float], best: float | None) -> bool:
        """Whether these scores are better than the best `primary` so far."""
        value = scores[self.primary]
        return value == value and (best is None or (value > best if self.higher else value < best))


class Evaluation(NamedTuple):
    """The scores of a model.

    Attributes:
        scores: by name.
        samples: from how many.
        broken: a message for each sample that this process could not read.
        totals: what the scores are computed from.
    """

    scores: dict[str, float]
    samples: int
    broken: list[str]
    totals: Totals


def precision(device: torch.device, dtype: torch.dtype):
    """Autocast to `dtype` on `device`; nothing for float32.

    Raises:
        InputError: not a floating-point type that autocast knows.
    """
    if dtype == torch.float32:
        return nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"cannot run in {dtype}; supported: float32, bfloat16, float16")
    return torch.autocast(device.type, dtype)


@torch.no_grad()
def evaluate(
    evaluator: Evaluator,
    model: nn.Module,
    processes: Processes,
    *,
    batch: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda samples: None,
) -> Evaluation:
    """Scores `model` on all of the evaluator's data, shared out among the processes; broken samples are left out.

    The model is left in the mode that it came in.

    Args:
        model: on the device of `processes`.
        batch: samples in one forward pass, unless the evaluator says another number.
        workers: processes that load data.
        dtype: of autocast.
        progress: called with the number of samples of each batch.

    Raises:
        InputError: no sample could be read.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    batches = evaluation_batches(
        evaluator.data, evaluator.batch or batch, processes.rank, processes.count, workers,
        pin=processes.device.type == "cuda",
    )  # fmt: skip
    totals, read, broken = Totals(), 0, []
    for content, size, errors in batches:
        broken += errors
        read += size
        if size:
            with precision(processes.device, dtype):
                evaluator.measure(model, to_device(content, processes.device), totals)
        progress(size + len(errors))
    for module, mode in modes:
        module.training = mode
    totals.reduce(processes)
    read = sum(processes.share(read))
    if not read:
        raise _unreadable(evaluator, broken)
    return Evaluation(evaluator.scores(totals), read, broken, totals)


def expect_readable(evaluator: Evaluator) -> None:
    """Reads held-out samples up to the first that can be read: before a training, not after its first epoch.

    Raises:
        InputError: none can be read.
    """
    broken = []
    for index in range(len(evaluator.data)):
        try:
            evaluator.data[index]
            return
        except InputError as error:
            broken.append(str(error))
    raise _unreadable(evaluator, broken)


def _unreadable(evaluator: Evaluator, broken: list[str]) -> InputError:
    first = f"; the first: {broken[0]}" if broken else ""
    return InputError(f"none of the {len(evaluator.data)} held-out samples can be read{first}")
