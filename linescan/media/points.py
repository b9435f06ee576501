"""Reading clouds of points from files of any common format, in bounded memory.

    .ply            ASCII or binary points; with faces it is a mesh (plyfile)
    .pcd            ASCII, binary or compressed (pypcd4)
    .las .laz       (laspy)
    .npy .npz       (N, columns), or arrays named points, normals, colours, intensity, labels
    .txt .xyz .pts .asc .csv    a point a line; of .pts with seven columns the last three are colours
    .bin            float32 rows: KITTI's and SemanticKITTI's x y z intensity; nuScenes' (.pcd.bin) with the ring
    .off .obj .stl  meshes, like .ply with faces: points sampled on the surface, with its normals (trimesh)

The header is read first. Of a file with more points than wanted, one point is drawn from each of as many equal runs of
the file, with a seed, so that memory does not grow with the file. Whatever is left out is said in `PointCloud.notes`.
"""

import codecs
import logging
import re
import struct
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Callable, Iterator, NamedTuple, Sequence

import numpy as np

from ..errors import BrokenCloud, InputError
from .formats import is_cloud

__all__ = ["LARGEST_CLOUD", "PointCloud", "column_names", "points_of_array", "read_points", "write_ply"]

LARGEST_CLOUD = 2_000_000
"""Points that are kept of a file, unless asked otherwise."""

_BLOCK = 1 << 18  # rows read at a time, where a file has to be read through
_LARGEST_LINE = 1 << 14
_LARGEST_WHOLE = 1 << 31  # bytes of a file that can only be read as a whole


@dataclass
class PointCloud:
    """Points and what a file says of them.

    Attributes:
        points: (N, 3) float32, in the file's unit, relative to `origin`.
        intensity: (N,) float32 as in the file, or None.
        normals: (N, 3) float32, or None.
        colours: (N, 3) uint8 red, green, blue, or None.
        labels: (N,) int64 class of each point, or None.
        origin: (3,) float64, what is to be added to the points. Zero, but where most coordinates are beyond 10,000 (of
            a map, for one), which float32 would round: whole numbers near the cloud's middle.
        total: number of points in the file.
        notes: what was left out, a sentence each.
    """

    points: np.ndarray
    intensity: np.ndarray | None = None
    normals: np.ndarray | None = None
    colours: np.ndarray | None = None
    labels: np.ndarray | None = None
    origin: np.ndarray = field(default_factory=lambda: np.zeros(3))
    total: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        there = [name for name in ("intensity", "normals", "colours", "labels") if getattr(self, name) is not None]
        points = f"{len(self):,} point{'s' * (len(self) != 1)}"
        return f"<PointCloud of {points}{' with ' * bool(there)}{', '.join(there)}>"


def read_points(
    path: str | Path,
    *,
    limit: int = LARGEST_CLOUD,
    samples: int = 10_000,
    columns: str | Sequence[str] | None = None,
    seed: int = 0,
) -> PointCloud:
    """Reads a file; this module's page lists the formats.

    What the columns of a format without names mean (.txt, .npy and their like) is told by their values: three columns
    are x y z; three more are normals if they have length 1, colours if they are whole numbers up to 255; else the
    fourth is the intensity, and a last one of whole numbers after normals or colours the label.

    SemanticKITTI's labels are read along with a scan (velodyne/N.bin, labels/N.label): the class, without the instance.

    Args:
        path: the file.
        limit: most points that are kept.
        samples: points on the surface of a mesh.
        columns: names for the columns of a format without names, such as "x y z intensity - label" ("-": not used);
            they are those of the attributes, with x y z, nx ny nz and r g b for their parts.
        seed: of what is drawn at random.

    Raises:
        BrokenCloud: the file cannot be read, or holds no points; the message starts with the path.
        InputError: the format is unknown, its package is not installed, or an argument is none of those above.
    """
    path = Path(path)
    if not is_cloud(path):
        raise InputError(f"{path}: not a point cloud by its name; these are: {' '.join(_READERS)}")
    if limit < 1 or samples < 1:
        raise InputError(f"a point cloud has at least 1 point, not {min(limit, samples)}")
    names = column_names(columns)
    with _reading(path):
        _expect_own_bytes(path)
        table = _READERS[path.suffix.lower()](path, names, min(samples, limit), seed)
        if not table.total:
            raise BrokenCloud(f"{path}: holds no points")
        rows = _draw(table.total, limit, seed)
        with np.errstate(all="ignore"):
            cloud = _assemble(path, table.read(rows), names)
    cloud.total = table.total
    cloud.notes[:0] = table.notes
    if rows is not None:
        cloud.notes.insert(0, f"{len(rows):,} of {table.total:,} points, drawn at random")
    return cloud


