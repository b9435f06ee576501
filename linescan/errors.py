"""Errors that the user can fix, and how text from outside is shown."""

import re

__all__ = [
    "BrokenCloud",
    "BrokenImage",
    "BrokenVideo",
    "CheckpointError",
    "CommandError",
    "DamagedVideo",
    "Diverged",
    "InputError",
    "known",
    "one_line",
    "visible",
]


class InputError(ValueError):
    """Something given by the user cannot be used; one line says what was wrong and what would be right."""


class CommandError(InputError):
    """What is wrong with every input alike, such as windows that the model cannot read: a batch ends with it."""


class BrokenImage(InputError):
    """A file that cannot be read as an image."""


class BrokenVideo(InputError):
    """A file or folder that cannot be read as a video."""


class DamagedVideo(UserWarning):
    """A warning: a video is read in part, for its file is cut short or damaged; it says how many frames there are."""


class BrokenCloud(InputError):
    """A file that cannot be read as a cloud of points."""


class CheckpointError(RuntimeError):
    """A file that is not a readable checkpoint, or not one of the model it is loaded into; one line says why."""


class Diverged(RuntimeError):
    """The loss of a training is no longer a number."""


# Control characters, line and paragraph separators, marks that turn the direction of text, undecodable bytes.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with the characters that a terminal would obey, instead of showing them, as escapes: one line.

    Bytes of a file name that are no text (surrogates in Python) are shown as `\\xe9`.
    """
    return _INVISIBLE.sub(_escape, text)


def one_line(text: object, longest: int = 160) -> str:
    """Text from outside, or an error about it, as one line of at most so many characters; an error's type if empty."""
    line = visible(" ".join(str(text).split())) or type(text).__name__
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _escape(found: re.Match) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else found[0].encode("unicode_escape").decode()


def known(what: str, value, choices):
    """`value`, if it is one of `choices`.

    Raises:
        InputError: it is not; one line says what there is.
    """
    if value not in choices:
        raise InputError(f"{what} is one of {', '.join(map(repr, choices))}, not {value!r}")
    return value
