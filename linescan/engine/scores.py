"""Accuracy on a labelled set."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import InputError
from .processes import Processes

__all__ = ["Scores", "score", "precision"]


@dataclass(frozen=True)
class Scores:
    """How a model does on a labelled set.

    Attributes:
        loss: mean cross entropy.
        top1, top5: accuracy in per cent; `top5` counts the first five guesses (all of them, where there are fewer).
        images: how many were judged.
        broken: the pictures that could not be read, and were not (those of this process).
    """

    loss: float
    top1: float
    top5: float
    images: int
    broken: tuple[int, ...] = ()


def precision(device: torch.device, dtype: torch.dtype):
    """Autocast to `dtype` on `device`; nothing for float32.

    Raises:
        InputError: not a floating-point type that autocast knows.
    """
    if dtype == torch.float32:
        return nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"cannot run in {dtype}; float32, bfloat16 and float16 can be had")
    return torch.autocast(device.type, dtype)


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable,
    processes: Processes,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Scores `model` on `batches` of (images, labels, indices) over all processes; label -1 is a broken picture.

    Raises:
        InputError: no picture could be read.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(4, dtype=torch.float64, device=processes.device)  # loss, first, among five, images
    broken = []
    for images, labels, indices in batches:
        images, labels = images.to(processes.device), labels.to(processes.device)
        readable = labels >= 0
        broken += indices[~readable.to(indices.device)].tolist()
        progress(len(images))
        if not readable.any():
            continue
        with precision(processes.device, dtype):
            logits = model(images[readable])
        logits, labels = logits.float(), labels[readable]
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        total += torch.stack([loss, hits[:, 0].sum(), hits.sum(), readable.sum()]).double()
    model.train(was_training)
    loss, top1, top5, count = processes.sum(total).tolist()
    if not count:
        raise InputError("none of the pictures could be read")
    return Scores(loss / count, 100 * top1 / count, 100 * top5 / count, int(count), tuple(broken))
