"""Backbones, one file a system; importing this package registers them all with timm."""

from . import videomamba, vim  # noqa: F401
