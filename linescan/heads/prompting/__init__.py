"""Segmentation of what points and boxes show: whole networks, an image and prompts in, masks out."""

from . import rwkvsam  # noqa: F401
