"""Whole networks over point clouds; importing this package registers its models."""

from . import detector, mae, occupancy, parts  # noqa: F401
