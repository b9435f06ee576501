"""Pictures as batches of tensors.

Nothing here remembers anything. Which pictures step s sees is a function of (seed, s), and how each is cropped,
coloured and erased a function of (seed, epoch, picture). Training can therefore stop and go on at any step, with any
number of loader processes, and see exactly what it would have seen.
"""

import random
from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import BrokenImage
from ..media.preprocess import Preprocess
from .image_sets import ImageSet

__all__ = ["Preprocess", "seed_all", "Steps", "Samples", "training_batches", "evaluation_batches"]


def seed_all(seed: int, purpose: str, *key: int) -> None:
    """Seeds Python, NumPy and torch from what is about to be done; any other purpose or key gives other numbers."""
    seed = int(np.random.SeedSequence((seed, *purpose.encode(), *key)).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


@dataclass(frozen=True)
class Steps:
    """Which pictures each step of training sees.

    The pictures are shuffled anew each epoch; the last step of an epoch is filled up with some of its first ones.

    Attributes:
        pictures: how many there are.
        batch: pictures in one forward pass of one process.
        accumulate: forward passes in one step.
        processes: how many work together.
        seed: of the shuffling.
    """

    pictures: int
    batch: int
    accumulate: int
    processes: int
    seed: int

    @property
    def per_step(self) -> int:
        """Pictures of one optimiser step, over all processes."""
        return self.batch * self.accumulate * self.processes

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        return -(-self.pictures // self.per_step)

    def order(self, epoch: int) -> np.ndarray:
        """The pictures of an epoch in order, (per_epoch * per_step,)."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.pictures)
        return np.resize(order, self.per_epoch * self.per_step)

    def batches(self, rank: int, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of one process from step `start` to `stop`, `accumulate` a step, as (epoch, picture) pairs."""
        order, shuffled = None, None
        for step in range(start, stop):
            epoch, position = divmod(step, self.per_epoch)
            if epoch != shuffled:
                order, shuffled = self.order(epoch).reshape(self.per_epoch, self.accumulate, self.processes, -1), epoch
            for batch in order[position, :, rank]:
                yield [(epoch, int(i)) for i in batch]


class Samples(Dataset):
    """An image set as tensors: item (epoch, index) -> (tensor (C, H, W), label, index).

    A broken picture comes as zeros with the label -1.
    """

    def __init__(self, images: ImageSet, preprocess: Preprocess, transform, seed: int | None = None):
        self.images, self.preprocess, self.transform, self.seed = images, preprocess, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        try:
            image = self.images.image(index, self.preprocess.channels)
        except BrokenImage:
            return torch.zeros(self.preprocess.size), -1, index
        if self.seed is not None:
            seed_all(self.seed, "picture", epoch, index)
        return self.transform(image), self.images.labels[index], index


class _Batches(Sampler):
    def __init__(self, generate, length: int):
        self.generate, self.length = generate, length

    def __iter__(self):
        return self.generate()

    def __len__(self) -> int:
        return self.length


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _loader(samples: Samples, batches: _Batches, workers: int, pin: bool) -> DataLoader:
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=_one_thread)


def training_batches(
    samples: Samples, steps: Steps, rank: int, start: int, stop: int, workers: int = 0, pin: bool = False
) -> DataLoader:
    """All batches of one process from step `start` to step `stop`: images (B, C, H, W), labels (B,), indices (B,)."""
    length = (stop - start) * steps.accumulate
    return _loader(samples, _Batches(lambda: steps.batches(rank, start, stop), length), workers, pin)


def evaluation_batches(
    samples: Samples, batch: int, rank: int = 0, processes: int = 1, workers: int = 0, pin: bool = False
) -> DataLoader:
    """Every picture once, shared out among the processes."""
    mine = range(rank, len(samples), processes)
    chunks = [[(0, i) for i in mine[at : at + batch]] for at in range(0, len(mine), batch)]
    return _loader(samples, _Batches(lambda: iter(chunks), len(chunks)), workers, pin)
