"""Errors that are the caller's to mend."""


class InputError(ValueError):
    """Something given by the user cannot be used; one line says what was wrong and what would be right."""


class BrokenImage(InputError):
    """A file that Pillow cannot read as a picture."""


class BrokenVideo(InputError):
    """A file or folder that cannot be read as a video."""


class Diverged(RuntimeError):
    """Training has come to a loss that is not a number."""
