"""Backbones, one file a system; importing this package registers them all with timm."""

from . import (  # noqa: F401
    localmamba,
    scannet,
    segman,
    videomamba,
    vig,
    vim,
    vision_rwkv,
    vmamba,
)
