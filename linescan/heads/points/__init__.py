"""Whole networks over point clouds; importing this package registers its models."""

from . import detector, mae, parts  # noqa: F401
