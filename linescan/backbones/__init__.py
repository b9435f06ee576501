"""Backbones, one file a system; importing this package registers them all with timm."""

from . import videomamba, vig, vim, vmamba  # noqa: F401
    videomamba,
    vim,
    vmamba,
)
