"""Anomalies: networks that rebuild a frozen teacher's features of normal images, and fail where there is a defect."""

from . import mambaad  # noqa: F401
