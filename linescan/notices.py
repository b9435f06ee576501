"""Lines that tell the user something beside a function's result: a licence, a classifier that a file's weights lack.

They go to stderr, unless a front end shows them in its own way (`show_notices_with`).
"""

import sys
from typing import Callable

__all__ = ["notice", "show_notices_with"]


def _to_stderr(line: str, loud: bool) -> None:
    print(("WARNING: " if loud else "") + line, file=sys.stderr)


_show: Callable[[str, bool], None] = _to_stderr


def notice(line: str, loud: bool = False) -> None:
    """Shows one line of plain text; `loud` where the user may have to act on it."""
    _show(line, loud)


def show_notices_with(show: Callable[[str, bool], None] | None) -> None:
    """From now on `notice` calls `show(line, loud)`; None restores plain lines on stderr.

    The line is plain text from any source: a front end must not read it as markup.
    """
    global _show
    _show = show or _to_stderr
