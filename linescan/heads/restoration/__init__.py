"""Image restoration: whole networks, images in and images out, which share the frame of `frame.py`."""

from . import mambair, mambair_v2  # noqa: F401
