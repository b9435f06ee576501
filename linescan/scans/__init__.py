"""Scans: routes over grids and points, and the linear recurrences that read through them. Needs torch alone."""

from . import routes
from .causal_conv import causal_conv1d
from .recurrence import backend, recurrences
from .selective_scan import selective_scan

__all__ = ["backend", "causal_conv1d", "recurrences", "routes", "selective_scan"]
