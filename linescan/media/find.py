"""Finding files: what the paths, folders, patterns and lists that a command is given mean."""

import os
import sys
import unicodedata
from collections import Counter
from itertools import chain, count
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence, TextIO

from ..errors import InputError
from .formats import is_cloud, is_hidden, is_image, is_video, is_volume

__all__ = ["KINDS", "Source", "find", "find_clouds", "find_images", "find_videos", "pair", "walk"]


def _frame_folder(folder: str, folders: list[str], files: list[str]) -> Iterator[str]:
    """`folder` itself, where it holds images, and neither clips nor folders that could hold some."""
    if not folders and any(map(is_image, files)) and not any(map(is_video, files)):
        yield folder


def _files(belongs: Callable[[str], bool]) -> Callable[[str, list[str], list[str]], Iterator[str]]:
    return lambda folder, folders, files: (os.path.join(folder, name) for name in files if belongs(name))


KINDS = {
    "image": _files(is_image), "video": _files(is_video), "frames": _frame_folder, "cloud": _files(is_cloud),
    "volume": _files(is_volume),
}  # fmt: skip
"""What can be found in a folder: image files, video files, folders that are videos (one image for each frame),
point clouds, and volumes."""


class Source(NamedTuple):
    """One input of a command.

    Attributes:
        path: a file, or a folder of frames.
        name: what outputs about it are called: a relative path without a suffix, unlike that of any other source.
        error: why it cannot be used, or None.
        partners: the files that are read together with it: the image after a change, the depth beside the colours.
    """

    path: Path
    name: str
    error: InputError | None = None
    partners: tuple[Path, ...] = ()

    @property
    def given(self) -> Path | tuple[Path, ...]:
        """What a tool opens: the path, or with partners all paths."""
        return (self.path, *self.partners) if self.partners else self.path


def walk(folder: str | Path, failed: Callable[[OSError], None]) -> Iterator[tuple[str, list[str], list[str]]]:
    """`folder` and all folders below it as (path, names of folders, names of files), without the hidden ones.

    Links to folders are followed. Each folder comes once, however many links lead to it, so that a loop ends.
    `failed` gets the error of each folder that cannot be read.
    """
    waiting, seen = [str(folder)], set()
    while waiting:
        path = waiting.pop()
        try:
            here = os.stat(path)
            if (here.st_dev, here.st_ino) in seen:
                continue
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(path) as entries:
                inside = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: (e.is_symlink(), e.name))
        except OSError as error:
            failed(error)
            continue
        folders = [e.name for e in inside if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())]
        files = [e.name for e in inside if (os.path.isfile(e.path) if e.is_symlink() else e.is_file())]
        yield path, folders, files
        waiting += [os.path.join(path, name) for name in reversed(folders)]


def _inside(folder: str | Path, kinds: Iterable[str], failed: Callable[[OSError], None]) -> list[Path]:
    return sorted(Path(path) for entry in walk(folder, failed) for kind in kinds for path in KINDS[kind](*entry))


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}") from None


def find_images(folder: str | Path) -> list[Path]:
    """Every image file in `folder` and below it, sorted; told by their suffixes. Hidden ones are passed over.

    Raises:
        InputError: a folder cannot be read.
    """
    return _inside(folder, ["image"], _refuse)


def find_videos(folder: str | Path) -> list[Path]:
    """Every video in `folder` and below it, sorted: video files, and folders of frames (or `folder` itself).

    A folder is one of frames where it holds images, and neither video files nor folders.

    Raises:
        InputError: a folder cannot be read.
    """
    return _inside(folder, ["video", "frames"], _refuse)


def find_clouds(folder: str | Path) -> list[Path]:
    """Every point cloud in `folder` and below it, sorted; told by their suffixes. Hidden ones are passed over.

    Raises:
        InputError: a folder cannot be read.
    """
    return _inside(folder, ["cloud"], _refuse)


def find(
    arguments: Sequence[str | Path],
    kinds: Sequence[str] = ("image", "video"),
    exclude: Sequence[str | Path] = (),
    stdin: TextIO | None = None,
) -> list[Source]:
    """The inputs that a command is given, each once, in the order given (those of a folder or pattern sorted).

    An argument is, whichever it is first:
    - `-`: a list on standard input, one argument in each line;
    - a path: a file is taken whatever its suffix; of a folder all that is of `kinds`, except hidden files;
    - a pattern with `*`, `?`, `[...]` or `**` (any number of folders), as a shell would expand it.

    One that is missing or cannot be read is a source with an error, and the others go on.

    Args:
        kinds: of `KINDS`. With "frames" a folder of images is one source. A file that is of another kind by its suffix
            (a video where images are asked for) is an error.
        exclude: folders to pass over: where the outputs go.
        stdin: in place of standard input.

    Raises:
        InputError: no argument is left, or `kinds` has a word that is none.
    """
    if strange := set(kinds) - set(KINDS):
        raise InputError(f"kinds of files are {', '.join(KINDS)}, not {strange.pop()!r}")
    found = _Found(kinds, [Path(folder).resolve() for folder in exclude])
    for argument in _arguments(arguments, stdin):
        found.add(argument)
    if not found.sources:
        where = f"; those in {exclude[0]}, where the outputs go, are passed over" if found.passed_over else ""
        raise InputError(f"no {_plural(kinds)} are given{where}")
    paths, names, errors = zip(*found.sources.values())
    folders = [is_video(path) or os.path.isdir(path) for path in paths]
    return list(map(Source, paths, _distinct(names, folders), errors))