def points_of_array(table: np.ndarray, columns: str | Sequence[str] | None = None) -> PointCloud:
    """A cloud from a table (N, 3 or more), whose columns mean what those of a file without names mean.

    Args:
        table: numbers.
        columns: as `read_points` takes them.

    Raises:
        InputError: it is no such table, or none of its points is finite.
    """
    if not table.size:
        raise BrokenCloud(f"an array of {'x'.join(map(str, table.shape))} holds no points")
    with np.errstate(all="ignore"):
        cloud = _assemble(Path("array"), table, column_names(columns))
    cloud.total = len(table)
    return cloud


def column_names(columns: str | Sequence[str] | None) -> list[str]:
    """The names of columns, of `read_points`.

    Raises:
        InputError: an unknown name, one that comes twice, or a coordinate is missing.
    """
    names = columns.split() if isinstance(columns, str) else list(columns or ())
    if unknown := [name for name in names if name not in (*_COLUMNS, "-")]:
        raise InputError(f"unknown column {unknown[0]!r}; there are: {' '.join(_COLUMNS)} and -")
    for name in _COLUMNS:
        if names.count(name) > 1:
            raise InputError(f"column {name} is named twice in {' '.join(names)!r}; - is for one that is not used")
        if names and name in "xyz" and name not in names:
            raise InputError(f"no column {name} in {' '.join(names)!r}; a point has x, y and z")
    return names


def write_ply(file: BinaryIO, cloud: PointCloud, labels: np.ndarray, colours: np.ndarray) -> None:
    """Writes a binary .ply file with a class and a colour for each point, which `read_points` and viewers read.

    Args:
        file: open for writing.
        cloud: the points; coordinates that stand away from an origin are written in double precision.
        labels: (N,) classes, from 0 on; -1 for none.
        colours: (N, 3) bytes.
    """
    kind = "double" if cloud.origin.any() else "float"
    fields = [
        *((axis, kind) for axis in "xyz"),
        *((name, "uchar") for name in ("red", "green", "blue")),
        ("label", "int"),
    ]
    table = np.empty(len(cloud), [(name, "<" + _PLY_TYPES[type_]) for name, type_ in fields])
    for i, axis in enumerate("xyz"):
        table[axis] = cloud.points[:, i] + (cloud.origin[i] if kind == "double" else 0)
    for i, name in enumerate(("red", "green", "blue")):
        table[name] = colours[:, i]
    table["label"] = labels
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}"]
    lines += [f"property {type_} {name}" for name, type_ in fields] + ["end_header", ""]
    file.write("\n".join(lines).encode())
    file.write(table.tobytes())


def _draw(total: int, limit: int, seed: int) -> np.ndarray | None:
    """Which rows are kept, ascending: one of each of `limit` equal runs; None: all."""
    if total <= limit:
        return None
    runs = (np.arange(limit) + np.random.default_rng(seed).random(limit)) * (total / limit)
    return np.minimum(runs.astype(np.int64), total - 1)


_FIRST_BYTES = {
    b"\x93NUMPY": (".npy",), b"PK\x03\x04": (".npz",), b"LASF": (".las", ".laz"), b"ply\n": (".ply",),
    b"ply\r\n": (".ply",), b"# .PCD": (".pcd",), b"\x89PNG": (".png",), b"\xff\xd8\xff": (".jpg",), b"%PDF": (".pdf",),
}  # fmt: skip
"""What files of a format begin with."""


def _expect_own_bytes(path: Path) -> None:
    """Raises BrokenCloud for an empty file, and for one that is of another format than its name says."""
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        raise BrokenCloud(f"{path}: holds no points")
    for first, suffixes in _FIRST_BYTES.items():
        if head.startswith(first) and path.suffix.lower() not in suffixes:
            raise BrokenCloud(f"{path}: not a {path.suffix} file: its first bytes are those of a {suffixes[0]} file")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a reader says of a file becomes a line that names it."""
    loggers = [logging.getLogger(name) for name in ("laspy", "trimesh")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    except InputError:
        raise
    except OSError as error:
        raise BrokenCloud(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # readers raise anything from struct.error to pydantic's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise BrokenCloud(f"{path}: not a {path.suffix} file, or damaged ({reason})") from None
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _package(name: str, path: Path) -> ModuleType:
    """An optional package that reads files such as `path`. Raises InputError where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise InputError(
            f"reading {path.suffix} files takes {name}; `pip install 'linescan[points]'` installs it"
        ) from None


# -- what columns mean ------------------------------------------------------------------------------------------------

