"""What a person sees while waiting."""

from contextlib import contextmanager
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["console", "say", "progress_bar"]

console = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """One line of news on stderr (rich markup), however long it is."""
    console.print(line, soft_wrap=True)


@contextmanager
def progress_bar(description: str, total: int, done: int = 0, show: bool = True) -> Iterator[Callable]:
    """A bar on the terminal; yields `advance(n=1, description=None)`. Silent where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("<"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda n=1, description=None: progress.update(task, advance=n, description=description)
