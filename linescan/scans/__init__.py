"""Scans: routes over grids and points, and the linear recurrences that read through them. Needs torch alone."""

