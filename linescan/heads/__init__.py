"""What turns features into answers; importing this package registers its models."""

from . import points, restoration, segman  # noqa: F401
