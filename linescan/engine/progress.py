"""What is shown during long work: lines and progress bars.

A line is made of parts: plain strings, and (text, style) pairs such as `("skipped", "yellow")`. No text is ever read as
markup, and control characters are shown as escapes, so that file names and messages from anywhere can be parts.
"""

from contextlib import contextmanager
from typing import Any, Callable, Iterator

from rich.console import Console as RichConsole
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import visible

__all__ = ["console", "out", "progress_bar", "say", "show", "show_table", "styled"]

Part = str | tuple[str, str]


class Console(RichConsole):
    """A console that prints text as it is, and leaves a closed pipe to its caller."""

    def __init__(self, stderr: bool = False, width: int | None = None):
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise  # rich would end the process


console, out = Console(stderr=True), Console()


def styled(*parts: Part) -> Text:
    """The text that the parts make."""
    pairs = ((part, "") if isinstance(part, str) else part for part in parts)
    return Text.assemble(*((visible(text), style) for text, style in pairs))


def say(*parts: Part) -> None:
    """Prints a line of news on stderr, however long it is."""
    console.print(styled(*parts), soft_wrap=True)


def show(*parts: Part) -> None:
    """Prints a line of results on stdout; while a progress bar is on the same terminal, above it."""
    (console if console.is_terminal and out.is_terminal else out).print(styled(*parts), soft_wrap=True)


def show_table(table: Table) -> None:
    """Prints a table on stdout, as wide as its cells are: no cell is cut, whatever the width of the terminal."""
    needed = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    Console(width=max(out.width, needed)).print(table, crop=False)


@contextmanager
def progress_bar(description: str, total: int, done: int = 0, show: bool = True) -> Iterator[Callable[..., Any]]:
    """A bar on the terminal; yields `advance(n=1, description=None, total=None)`; a new total replaces the first.

    Silent where stderr is not a terminal."""
    if not (show and console.is_terminal):  # a disabled bar of rich 13 and 14 still ends in an empty line
        yield lambda *args, **kwargs: None
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("<"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, redirect_stdout=out.is_terminal) as progress:
        task = progress.add_task(visible(description), total=total, completed=done)

        def advance(n: float = 1, description: str | None = None, total: int | None = None) -> None:
            text = None if description is None else visible(description)
            progress.update(task, advance=n, description=text, total=total)

        yield advance
