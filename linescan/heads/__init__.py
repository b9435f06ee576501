"""What turns features into answers; importing this package registers its models."""

from . import anomaly, points, restoration, segman  # noqa: F401
