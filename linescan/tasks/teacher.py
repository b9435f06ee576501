"""Frozen models that others are trained to match."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.cards import restore
from ..errors import InputError
from ..media.preprocess import Preprocess

__all__ = ["Teacher"]


class Teacher(nn.Module):
    """A model by name or checkpoint: frozen, always in evaluation mode, fed with what a student is fed with.

    Args:
        name: of linescan or timm. Not needed with a checkpoint that linescan has written.
        checkpoint: its weights; without it, the published ones are fetched.
        args: of the model.
        student: how the student wants its images: the teacher wants them normalised otherwise, and of another size.

    Attributes:
        model: the model.
        classes: the names of its classes.
        size: (height, width) that images are resized to.

    Raises:
        InputError, CheckpointError: the model cannot be had, or reads images of other channels.
    """

    def __init__(self, name: str | None, checkpoint: str | Path | None, args: dict, student: Preprocess):
        super().__init__()
        model, card = restore(name, checkpoint, **args)
        own = card.preprocess
        if own.channels != student.channels:
            raise InputError(f"the teacher {card.model} reads {own.channels} channels, the student {student.channels}")
        self.model = model.eval().requires_grad_(False)
        self.classes, self.size = card.classes, own.size[1:]
        mean, std = torch.tensor(student.mean), torch.tensor(student.std)
        other_mean, other_std = torch.tensor(own.mean), torch.tensor(own.std)
        self.register_buffer("scale", std / other_std, persistent=False)
        self.register_buffer("shift", (mean - other_mean) / other_std, persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Images (B, C, H, W) or clips (B, C, T, H, W) of the student -> the same for the teacher, at its size."""
        ones = (1,) * (inputs.ndim - 2)
        inputs = inputs * self.scale.view(-1, *ones) + self.shift.view(-1, *ones)
        if inputs.shape[-2:] == self.size:
            return inputs
        frames = inputs.movedim(1, -3).flatten(0, -4)  # (B or B T, C, H, W)
        frames = F.interpolate(frames, self.size, mode="bicubic", antialias=True)
        return frames.view(inputs.shape[0], *inputs.shape[2:-2], *frames.shape[1:]).movedim(-3, 1)