_COLUMNS = "x y z intensity nx ny nz r g b label ring".split()
_ALIASES = {
    "normal_x": "nx", "normal_y": "ny", "normal_z": "nz", "normalx": "nx", "normaly": "ny", "normalz": "nz",
    "red": "r", "green": "g", "blue": "b", "diffuse_red": "r", "diffuse_green": "g", "diffuse_blue": "b",
    "i": "intensity", "reflectance": "intensity", "reflectivity": "intensity", "remission": "intensity",
    "scalar_intensity": "intensity", "labels": "label", "class": "label", "classification": "label",
    "semantic": "label", "semantic_label": "label", "scalar_label": "label", "scalar_classification": "label",
    "rgba": "rgb", "colors": "colours", "color": "colours", "colour": "colours", "normal": "normals",
    "xyz": "points", "pos": "points", "coords": "points", "coord": "points", "pc": "points", "cloud": "points",
    "data": "points", "arr_0": "points",
}  # fmt: skip


def _known(name: str) -> str:
    name = name.strip().strip("\"'").lower()
    return _ALIASES.get(name, name)


def _assemble(path: Path, read: dict[str, np.ndarray] | np.ndarray, names: list[str]) -> PointCloud:
    """A cloud from columns by name, or from (N, columns) without names."""
    notes = []
    if isinstance(read, np.ndarray):
        if read.ndim != 2 or read.shape[1] < max(3, len(names)) or read.dtype.kind not in "fiu":
            shape = "x".join(map(str, read.shape))
            want = f"{len(names)} columns" if names else "at least 3 columns"
            raise BrokenCloud(f"{path}: a table of {shape} {read.dtype}; a cloud has rows of numbers, {want} each")
        names = names or _guess(read, path.suffix.lower() == ".pts")
        if unused := read.shape[1] - sum(name != "-" for name in names):
            notes.append(f"{unused} of {read.shape[1]} columns are not used")
        read = {name: read[:, i] for i, name in enumerate(names) if name != "-"}
    read = {_known(name): column for name, column in read.items()}
    if missing := [axis for axis in "xyz" if axis not in read]:
        found = ", ".join(list(read)[:8]) or "nothing"
        raise BrokenCloud(f"{path}: no coordinate {missing[0]} among its columns ({found})")

    def three(*parts: str) -> np.ndarray | None:
        return np.stack([read[part] for part in parts], 1) if all(part in read for part in parts) else None

    points = three("x", "y", "z").astype(np.float64)
    finite = np.isfinite(points).all(1)
    if not finite.any():
        raise BrokenCloud(f"{path}: none of its {len(points):,} points has finite coordinates")
    if lost := int((~finite).sum()):
        notes.append(f"{lost:,} point{'s' * (lost > 1)} without finite coordinates left out")
    points = points[finite]
    origin, middle = np.zeros(3), np.median(points, 0)
    if np.abs(middle).max() > 1e4:  # single points far away leave a scan where it is
        origin = np.round(middle)
    cloud = PointCloud((points - origin).astype(np.float32), origin=origin, notes=notes)
    if not np.isfinite(cloud.points).all():
        raise BrokenCloud(f"{path}: its coordinates lie further apart than float32 can hold")

    def measured(name: str, values: np.ndarray) -> np.ndarray:
        values = values[finite].astype(np.float32)
        if wrong := int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum()):
            notes.append(f"{name} of {wrong:,} point{'s' * (wrong > 1)} not finite, taken as 0")
        return np.nan_to_num(values, nan=0, posinf=0, neginf=0)

    if "intensity" in read:
        cloud.intensity = measured("intensity", read["intensity"])
    if (normals := three("nx", "ny", "nz")) is not None:
        cloud.normals = measured("normals", normals)
    if (colours := three("r", "g", "b")) is None and "rgb" in read:
        colours = _unpack(read["rgb"])
    if colours is not None:
        cloud.colours = _to_bytes(colours[finite])
    if "label" in read:
        cloud.labels = np.nan_to_num(read["label"][finite], nan=-1).astype(np.int64)
    return cloud


def _guess(table: np.ndarray, pts: bool = False) -> list[str]:
    """What the columns of a table without names are; see `read_points`. In .pts colours come last."""
    count = table.shape[1]
    names, sample = ["x", "y", "z"], table[:1000]

    def colours(first: int) -> bool:
        part = sample[:, first : first + 3]
        return part.shape[1] == 3 and bool((part == np.round(part)).all() and part.min() >= 0 and 1 < part.max() <= 255)

    if count >= 6 and np.allclose((sample[:, 3:6].astype(float) ** 2).sum(1), 1, atol=0.02):
        names += ["nx", "ny", "nz"]
    elif count >= 6 and colours(3) and not (pts and count == 7 and colours(4)):
        names += ["r", "g", "b"]
    elif count >= 4:
        names.append("intensity")
        if count >= 7 and colours(4):
            names += ["r", "g", "b"]
    last = sample[:, len(names)] if 3 < len(names) < count else None
    if last is not None and names[-1] != "intensity" and (last == np.round(last)).all():
        names.append("label")
    return names


