"""Boxes around objects in images: whole networks, images and prompts in, boxes out."""

from . import mamba_yolo_world  # noqa: F401
