"""Samples in batches, in an order that is a function of the step.

Nothing here remembers anything. Which samples step s sees is a function of (seed, s), and what is random about each of
them a function of (seed, epoch, place in the epoch). Training can therefore stop and continue at any step, with any
number of loader processes, and see exactly what it would have seen.

A data set is any `torch.utils.data.Dataset` with indices. It may also have

    collate(samples)     -> batch; by default `torch.utils.data.default_collate`
    order(generator)     -> the indices of one epoch, of the same number in each; by default every index once, shuffled
    in_memory            True where reading takes no time, so that no loader processes are needed

and raises InputError for a sample that cannot be read. Samples and batches are tensors in dicts, tuples and lists.
Before each sample the attribute `epoch` of the data set is set, for data that change in the course of a run.
"""

import random
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import InputError

__all__ = [
    "Batch",
    "BatchReader",
    "Steps",
    "evaluation_batches",
    "seed_all",
    "steps_of",
    "to_device",
    "training_batches",
]


def seed_all(seed: int, purpose: str, *key: int, device: torch.device = torch.device("cpu")) -> None:
    """Seeds Python, NumPy and torch from what is about to be done; any other purpose or key gives other numbers.

    Torch is seeded on the CPU and on `device`, the current one of its type.
    """
    seed = int(np.random.SeedSequence((seed, *purpose.encode(), *key)).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)  # a sample cannot wait for torch.manual_seed, which takes 1 ms
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed % 2**63)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same dicts, tuples and lists, with every tensor on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


# -- order -------------------------------------------------------------------------------------------------------------

Key = tuple[int, int, int]
"""(epoch, place in the epoch, index) of a sample."""


def shuffled(samples: int) -> Callable[[np.random.Generator], Sequence[int]]:
    """The order of an epoch that has every sample once."""
    return lambda generator: generator.permutation(samples)


@dataclass(frozen=True)
class Steps:
    """Which samples each step of training sees.

    The order is drawn anew for each epoch; the last step of an epoch is filled up with some of its first samples.

    Attributes:
        samples: in an epoch.
        batch: samples in one forward pass of one process.
        accumulate: forward passes in one step.
        processes: how many work together.
        seed: of the order.
        draw: generator -> the indices of an epoch in order, `samples` of them; None for a permutation.
    """

    samples: int
    batch: int
    accumulate: int
    processes: int
    seed: int
    draw: Callable[[np.random.Generator], Sequence[int]] | None = field(default=None, compare=False, repr=False)

    @property
    def per_step(self) -> int:
        """Samples of one optimiser step, over all processes."""
        return self.batch * self.accumulate * self.processes

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        return -(-self.samples // self.per_step)

    @property
    def facts(self) -> dict[str, int]:
        """All that the order depends on, beside the data."""
        names = ("samples", "batch", "accumulate", "processes", "seed")
        return {name: getattr(self, name) for name in names}

    def order(self, epoch: int) -> np.ndarray:
        """The keys of an epoch in order, (per_epoch * per_step, 3)."""
        indices = (self.draw or shuffled(self.samples))(np.random.default_rng((self.seed, epoch)))
        places = np.arange(self.per_epoch * self.per_step)
        return np.stack([np.full_like(places, epoch), places, np.resize(np.asarray(indices), places.size)], axis=1)

    def batches(self, rank: int, start: int, stop: int) -> Iterator[list[Key]]:
        """The batches of one process from step `start` to `stop`, `accumulate` per step."""
        order, drawn = None, None
        for step in range(start, stop):
            epoch, position = divmod(step, self.per_epoch)
            if epoch != drawn:
                shape = (self.per_epoch, self.accumulate, self.processes, self.batch, 3)
                order, drawn = self.order(epoch).reshape(shape), epoch
            for batch in order[position, :, rank]:
                yield [tuple(key) for key in batch.tolist()]


def steps_of(data: Dataset, batch: int, accumulate: int, processes: int, seed: int) -> Steps:
    """The steps over a data set, in its own order if it has one."""
    draw = getattr(data, "order", None)
    samples = len(draw(np.random.default_rng((seed, 0)))) if draw else len(data)
    return Steps(samples, batch, accumulate, processes, seed, draw)


# -- loading -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A batch: what `collate` made of it, of how many samples, and a message for each sample that cannot be read.

    In training the places of broken samples are taken by others, so that the size is always the same; in evaluation
    they are left out. A size of 0 means that there was nothing to take.
    """

    content: Any
    size: int
    broken: list[str]


class BatchReader(Dataset):
    """A data set as a loader reads it: a list of keys in, a `Batch` out.

    Args:
        data: the data set.
        seed: of what is random in its samples.
        purpose: "train" or "evaluate"; each has random numbers of its own.
    """

    def __init__(self, data: Dataset, seed: int, purpose: str):
        self.data, self.seed, self.purpose = data, seed, purpose

    def __len__(self) -> int:
        return len(self.data)

    def read(self, key: Key, broken: list[str]) -> Any:
        """One sample, or None if it cannot be read; then why is added to `broken`."""
        epoch, place, index = key
        self.data.epoch = epoch  # type: ignore[attr-defined]
        seed_all(self.seed, self.purpose, epoch, place)
        try:
            return self.data[index]
        except InputError as error:
            broken.append(str(error))
            return None

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """A batch. Where all of it is broken, training takes the next sample of the data that is not."""
        broken: list[str] = []
        samples = [self.read(key, broken) for key in keys]
        good = [sample for sample in samples if sample is not None]
        if self.purpose == "train" and broken:
            epoch, place, index = keys[0]
            following = ((epoch, place, (index + i) % len(self.data)) for i in range(1, len(self.data)))
            while not good and (key := next(following, None)):
                good = [sample for sample in [self.read(key, broken)] if sample is not None]
            fill = iter(range(len(keys)))
            good = [s if s is not None else good[next(fill) % len(good)] for s in samples] if good else []
        collate = getattr(self.data, "collate", default_collate)
        return Batch(collate(good) if good else None, len(good), broken)


class _Keys(Sampler):
    def __init__(self, generate: Callable[[], Iterator], length: int):
        self.generate, self.length = generate, length

    def __iter__(self):
        return self.generate()

    def __len__(self) -> int:
        return self.length


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _loader(reader: BatchReader, keys: _Keys, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        reader, batch_sampler=keys, num_workers=workers, pin_memory=pin, worker_init_fn=_one_thread,
        collate_fn=_as_it_is,
    )  # fmt: skip


def training_batches(
    data: Dataset, steps: Steps, rank: int, start: int, stop: int, workers: int = 0, pin: bool = False
) -> DataLoader:
    """All batches of one process from step `start` to step `stop`."""
    length = (stop - start) * steps.accumulate
    keys = _Keys(lambda: steps.batches(rank, start, stop), length)
    return _loader(BatchReader(data, steps.seed, "train"), keys, workers, pin)


def evaluation_batches(
    data: Dataset, batch: int, rank: int = 0, processes: int = 1, workers: int = 0, pin: bool = False
) -> DataLoader:
    """Every sample once, shared out among the processes; what is random in them is always the same."""
    mine = range(rank, len(data), processes)
    chunks = [[(0, i, i) for i in mine[at : at + batch]] for at in range(0, len(mine), batch)]
    return _loader(
        BatchReader(data, 0, "evaluate"), _Keys(lambda: iter(chunks), len(chunks)), min(workers, len(chunks)), pin
    )