def _unpack(packed: np.ndarray) -> np.ndarray:
    """PCD's colours: three bytes in an integer, or in the bits of a float."""
    bits = packed.view(np.uint32) if packed.dtype == np.float32 else packed.astype(np.int64)
    return np.stack([bits >> shift & 255 for shift in (16, 8, 0)], 1)


def _to_bytes(colours: np.ndarray) -> np.ndarray:
    """Colours as bytes: floats up to 1 run over 0..1, numbers beyond 255 over 0..65535."""
    most = colours.max(initial=0)
    if colours.dtype.kind == "f" and most <= 1:
        colours = colours * 255
    elif most > 255:
        colours = colours / 257
    return np.nan_to_num(colours.astype(np.float64)).clip(0, 255).round().astype(np.uint8)


# -- formats ----------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """A file after its header.

    Attributes:
        total: number of points.
        read: ascending rows, or None for all -> columns by name, or (N, columns) without names.
        notes: what the reader leaves out.
    """

    total: int
    read: Callable[[np.ndarray | None], dict[str, np.ndarray] | np.ndarray]
    notes: Sequence[str] = ()


def _columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: rows[name] for name in rows.dtype.names if rows.dtype[name].kind in "fiu"}


def _binary(path: Path, dtype, total: int, offset: int = 0) -> Callable:
    """Reads rows of a binary file, after making sure that all are there. Only blocks with wanted rows are read."""
    dtype = np.dtype(dtype)
    there = max(path.stat().st_size - offset, 0) // dtype.itemsize
    if there < total:
        raise BrokenCloud(f"{path}: cut short, {there:,} of {total:,} points are there")

    def read(rows):
        with open(path, "rb") as file:
            if rows is None:
                file.seek(offset)
                table = np.fromfile(file, dtype, total)
            else:
                parts = []
                for block in np.unique(rows // _BLOCK).tolist():
                    file.seek(offset + block * _BLOCK * dtype.itemsize)
                    begin, end = np.searchsorted(rows, (block * _BLOCK, (block + 1) * _BLOCK))
                    values = np.fromfile(file, dtype, min(_BLOCK, total - block * _BLOCK))
                    parts.append(values[rows[begin:end] - block * _BLOCK])
                table = np.concatenate(parts)
        return _columns(table) if dtype.names else table

    return read


def _picked(blocks: Iterator[np.ndarray], rows: np.ndarray | None) -> np.ndarray:
    """The wanted rows of a table that comes in blocks."""
    parts, first = [], 0
    for block in blocks:
        if rows is None:
            parts.append(block)
        else:
            begin, end = np.searchsorted(rows, (first, first + len(block)))
            parts.append(block[rows[begin:end] - first])
        first += len(block)
    return np.concatenate(parts)


_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip


def _ply(path: Path, names, samples, seed) -> _Table:
    """The element `vertex`, or a mesh if there are faces. Elements without lists before it can be stepped over."""
    with open(path, "rb") as file:
        if file.readline(_LARGEST_LINE).strip() != b"ply":
            raise BrokenCloud(f"{path}: not a .ply file")
        kind, elements = "", []  # (name, count, [(property, type)])
        for line in iter(lambda: file.readline(_LARGEST_LINE), b""):
            words = line.decode("latin-1").split()
            if words[:1] == ["end_header"]:
                break
            if words[:1] == ["format"]:
                kind = words[1]
            elif words[:1] == ["element"]:
                elements.append((words[1], int(words[2]), []))
            elif words[:1] == ["property"]:
                elements[-1][2].append((words[-1], "list" if words[1] == "list" else _PLY_TYPES[words[1]]))
        else:
            raise BrokenCloud(f"{path}: its header does not end")
        start = file.tell()
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise BrokenCloud(f"{path}: a .ply file of unknown format {kind!r}")
    if any(name == "face" and total for name, total, _ in elements):
        return _ply_mesh(path, elements, samples, seed)
    before = 0
    for name, total, properties in elements:
        lists = any(type_ == "list" for _, type_ in properties)
        if name != "vertex" and kind != "ascii" and lists or name == "vertex" and lists:
            raise BrokenCloud(f"{path}: lists stand before or in its vertices, which is not supported")
        dtype = np.dtype([(n, t) for n, t in properties if t != "list"])
        if name == "vertex":
            break
        before += total * (1 if kind == "ascii" else dtype.itemsize)
    else:
        raise BrokenCloud(f"{path}: it has no vertices")
    if kind == "ascii":
        return _Table(total, lambda rows: _named(_text_rows(path, start, before, total, rows), dtype.names))
    dtype = dtype.newbyteorder("<" if kind == "binary_little_endian" else ">")
    return _Table(total, _binary(path, dtype, total, start + before))


def _named(table: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    if table.shape[1] < len(names):
        raise ValueError(f"rows of {table.shape[1]} numbers, the header promises {len(names)}")
    return {name: table[:, i] for i, name in enumerate(names)}


def _pcd(path: Path, names, samples, seed) -> _Table:
    pypcd4 = _package("pypcd4", path)
    lines, start = [], 0
    with open(path, "rb") as file:
        for line in islice(iter(lambda: file.readline(_LARGEST_LINE), b""), 100):
            start += len(line)
            lines.append(line.decode("latin-1").strip())
            if lines[-1].startswith("DATA"):
                break
    if not lines or not lines[-1].startswith("DATA"):
        raise BrokenCloud(f"{path}: not a .pcd file")
    words = {line.split()[0]: line.split() for line in lines if line and not line.startswith("#")}
    if "COUNT" not in words:  # may be left out
        lines.insert(-1, "COUNT" + " 1" * (len(words["FIELDS"]) - 1))
    meta = pypcd4.MetaData.parse_header(lines)
    dtype = meta.build_dtype()
    if meta.data == pypcd4.Encoding.ASCII:
        return _Table(meta.points, lambda rows: _named(_text_rows(path, start, 0, meta.points, rows), dtype.names))
    if meta.data == pypcd4.Encoding.BINARY:
        return _Table(meta.points, _binary(path, dtype, meta.points, start))
    if meta.points * dtype.itemsize > _LARGEST_WHOLE:
        size = meta.points * dtype.itemsize / 2**30
        raise BrokenCloud(f"{path}: {size:.1f} GiB when unpacked, 2 at most; save it as DATA binary")

    def read(rows):
        table = pypcd4.PointCloud.from_path(path).pc_data
        return _columns(table if rows is None else table[rows])

    return _Table(meta.points, read)


def _las(path: Path, names, samples, seed) -> _Table:
    laspy = _package("laspy", path)
    if path.suffix.lower() == ".laz":
        _package("lazrs", path)
    # laspy would read as many records of metadata as the header says, whatever there is.
    with open(path, "rb") as file:
        head, size = file.read(247), path.stat().st_size
    begins, points, records, extended = 0, 0, 1, 0
    if len(head) >= 227 and head[:4] == b"LASF":
        begins, points, records = struct.unpack_from("<HII", head, 94)
        extended = struct.unpack_from("<I", head, 243)[0] if begins >= 375 and len(head) == 247 else 0
    if not 227 <= begins <= points <= size or 54 * records > points - begins or 60 * extended > size:
        raise BrokenCloud(f"{path}: not a {path.suffix} file, or damaged (its header)")
    if head[104] & 0xC0 and _las_chunks(path, points) > size:  # lazrs would make room for all
        raise BrokenCloud(f"{path}: not a {path.suffix} file, or damaged (its table of chunks)")
    backend = laspy.LazBackend.Lazrs  # the parallel one makes room for as many points as the file calls a chunk
    with laspy.open(path, laz_backend=backend) as file:
        header = file.header
        total, kept = header.point_count, ["intensity", "classification"]
        dimensions = set(header.point_format.dimension_names)
        if path.suffix.lower() == ".las":
            there = (path.stat().st_size - header.offset_to_point_data) // header.point_format.size
            if there < total:
                raise BrokenCloud(f"{path}: cut short, {max(there, 0):,} of {total:,} points are there")
    kept += [name for name in ("red", "green", "blue") if name in dimensions]

    def blocks():
        with laspy.open(path, laz_backend=backend) as file:
            for chunk in file.chunk_iterator(_BLOCK):
                yield np.stack([np.asarray(chunk[name], np.float64) for name in ("x", "y", "z", *kept)], 1)

    def read(rows):
        columns = _named(_picked(blocks(), rows), ("x", "y", "z", *kept))
        return {name: column for name, column in columns.items() if name in "xyz" or column.any()}  # unset: zeros

    return _Table(total, read)


def _las_chunks(path: Path, points: int) -> int:
    """How many chunks the compressed points of a file have, if its table says the truth."""
    with open(path, "rb") as file:
        file.seek(points)
        place = int.from_bytes(file.read(8), "little", signed=True)
        if place < 0:  # written without going back: it is at the end
            file.seek(-8, 2)
            place = int.from_bytes(file.read(8), "little", signed=True)
        file.seek(max(place, 0) + 4)
        return int.from_bytes(file.read(4), "little")


def _npy(path: Path, names, samples, seed) -> _Table:
    with open(path, "rb") as file:
        if file.read(6) not in (b"\x93NUMPY", b""):
            raise BrokenCloud(f"{path}: not a .npy file")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim == 0 or (array.dtype.names is None and array.ndim != 2):
        shape = "x".join(map(str, array.shape)) or "a single value"
        raise BrokenCloud(f"{path}: an array of {shape}; a cloud is (N, 3 or more), or has named fields")

    if array.flags.c_contiguous and not array.dtype.hasobject:
        row = np.dtype((array.dtype, array.shape[1:])) if array.ndim > 1 else array.dtype
        return _Table(len(array), _binary(path, row, len(array), array.offset))
    return _Table(len(array), lambda rows: np.array(array if rows is None else array[rows]))


def _npz(path: Path, names, samples, seed) -> _Table:
    """Arrays are read as a stream: a zip archive cannot be mapped."""
    with zipfile.ZipFile(path) as archive:
        members = {_known(Path(name).stem): name for name in archive.namelist() if name.endswith(".npy")}
        shapes = {name: _npz_header(archive, member)[0] for name, member in members.items()}
    tables = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] >= 3]
    points = "points" if "points" in tables else tables[0] if len(tables) == 1 else None
    if points is None:
        found = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in list(shapes.items())[:6])
        raise BrokenCloud(f"{path}: no array points (N, 3 or more) among: {found or 'nothing'}")
    total = shapes[points][0]
    others = [name for name in ("normals", "colours", "intensity", "label") if shapes.get(name, (0,))[0] == total]

    def read(rows):
        with zipfile.ZipFile(path) as archive:
            table = _picked(_npz_rows(archive, members[points]), rows)
            if not others:
                return table
            columns = {name: table[:, i] for i, name in enumerate(names or _guess(table)) if name != "-"}
            for other in others:
                part = _picked(_npz_rows(archive, members[other]), rows).reshape(len(table), -1)
                parts = {"normals": ("nx", "ny", "nz"), "colours": ("r", "g", "b")}.get(other, (other,))
                columns |= {name: part[:, i] for i, name in enumerate(parts)}
        return columns

    return _Table(total, read)


def _npz_header(archive: zipfile.ZipFile, member: str, stream: BinaryIO | None = None) -> tuple:
    """(shape, Fortran order, dtype) of an array in an archive; leaves `stream` at its first value."""
    with archive.open(member) if stream is None else _left_open(stream) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return header(file)


@contextmanager
def _left_open(stream: BinaryIO) -> Iterator[BinaryIO]:
    yield stream


def _npz_rows(archive: zipfile.ZipFile, member: str) -> Iterator[np.ndarray]:
    with archive.open(member) as stream:
        shape, fortran, dtype = _npz_header(archive, member, stream)
        if dtype.hasobject or dtype.names:
            raise ValueError(f"{member} holds {dtype}, not numbers")
        size = dtype.itemsize * int(np.prod(shape[1:]))
        if fortran and len(shape) > 1:
            if shape[0] * size > _LARGEST_WHOLE:
                raise ValueError(f"{member} is stored column by column and larger than 2 GiB")
            yield np.frombuffer(stream.read(shape[0] * size), dtype).reshape(shape[::-1]).T
            return
        for first in range(0, shape[0], _BLOCK):
            count = min(_BLOCK, shape[0] - first)
            yield np.frombuffer(stream.read(count * size), dtype).reshape(count, *shape[1:])


def _bin(path: Path, names, samples, seed) -> _Table:
    columns = names or ["x", "y", "z", "intensity", "ring"][: 5 if path.name.lower().endswith(".pcd.bin") else 4]
    size = path.stat().st_size
    if size % (4 * len(columns)):
        raise BrokenCloud(
            f"{path}: {size:,} bytes are no whole rows of {len(columns)} float32; KITTI's scans have 4, nuScenes' "
            "(.pcd.bin) 5; name the columns of others"
        )
    total = size // (4 * len(columns))
    read = _binary(path, np.dtype(("<f4", (len(columns),))), total)
    beside = path.parent.parent / "labels" / f"{path.stem}.label"
    labels = beside if path.parent.name == "velodyne" and beside.is_file() else None
    if labels is not None and labels.stat().st_size != 4 * total:
        raise BrokenCloud(f"{labels}: {labels.stat().st_size // 4:,} labels for {total:,} points")

    def with_names(rows):
        table = read(rows)
        found = {name: table[:, i] for i, name in enumerate(columns) if name != "-"}
        if labels is not None:
            found["label"] = _binary(labels, "<u4", total)(rows) & 0xFFFF  # the upper half numbers instances
        return found

    return _Table(total, with_names)


def _ply_mesh(path: Path, elements: list, samples: int, seed: int) -> _Table:
    """Faces of any number of corners. Whatever else the file says of a vertex is said of the points nearest to it."""
    plyfile, trimesh = _package("plyfile", path), _package("trimesh", path)
    _expect_size_of_mesh(path)
    counts = {name: total for name, total, _ in elements}
    if not counts.get("vertex"):
        raise BrokenCloud(f"{path}: it has no vertices")
    if 4 * counts["face"] > path.stat().st_size:  # plyfile would make room for all
        raise BrokenCloud(f"{path}: cut short, {counts['face']:,} faces are not there")
    lists = {name: [n for n, type_ in properties if type_ == "list"] for name, _, properties in elements}
    corners = [n for n in lists["face"] if n in ("vertex_indices", "vertex_index")] or lists["face"]
    if not corners:
        raise BrokenCloud(f"{path}: its faces are no lists of vertices")
    triangles = {name: {n: 6 if n == "texcoord" else 3 for n in found} for name, found in lists.items()}
    for lengths in (triangles, {}):  # a binary file of triangles alone is read at once, another face by face
        try:
            data = plyfile.PlyData.read(str(path), known_list_len=lengths)
            break
        except plyfile.PlyElementParseError:
            if not lengths:
                raise
    faces = trimesh.geometry.triangulate_quads(data["face"][corners[0]])
    columns = _columns(data["vertex"].data)
    vertices = np.stack([np.asarray(columns.pop(axis), np.float64) for axis in "xyz"], 1)
    return _surface(path, trimesh.Trimesh(vertices, faces, process=False), samples, seed, columns)


def _expect_size_of_mesh(path: Path) -> None:
    if path.stat().st_size > _LARGEST_WHOLE:
        raise BrokenCloud(f"{path}: a mesh of {path.stat().st_size / 2**30:.1f} GiB, 2 at most; simplify it")


def _mesh(path: Path, names, samples, seed) -> _Table:
    trimesh = _package("trimesh", path)
    _expect_size_of_mesh(path)
    promised = _promised(path)
    with open(path, "rb") as file:  # by handle: files that a mesh names are not looked for
        mesh = trimesh.load(file, file_type=path.suffix.lower()[1:], process=False, skip_materials=True)
    if isinstance(mesh, trimesh.Scene):
        mesh = mesh.to_mesh() if mesh.geometry else trimesh.Trimesh()
    vertices = np.asarray(mesh.vertices, np.float64).reshape(-1, 3)
    faces = len(getattr(mesh, "faces", ()))
    if len(vertices) < promised[0] or faces < promised[1]:
        raise BrokenCloud(f"{path}: cut short, {faces:,} of {promised[1]:,} faces are there")
    if not faces:  # an .obj or .off of points alone
        return _Table(len(vertices), lambda rows: vertices if rows is None else vertices[rows])
    return _surface(path, mesh, samples, seed, {})


def _surface(path: Path, mesh, samples: int, seed: int, columns: dict[str, np.ndarray]) -> _Table:
    """Points on the faces, as many everywhere, with normals and the nearest corner's values of `columns`."""
    trimesh = _package("trimesh", path)
    vertices, faces = mesh.vertices, mesh.faces
    if not len(faces):
        raise BrokenCloud(f"{path}: none of its faces has three corners")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise BrokenCloud(f"{path}: its faces have corners that are not among its {len(vertices):,} vertices")
    if not np.isfinite(vertices[faces]).all():
        raise BrokenCloud(f"{path}: corners of its faces have no finite coordinates")
    if not mesh.area > 0:
        raise BrokenCloud(f"{path}: a mesh without area has no surface to sample")
    points, face = trimesh.sample.sample_surface(mesh, samples, seed=seed)
    nearest = ((vertices[faces[face]] - points[:, None]) ** 2).sum(-1).argmin(1)
    corner = faces[face, nearest]
    table = np.concatenate((points, mesh.face_normals[face]), 1)
    found = {name: column[corner] for name, column in columns.items()}
    found |= _named(table, ("x", "y", "z", "nx", "ny", "nz"))
    notes = [f"{samples:,} points sampled on {len(faces):,} face{'s' * (len(faces) > 1)}"]
    return _Table(samples, lambda rows: found, notes)


