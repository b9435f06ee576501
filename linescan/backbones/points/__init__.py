"""Backbones of point clouds, one file a system; importing this package registers them all."""

from . import lion, mamba3d, pointmamba  # noqa: F401
