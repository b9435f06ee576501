"""The `linescan` command.

options.py     the application, and the options that several commands share
names.py       names for shell completion
show.py        list, info, doctor, routes
predict.py     classify, segment, detect, prompt, restore, anomaly, change
points.py      points classify, points segment
explain.py     explain
export.py      convert, export, embed
train.py       train, evaluate
measure.py     benchmark, directions
compare.py     compare
quantize.py    quantize
demo.py        demo
"""

import os
import sys
import warnings
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Iterator

import typer

from linescan.engine.progress import say
from linescan.errors import CheckpointError, DamagedVideo, Diverged, InputError, visible
from linescan.notices import show_notices_with

from .options import app

__all__ = ["app", "main"]

# In the order of --help.
for module in ("show", "predict", "points", "explain", "export", "train", "measure", "compare", "quantize", "demo"):
    import_module(f".{module}", __name__)


def main() -> None:
    """Runs the command. What the user can fix is told in one line, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text in the terminal's encoding
    try:
        if sys.stdout is None:
            raise InputError("standard output is closed")
        with _news_as_lines():
            status = app(sys.argv[1:] or ["--help"], prog_name="linescan", standalone_mode=False) or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except SystemExit as exit:  # what the parser makes of a broken pipe is status 1
        status = _complain("standard output was closed before all was written", 2) if exit.code == 1 else exit.code
    except Diverged as error:
        status = _complain(str(error), 1)
    except Exception as error:
        if (line := _fixable(error)) is None:
            raise
        status = _complain(line, 2)
    sys.exit(status)


@contextmanager
def _news_as_lines() -> Iterator[None]:
    """Notices, and warnings about a file of the user, are lines; other warnings are as Python has them."""

    def notice(line: str, loud: bool) -> None:
        say((line, "bold yellow" if loud else ""))

    def warning(message: Warning, category: type[Warning], *where) -> None:
        if issubclass(category, DamagedVideo):
            say(("damaged", "yellow"), f" {message}")
        else:
            plain(message, category, *where)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedVideo)
        plain, warnings.showwarning = warnings.showwarning, warning
        show_notices_with(notice)
        try:
            yield
        finally:
            show_notices_with(None)


def _fixable(error: Exception) -> str | None:
    """One line about an error that the user can fix; None for one that is a bug."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error, FileExistsError):
            reason = "a file of this name is where a folder is needed"
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, MemoryError):
        return "out of memory; a smaller --batch takes less"
    if hasattr(error, "format_message"):  # the command line's parser
        return error.format_message()
    if isinstance(error, (InputError, CheckpointError)):
        return str(error)
    if type(error).__module__ == "torch":  # its own classes are those of devices: out of memory, lost
        return str(error).splitlines()[0]
    return None


def _complain(line: str, status: int) -> int:
    """Prints the line; returns the status."""
    with suppress(OSError, ValueError):
        print(f"linescan: {visible(line.strip())}", file=sys.stderr)
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return status
    with suppress(OSError, ValueError, AttributeError):  # else the interpreter fails at the same text as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