def _promised(path: Path) -> tuple[int, int]:
    """How many vertices and faces a mesh is to have, at least, by its header. Raises BrokenCloud: it has no end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1 << 12)
        file.seek(max(size - 256, 0))
        tail = file.read()
    if path.suffix.lower() == ".off":
        words = b" ".join(line.partition(b"#")[0] for line in head.splitlines())
        counts = re.match(rb"\s*[A-Z4n]*OFF\s*(\d+)\s+(\d+)\s", words)
        return (int(counts[1]), int(counts[2])) if counts else (0, 0)
    if path.suffix.lower() == ".stl":
        if head.lstrip().startswith(b"solid") and b"facet" in head:
            if b"endsolid" not in tail:
                raise BrokenCloud(f"{path}: cut short, it has no end")
        elif size >= 84:
            faces = int.from_bytes(head[80:84], "little")
            if size < 84 + 50 * faces:
                raise BrokenCloud(f"{path}: cut short, {(size - 84) // 50:,} of {faces:,} faces are there")
    return 0, 0


# -- text -------------------------------------------------------------------------------------------------------------


def _lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Lines that hold something, from byte `start` on, without the mark that Windows puts before UTF-8."""
    with open(path, "rb") as file:
        file.seek(start or 3 * (file.read(3) == codecs.BOM_UTF8))
        for line in iter(lambda: file.readline(_LARGEST_LINE), b""):
            if len(line) == _LARGEST_LINE or b"\0" in line:
                raise BrokenCloud(f"{path}: not lines of numbers")
            if line := line.strip():
                yield line


