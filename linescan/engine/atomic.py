"""Files that are either whole or absent, whatever happens while they are written."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator

__all__ = ["atomic", "sweep"]

_SUFFIX = ".partial"


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Opens `path` for binary writing; the file takes its name only once all of it is on the disk.

    A process killed at any moment leaves the old file (or none), and perhaps a `.NAME.partial` beside it: see `sweep`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{_SUFFIX}")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # the new name, too, must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: str | Path) -> None:
    """Removes what interrupted writes have left in `folder`."""
    for partial in Path(folder).glob(f".*{_SUFFIX}"):
        partial.unlink()
