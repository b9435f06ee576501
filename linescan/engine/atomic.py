"""Files that are either whole or absent, whatever happens while they are written."""

import hashlib
import io
import os
import tempfile
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, Mapping

from ..errors import InputError

__all__ = ["atomic", "atomic_path", "expect_file", "expect_folder", "expect_no_input", "identities", "inputs_kept",
           "sweep", "write_all"]  # fmt: skip

_SUFFIX = ".partial"
_LONGEST = 255  # bytes of a file's name, on every common file system


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Opens `path` for binary writing; the file takes its name only once all of it is on the disk.

    If the block raises, or the disk is full, the old file (or none) stays and nothing else is left. A process killed at
    any moment also leaves the old file (or none), and perhaps a `.NAME.partial` beside it: see `sweep`.

    Raises:
        InputError: `inputs_kept` has the file.
        OSError: the file cannot be written; `filename` is `path`.
    """
    with atomic_path(path) as partial, _Whole(open(partial, "wb", buffering=0)) as file:
        yield file


class _Whole(io.BufferedWriter):
    """Hides its descriptor: libraries that write to it themselves (Pillow) may not notice that a disk is full."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("write to the file object")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """As `atomic`, for writers that open the file themselves: gives them the name to write to.

    That name does not end with the suffix of `path`: a writer that chooses the format by it must be told the format.
    """
    path = Path(path)
    expect_no_input(path)
    partial = _partial(path)
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, partial, str(partial)):
            error.filename, error.filename2 = str(path), None  # the name that the user knows
        if _interrupted(error):  # torch.save, stopped within a write, fails to close its archive and says so instead
            raise KeyboardInterrupt from error
        raise
    if os.name == "posix":
        with suppress(PermissionError):  # of a folder that may be written but not listed
            _flush(path.parent)  # the new name, too, must survive a power cut


_INPUTS: ContextVar[frozenset[tuple[int, int]]] = ContextVar("inputs", default=frozenset())


def identities(paths: Iterable[str | Path]) -> frozenset[tuple[int, int]]:
    """What tells these files from others, by whatever name; those that are not there are left out."""
    return frozenset(filter(None, map(_identity, paths)))


@contextmanager
def inputs_kept(inputs: frozenset[tuple[int, int]]) -> Iterator[None]:
    """Within this, no `atomic` replaces one of these files (`identities`)."""
    token = _INPUTS.set(inputs)
    try:
        yield
    finally:
        _INPUTS.reset(token)


def expect_no_input(path: str | Path) -> None:
    """Raises InputError: `path` is a file that `inputs_kept` has."""
    if (inputs := _INPUTS.get()) and _identity(path) in inputs:
        raise InputError(f"{path}: an output would replace this input; --out names another folder")


def expect_folder(folder: str | Path) -> None:
    """Raises InputError: a folder is not there and cannot be made, or cannot be written to."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file; --out needs a folder there")
    try:  # what permissions say does not hold for root, and of full disks they say nothing
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(
            f"{there}: nothing can be written into this folder ({error.strerror}); --out names another"
        ) from None


def expect_file(path: str | Path) -> None:
    """Raises InputError: `path` is a folder, or its own cannot be made or written to."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; --out is a file")
    expect_folder(Path(path).parent)


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_dev, facts.st_ino


def _interrupted(error: BaseException) -> bool:
    """Whether an error that is not Ctrl-C itself came from handling Ctrl-C."""
    before = error.__context__
    return before is not None and (isinstance(before, KeyboardInterrupt) or _interrupted(before))


def _partial(path: Path) -> Path:
    name = f".{path.name}{_SUFFIX}"
    if len(os.fsencode(path.name)) <= _LONGEST < len(os.fsencode(name)):
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}{_SUFFIX}"
    return path.with_name(name)


def _flush(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: str | Path) -> None:
    """Removes what interrupted writes have left in `folder`."""
    for partial in Path(folder).glob(f".*{_SUFFIX}"):
        partial.unlink(missing_ok=True)


def write_all(folder: str | Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Writes files into a folder, which is made if it is missing; each is whole or absent. Returns their paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder) / name for name in contents]
    for path, content in zip(paths, contents.values()):
        with atomic(path) as file:
            file.write(content)
    return paths