def _is_comment(line: bytes) -> bool:
    return line.startswith((b"#", b"//"))


def _plain(line: bytes) -> str:
    """A line with spaces between its numbers, and points in them.

    Commas are in numbers where semicolons stand between them, or spaces between all: "1,5;2;3,5" and "1,5 2 3,5".
    """
    text = line.decode("latin-1")
    if "," in text:
        words = text.split()
        inside = ";" in text or "." not in text and len(words) > 2 and not any(_COMMAS.search(word) for word in words)
        text = text.replace(",", "." if inside else " ")
    return text.replace(";", " ")


_COMMAS = re.compile(r"^,|,$|,.*,")  # of a word: some that stand between numbers


def _split(line: bytes) -> list[str]:
    return _plain(line).split()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _text(path: Path, names, samples, seed) -> _Table:
    """Lines of numbers with anything between them; comments, a line of names, or .pts's count may come first."""
    header, skipped, total, width = [], 0, 0, 0
    for line in _lines(path):
        if not total and (_is_comment(line) or not _is_number("".join(_split(line)[:1]))):
            header, skipped = _split(line.lstrip(b"#/")), skipped + 1
            continue
        if not total and not width and len(_split(line)) == 1:  # the number of points
            width, skipped = 1, skipped + 1
            continue
        if not _is_comment(line):
            width = width if total else len(_split(line))
            total += 1
    if header and not total and not _is_comment(line):
        raise BrokenCloud(f"{path}: no line of it begins with a number")
    header = [_known(name) for name in header]
    named = not names and len(header) == width and {"x", "y", "z"} <= set(header)

    def read(rows):
        table = _text_rows(path, 0, skipped, total, rows)
        return _named(table, header) if named else table

    return _Table(total, read)


