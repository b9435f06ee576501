"""What turns features into answers; importing this package registers its models."""

from . import anomaly, detection, mambafcs, points, prompting, restoration, segman, sigma, unetr, vmunet  # noqa: F401
