"""What turns features into answers; importing this package registers its models."""

from . import restoration, segman  # noqa: F401