def _text_rows(path: Path, start: int, skipped: int, total: int, rows: np.ndarray | None) -> np.ndarray:
    """(N, columns) float64: rows of the `total` lines that follow `skipped` ones from byte `start` on."""
    lines = (line for i, line in enumerate(_lines(path, start)) if i >= skipped and not _is_comment(line))
    lines = islice(lines, total)
    if rows is not None:
        wanted = iter(rows.tolist())
        following = next(wanted)
        chosen = []
        for i, line in enumerate(lines):
            if i == following:
                chosen.append(line)
                if (following := next(wanted, None)) is None:
                    break
        lines, total = iter(chosen), len(rows)
    blocks, count = [], 0
    while block := list(islice(lines, _BLOCK)):
        try:
            blocks.append(np.loadtxt(map(_plain, block), np.float64, comments=None, ndmin=2))
        except ValueError:
            raise BrokenCloud(f"{path}: {_first_wrong(block)}") from None
        count += len(block)
        if blocks[-1].shape[1] != blocks[0].shape[1]:
            raise BrokenCloud(f"{path}: lines of {blocks[0].shape[1]} numbers, and of {blocks[-1].shape[1]}")
    if count < total:
        raise BrokenCloud(f"{path}: cut short, {count:,} of {total:,} points are there")
    return np.concatenate(blocks)


def _first_wrong(block: list[bytes]) -> str:
    """What is wrong with lines that are no table."""
    width = len(_split(block[0]))
    for line in block:
        words = _split(line)
        if wrong := [word for word in words if not _is_number(word)]:
            return f"{wrong[0][:40]!r} is no number"
        if len(words) != width:
            return f"lines of {width} numbers, and of {len(words)}"
    return "not lines of numbers"


_READERS: dict[str, Callable[[Path, list[str], int, int], _Table]] = {
    ".ply": _ply, ".pcd": _pcd, ".las": _las, ".laz": _las, ".npy": _npy, ".npz": _npz,
    ".txt": _text, ".xyz": _text, ".pts": _text, ".asc": _text, ".csv": _text,
    ".bin": _bin, ".off": _mesh, ".obj": _mesh, ".stl": _mesh,
}  # fmt: skip
