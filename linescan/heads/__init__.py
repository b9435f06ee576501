"""What turns features into answers; importing this package registers its models."""

from . import segman  # noqa: F401
