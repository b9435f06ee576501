"""Backbones, one file a system; importing this package registers them all."""

from . import localmamba, mixernet, segman, videomamba, vig, vim, vision_rwkv, vmamba  # noqa: F401