def pair(first: Sequence[Source], second: Sequence[Source]) -> list[Source]:
    """Sources that are read together: those of the same name, or the only two.

    Accents may be letters of their own in one name and not in the other, as file systems have it.
    One without a partner is a source with an error; one that has an error already keeps it.
    """
    if len(first) == len(second) == 1:
        second = [second[0]._replace(name=first[0].name)]
    partners = {unicodedata.normalize("NFC", source.name): source for source in second}
    pairs = []
    for source in first:
        partner = partners.pop(unicodedata.normalize("NFC", source.name), None)
        if partner is None:
            pairs.append(source._replace(error=source.error or _alone(source)))
        else:
            together = source._replace(error=source.error or partner.error)
            pairs.append(together._replace(partners=(*source.partners, partner.path)))
    return pairs + [source._replace(error=source.error or _alone(source)) for source in partners.values()]


def _alone(source: Source) -> InputError:
    several = source.path.suffix and source.name.endswith(source.path.suffix)
    why = "; two files that differ in their suffix alone have names with it" if several else ""
    return InputError(f"{source.path}: it has no partner named {source.name}{why}")


class _Found:
    """The sources so far, by the real path of their folder and their name in it."""

    def __init__(self, kinds: Sequence[str], excluded: Sequence[Path]):
        self.kinds, self.excluded = kinds, excluded
        self.sources: dict[str, tuple[Path, str, InputError | None]] = {}
        self.passed_over = False

    def add(self, argument: str) -> None:
        """One argument: a path, or a pattern."""
        path, reason = Path(argument), None
        try:
            os.stat(argument)
        except FileNotFoundError:
            matches = _expand(argument)
            for match in matches:
                if not self._passed_over(match):
                    self._take(match)
            if not matches:
                pattern = any(c in argument for c in "*?[")
                reason = f"no file matches {argument}" if pattern else f"{argument} does not exist"
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            reason = f"{argument!r}: {getattr(error, 'strerror', None) or 'not a path'}"
        else:
            self._take(path)
        if reason:
            self._keep(path, path.name, reason)

    def _take(self, path: Path) -> None:
        kinds = _plural(self.kinds)
        if os.path.isdir(path):
            errors: list[OSError] = []
            inside = _inside(path, self.kinds, errors.append)
            for member in inside:
                if not self._passed_over(member):
                    self._keep(member, os.path.relpath(member, path) if member != path else path.resolve().name)
            for error in errors:
                self._keep(Path(error.filename), path.name, f"{error.filename}: {error.strerror}")
            if not inside and not errors:
                self._keep(path, path.name, f"{path} holds no {kinds}")
        elif not os.path.isfile(path):
            self._keep(path, path.name, f"{path} is not a file")
        elif is_video(path) and "video" not in self.kinds:
            self._keep(path, path.name, f"{path} is a video; only {kinds} are read here")
        elif is_image(path) and "image" not in self.kinds:
            self._keep(path, path.name, f"{path} is an image; only {kinds} are read here")
        else:
            self._keep(path, path.name)

    def _keep(self, path: Path, name: str, error: str | None = None) -> None:
        key = os.path.join(os.path.realpath(path.parent), path.name)
        self.sources.setdefault(key, (path, name if name.strip(".") else "input", error and InputError(error)))

    def _passed_over(self, path: Path) -> bool:
        path = Path(os.path.realpath(path))
        excluded = any(folder == path or folder in path.parents for folder in self.excluded)
        self.passed_over |= excluded
        return excluded


def _arguments(arguments: Sequence[str | Path], stdin: TextIO | None) -> Iterator[str]:
    for argument in map(str, arguments):
        if argument == "-":
            yield from filter(str.strip, (stdin or sys.stdin).read().splitlines())
        else:
            yield argument


def _expand(pattern: str) -> list[Path]:
    """The paths that match, sorted, without hidden ones that it does not name; `**` follows no links."""
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    special = [any(c in part for c in "*?[") for part in parts]
    if not any(special):
        return []
    base, fixed = Path(path.anchor), 0
    # What is there is taken by its name, brackets and all.
    while fixed < len(parts) - 1 and (not special[fixed] or os.path.lexists(base / parts[fixed])):
        base, fixed = base / parts[fixed], fixed + 1
    named = sum(part.startswith(".") for part in parts[fixed:])
    try:
        matches = sorted(base.glob(str(Path(*parts[fixed:]))))
    except (OSError, ValueError, IndexError):  # of "a**b", for one
        return []
    return [p for p in matches if sum(map(is_hidden, p.relative_to(base).parts)) <= named]


def _plural(kinds: Sequence[str]) -> str:
    plural = {"frames": "folders of frames", "cloud": "point clouds"}
    return " or ".join(plural.get(kind, f"{kind}s") for kind in kinds)


def _distinct(names: Sequence[str], folders: Sequence[bool]) -> list[str]:
    """The names without suffixes where these are distinct, else with them, else numbered.

    Distinct even on file systems that ignore case. `folders` says of which a folder may be made (the frames of a
    video): nothing else lies in these.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    counts = Counter(stem.casefold() for stem in stems)
    chosen, taken, made, above = [], set(), set(), set()
    for stem, full, folder in zip(stems, names, folders):
        top, *rest = Path(full).parts
        numbered = (os.path.join(f"{top}-{number}", *rest) for number in count(2))
        for name in chain([stem] if counts[stem.casefold()] == 1 else [], [full], numbered):
            key = name.casefold()
            parents = set(map(str, Path(key).parents)) - {"."}
            if key not in taken and not parents & made and not (folder and key in above):
                break
        taken.add(key)
        above |= parents
        made |= {key} if folder else set()
        chosen.append(name)
    return chosen
