"""The last lines of a demo on the terminal: what it has written, and what to try next."""

import os
import shutil
import sys
from pathlib import Path
from typing import Sequence

from ..engine.progress import say

__all__ = ["tell_commands", "tell_files"]


def tell_files(out: Path, files: dict[str, str]) -> None:
    """A line for each file in `out`, with what it holds."""
    for name, what in files.items():
        say("  ", (str(out / name), "bold"), f"  {what}")


def tell_commands(commands: Sequence[str]) -> None:
    """The `linescan` commands to try next, as they can be pasted."""
    command = "linescan" if shutil.which("linescan") else os.path.relpath(Path(sys.executable).parent / "linescan")
    say("What to try next:")
    for line in commands:
        say("  ", (f"{command} {line}", "cyan"))
