"""Files of every format, written by other programs' libraries; broken ones; more points than fit."""

import io
import os
import pickle
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from linescan.errors import BrokenCloud, InputError
from linescan.media import points as module
from linescan.media.find import find, find_clouds
from linescan.media.formats import _CLOUDS, is_cloud
from linescan.media.points import points_of_array, read_points

laspy, plyfile, pypcd4, trimesh = map(pytest.importorskip, ("laspy", "plyfile", "pypcd4", "trimesh"))

COUNT = 500


@pytest.fixture(scope="module")
def cloud():
    """Everything that a file can hold."""
    random = np.random.default_rng(0)
    normals = random.normal(size=(COUNT, 3))
    return dict(
        points=random.normal(size=(COUNT, 3)).astype(np.float32),
        normals=(normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32),
        intensity=random.random(COUNT).astype(np.float32),
        colours=random.integers(0, 256, (COUNT, 3)).astype(np.uint8),
        labels=random.integers(0, 20, COUNT),
    )


def records(cloud, names="x y z nx ny nz red green blue intensity label"):
    """A structured array, as plyfile and pypcd4 take it."""
    columns = dict(zip(("x", "y", "z"), cloud["points"].T)) | dict(zip(("nx", "ny", "nz"), cloud["normals"].T))
    columns |= dict(zip(("red", "green", "blue"), cloud["colours"].T))
    columns |= {"intensity": cloud["intensity"], "label": cloud["labels"].astype(np.int32)}
    table = np.empty(COUNT, [(name, columns[name].dtype) for name in names.split()])
    for name in table.dtype.names:
        table[name] = columns[name]
    return table


def check(read, cloud, *attributes, tolerance=1e-5):
    """`read` has these attributes, and no others."""
    assert read.points.dtype == np.float32 and len(read) == len(cloud["points"])
    assert np.allclose(read.points + read.origin, cloud["points"], atol=tolerance)
    for name in ("normals", "intensity", "colours", "labels"):
        got = getattr(read, name)
        if name in attributes:
            assert np.allclose(got, cloud[name], atol=tolerance), name
        else:
            assert got is None, name


ALL = "normals", "intensity", "colours", "labels"


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ascii", "little", "big"])
def test_ply(tmp_path, cloud, form):
    vertices = plyfile.PlyElement.describe(records(cloud), "vertex")
    faces = np.empty(0, [("vertex_indices", "i4", (3,))])
    others = np.zeros(7, [("a", "f8"), ("b", "u1")])
    elements = [plyfile.PlyElement.describe(others, "camera"), vertices, plyfile.PlyElement.describe(faces, "face")]
    data = plyfile.PlyData(elements, text=form == "ascii", byte_order="<" if form == "little" else ">")
    data.comments = ["made by a test"]
    data.write(tmp_path / "a.ply")
    read = read_points(tmp_path / "a.ply")
    check(read, cloud, *ALL)
    assert read.total == COUNT and read.notes == []
    assert repr(read) == "<PointCloud of 500 points with intensity, normals, colours, labels>"


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path, cloud, encoding):
    table = records(cloud, "x y z intensity label")
    fields = table.dtype.names
    pcd = pypcd4.PointCloud.from_points([table[f] for f in fields], fields, [table.dtype[f] for f in fields])
    pcd.save(tmp_path / "a.pcd", encoding=pypcd4.Encoding(encoding))
    check(read_points(tmp_path / "a.pcd"), cloud, "intensity", "labels", tolerance=1e-4)


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_pcd_with_packed_colours_and_without_counts(tmp_path, cloud, encoding):
    rgb = pypcd4.PointCloud.encode_rgb(cloud["colours"])
    columns = [*cloud["points"].T, rgb.ravel()]
    pypcd4.PointCloud.from_xyzrgb_points(np.stack(columns, 1)).save(
        tmp_path / "a.pcd", encoding=pypcd4.Encoding(encoding)
    )
    written = (tmp_path / "a.pcd").read_bytes()
    head, data = written.split(b"DATA", 1)
    head = b"\n".join(line for line in head.split(b"\n") if not line.startswith(b"COUNT"))
    (tmp_path / "b.pcd").write_bytes(head + b"DATA" + data)
    for name in ("a.pcd", "b.pcd"):
        read = read_points(tmp_path / name)
        if encoding == "binary":
            check(read, cloud, "colours")
        else:  # the float that holds the bits is written with too few digits
            check(read, cloud | {"colours": read.colours}, "colours", tolerance=1e-4)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize("point_format", [0, 3, 7])
def test_las(tmp_path, cloud, suffix, point_format):
    header = laspy.LasHeader(point_format=point_format, version="1.4")
    place = np.array([432_100.0, 5_678_900.0, 120.0])
    header.offsets, header.scales = place, np.full(3, 1e-5)
    las = laspy.LasData(header)
    las.xyz = cloud["points"] + place
    las.intensity = (cloud["intensity"] * 60_000).astype(np.uint16)
    las.classification = cloud["labels"].astype(np.uint8)
    attributes = ["intensity", "labels"]
    if point_format:
        las.red, las.green, las.blue = cloud["colours"].T.astype(np.uint16) * 257
        attributes.append("colours")
    las.write(tmp_path / f"a{suffix}")
    read = read_points(tmp_path / f"a{suffix}")
    assert (read.origin[:2] != 0).all() and (read.origin == np.round(read.origin)).all()
    assert np.abs(read.points).max() < 10
    whole = cloud | {"points": cloud["points"] + place, "intensity": np.floor(cloud["intensity"] * 60_000)}
    check(read, whole, *attributes, tolerance=2e-5)


@pytest.mark.parametrize(
    "suffix, version, place, size, reason",
    [
        (".las", "1.2", 100, 4, "its header"),  # the number of records of metadata
        (".las", "1.4", 243, 4, "its header"),  # the number of those behind the points
        (".las", "1.2", 94, 2, "its header"),  # the header's own size
        (".las", "1.2", 107, 4, "cut short"),  # the number of points
        (".laz", "1.2", None, 4, "its table of chunks"),
    ],
)
def test_las_files_that_promise_too_much_cost_nothing(tmp_path, cloud, suffix, version, place, size, reason):
    las = laspy.LasData(laspy.LasHeader(point_format=3 if version == "1.2" else 7, version=version))
    las.xyz = cloud["points"]
    path = tmp_path / f"a{suffix}"
    las.write(path)
    data = bytearray(path.read_bytes())
    if place is None:
        begin = int.from_bytes(data[96:100], "little")
        place = int.from_bytes(data[begin : begin + 8], "little") + 4
    data[place : place + size] = b"\xf0" * size
    path.write_bytes(data)
    with pytest.raises(BrokenCloud, match=reason):
        read_points(path)


def test_unset_dimensions_of_las_are_none(tmp_path, cloud):
    las = laspy.LasData(laspy.LasHeader(point_format=3, version="1.2"))
    las.xyz = cloud["points"]
    las.write(tmp_path / "a.las")
    check(read_points(tmp_path / "a.las"), cloud, tolerance=0.01)


def test_npy(tmp_path, cloud):
    table = np.concatenate((cloud["points"], cloud["normals"], cloud["labels"][:, None]), 1)
    np.save(tmp_path / "a.npy", table)
    check(read_points(tmp_path / "a.npy"), cloud, "normals", "labels")
    np.save(tmp_path / "b.npy", np.asfortranarray(table))
    check(read_points(tmp_path / "b.npy"), cloud, "normals", "labels")
    np.save(tmp_path / "c.npy", records(cloud))
    check(read_points(tmp_path / "c.npy"), cloud, *ALL)
    np.save(tmp_path / "d.npy", (cloud["points"] * 100).astype(np.int16))
    assert np.array_equal(read_points(tmp_path / "d.npy").points, (cloud["points"] * 100).astype(np.int16))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, cloud, save):
    save(tmp_path / "a.npz", **cloud, camera=np.eye(4))
    check(read_points(tmp_path / "a.npz"), cloud, *ALL)
    save(tmp_path / "b.npz", pos=np.asfortranarray(cloud["points"]), other=np.zeros(COUNT), normal=cloud["normals"])
    check(read_points(tmp_path / "b.npz"), cloud, "normals")
    save(tmp_path / "d.npz", points=cloud["points"], colours=cloud["colours"] / 255)  # from 0 to 1
    check(read_points(tmp_path / "d.npz"), cloud, "colours")
    save(tmp_path / "c.npz", whatever=np.concatenate((cloud["points"], cloud["intensity"][:, None]), 1))
    check(read_points(tmp_path / "c.npz"), cloud, "intensity")


COLUMNS = {
    "xyz": ("points",),
    "xyzi": ("points", "intensity"),
    "xyzn": ("points", "normals"),
    "xyzc": ("points", "colours"),
    "xyznl": ("points", "normals", "labels"),
    "xyzcl": ("points", "colours", "labels"),
    "xyzic": ("points", "intensity", "colours"),
}


@pytest.mark.parametrize(
    "suffix, delimiter", [(".txt", ","), (".xyz", " "), (".asc", "\t"), (".csv", ";"), (".pts", " ")]
)
@pytest.mark.parametrize("columns", COLUMNS)
def test_text(tmp_path, cloud, suffix, delimiter, columns):
    table = np.concatenate([cloud[part].reshape(COUNT, -1) for part in COLUMNS[columns]], 1)
    whole = (table == table.round()).all(0)
    path = tmp_path / f"a{suffix}"
    rows = [delimiter.join(f"{v:.0f}" if w else f"{v:.7g}" for v, w in zip(row, whole)) for row in table]
    path.write_text("".join(f"{row}\n" for row in ([str(COUNT)] if suffix == ".pts" else []) + rows))
    if suffix == ".pts" and columns == "xyzcl":  # scanners write whole intensities, then colours
        found = read_points(path)
        assert np.array_equal(np.column_stack([found.intensity, found.colours]), table[:, 3:]) and found.labels is None
        return
    check(read_points(path), cloud, *COLUMNS[columns][1:])


@pytest.mark.parametrize("sign", [";", " ", "\t"])
def test_text_with_commas_in_its_numbers(tmp_path, cloud, sign):
    """As spreadsheets of half of the world save it, with the mark that Windows puts first."""
    rows = np.concatenate((np.zeros((1, 3)), cloud["points"]))
    lines = [sign.join(f"{value:.6g}".replace(".", ",") for value in row) for row in rows]
    for first in ("", sign.join("xyz") + "\n"):
        (tmp_path / "a.csv").write_text(first + "\n".join(lines), encoding="utf-8-sig")
        check(read_points(tmp_path / "a.csv"), {"points": rows}, tolerance=1e-4)


def test_text_with_names_comments_and_blank_lines(tmp_path, cloud):
    (tmp_path / "a.csv").write_text(
        '"Label","X","Y","Z","time"\n'
        + "".join(f"{label},{x},{y},{z},0\n" for label, (x, y, z) in zip(cloud["labels"], cloud["points"]))
    )
    check(read_points(tmp_path / "a.csv"), cloud, "labels")
    (tmp_path / "b.txt").write_text(
        "# from somewhere\n//X Y Z Intensity\r\n\r\n"
        + "\r\n\n".join(f"{x} {y}  {z} {i}" for (x, y, z), i in zip(cloud["points"], cloud["intensity"]))
    )
    check(read_points(tmp_path / "b.txt"), cloud, "intensity")


def test_columns_can_be_named(tmp_path, cloud):
    table = np.stack([cloud["intensity"], *cloud["points"].T, cloud["intensity"], cloud["labels"]], 1)
    np.savetxt(tmp_path / "a.txt", table)
    read = read_points(tmp_path / "a.txt", columns="- x y z intensity label")
    check(read, cloud, "intensity", "labels")
    assert read.notes == ["1 of 6 columns are not used"]
    table[:, :5].astype("<f4").tofile(tmp_path / "a.bin")
    check(read_points(tmp_path / "a.bin", columns=["intensity", "x", "y", "z", "-"]), cloud, "intensity")


def test_kitti_semantickitti_and_nuscenes(tmp_path, cloud):
    scan = np.concatenate((cloud["points"], cloud["intensity"][:, None]), 1).astype("<f4")
    for name in ("velodyne/000001.bin", "other/000001.bin"):
        (tmp_path / name).parent.mkdir()
        scan.tofile(tmp_path / name)
    (tmp_path / "labels").mkdir()
    (cloud["labels"] + (77 << 16)).astype("<u4").tofile(tmp_path / "labels/000001.label")
    check(read_points(tmp_path / "velodyne/000001.bin"), cloud, "intensity", "labels")
    check(read_points(tmp_path / "other/000001.bin"), cloud, "intensity")
    np.concatenate((scan, scan[:, :1]), 1).tofile(tmp_path / "a.pcd.bin")
    check(read_points(tmp_path / "a.pcd.bin"), cloud, "intensity")
    few = read_points(tmp_path / "velodyne/000001.bin", limit=40)
    row = [cloud["points"].tolist().index(p) for p in few.points.tolist()]
    assert np.array_equal(few.labels, cloud["labels"][row]) and row == sorted(row)
    (tmp_path / "labels/000001.label").write_bytes(b"\0" * 8)
    with pytest.raises(BrokenCloud, match="000001.label: 2 labels for 500 points"):
        read_points(tmp_path / "velodyne/000001.bin")


@pytest.mark.parametrize("suffix", [".ply", ".off", ".obj", ".stl"])
def test_meshes_are_sampled_on_their_surface(tmp_path, suffix):
    ball = trimesh.creation.icosphere(subdivisions=3, radius=2.0)
    ball.export(tmp_path / f"a{suffix}")
    read = read_points(tmp_path / f"a{suffix}", samples=2000)
    assert len(read) == 2000 and read.notes == ["2,000 points sampled on 1,280 faces"]
    assert np.allclose(np.linalg.norm(read.points, axis=1), 2, atol=0.03)
    assert np.allclose(read.normals, read.points / 2, atol=0.15)
    assert np.abs(read.points.mean(0)).max() < 0.1  # as many everywhere
    assert np.array_equal(read_points(tmp_path / f"a{suffix}", samples=2000).points, read.points)
    assert not np.array_equal(read_points(tmp_path / f"a{suffix}", samples=2000, seed=1).points, read.points)
    assert len(read_points(tmp_path / f"a{suffix}", limit=50)) == 50


OUTLINES = {3: [(0, 0), (2, 0), (0, 4)], 4: [(0, 0), (2, 0), (2, 4), (0, 4)]}
OUTLINES[6] = [*OUTLINES[4], (0, 3), (0, 2)]


@pytest.mark.parametrize("form", ["ascii", "little", "big"])
@pytest.mark.parametrize("corners", [(3, 3), (4, 4), (3, 4), (6, 3)], ids=str)
def test_ply_with_faces_is_a_mesh(tmp_path, form, corners):
    """Two faces of any number of corners side by side, one red and of class 7, one green and of class 3."""
    sides = [[(x + 2 * i, y) for x, y in OUTLINES[count]] for i, count in enumerate(corners)]
    rows = [(x, y, 1, *((255, 0, 0, 7), (0, 255, 0, 3))[i]) for i, side in enumerate(sides) for x, y in side]
    kinds = [*((name, "f4") for name in "xyz"), *((name, "u1") for name in ("red", "green", "blue", "label"))]
    faces = np.empty(2, [("flags", "u1"), ("vertex_indices", object)])
    faces["flags"], faces["vertex_indices"][:] = 5, np.split(np.arange(len(rows), dtype="i4"), corners[:1])
    elements = [
        plyfile.PlyElement.describe(faces, "face"),
        plyfile.PlyElement.describe(np.array(rows, kinds), "vertex"),
    ]
    data = plyfile.PlyData(elements, text=form == "ascii", byte_order="<" if form == "little" else ">")
    data.write(tmp_path / "a.ply")
    read = read_points(tmp_path / "a.ply", samples=400)
    assert len(read) == 400 and read.notes[0].startswith("400 points sampled on ")
    assert (read.points[:, 2] == 1).all() and (read.normals == (0, 0, 1)).all()
    first = read.points[:, 0] < 2
    areas = [4 if count == 3 else 8 for count in corners]
    assert abs(first.mean() - areas[0] / sum(areas)) < 0.07
    assert np.array_equal(read.labels, np.where(first, 7, 3))
    assert np.array_equal(read.colours, np.where(first[:, None], (255, 0, 0), (0, 255, 0)))
    assert np.array_equal(read_points(tmp_path / "a.ply", samples=400).points, read.points)


def test_points_of_a_mesh_have_the_class_of_the_nearest_vertex(tmp_path):
    text = MESH.format(1, "0 1 2").replace("float z", "float z\nproperty uchar label")
    path = write(tmp_path, "a.ply", text.replace("0 0 0\n1 0 0\n0 2 0", "0 0 0 5\n1 0 0 6\n0 2 0 7"))
    read = read_points(path, samples=200)
    distance = np.linalg.norm(read.points[:, None] - [(0, 0, 0), (1, 0, 0), (0, 2, 0)], axis=2)
    assert np.array_equal(read.labels, 5 + distance.argmin(1)) and len(set(read.labels.tolist())) == 3


def test_odd_meshes(tmp_path):
    ball = trimesh.creation.icosphere()
    text = ball.export(file_type="off").replace("OFF\n", "OFF", 1)  # as many files of ModelNet40 begin
    (tmp_path / "a.off").write_text(text)
    assert len(read_points(tmp_path / "a.off")) == 10_000
    (tmp_path / "b.stl").write_text(ball.export(file_type="stl_ascii"))
    assert read_points(tmp_path / "b.stl").normals is not None
    (tmp_path / "c.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 2 0\n")
    assert read_points(tmp_path / "c.obj").points.tolist() == [[0, 0, 0], [1, 0, 0], [0, 2, 0]]
    (tmp_path / "d.obj").write_text("mtllib none.mtl\nv 0 0 0\nv 1 0 0\nv 0 2 0\nusemtl a\nf 1 2 3\n")
    assert len(read_points(tmp_path / "d.obj", samples=10)) == 10


# -- more than wanted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.ply", "t.ply", "a.pcd", "a.laz", "a.npy", "a.npz", "a.txt", "a.bin", "f.npy"])
def test_of_many_points_some_are_drawn(tmp_path, monkeypatch, name):
    """Row i is at (i, 0, 0): one of each run, the same with any size of the blocks that are read."""
    table = np.zeros((1000, 4), np.float32)
    table[:, 0] = np.arange(1000)
    path = tmp_path / name
    if name.endswith(".ply"):
        rows = np.rec.fromarrays(table.T, names="x,y,z,intensity")
        plyfile.PlyData([plyfile.PlyElement.describe(np.array(rows), "vertex")], text=name[0] == "t").write(path)
    elif name == "a.pcd":
        pypcd4.PointCloud.from_xyzi_points(table).save(path)
    elif name == "a.laz":
        las = laspy.LasData(laspy.LasHeader(point_format=0, version="1.2"))
        las.xyz = table[:, :3]
        las.write(path)
    elif name.endswith(".npy"):
        np.save(path, np.asfortranarray(table) if name[0] == "f" else table)
    elif name == "a.npz":
        np.savez(path, points=table)
    elif name == "a.txt":
        np.savetxt(path, table)
    else:
        table.tofile(path)
    read = read_points(path, limit=100)
    assert read.total == 1000
    assert read.notes == ["100 of 1,000 points, drawn at random"]
    assert np.array_equal(read.points[:, 0].astype(int) // 10, np.arange(100))
    assert len(set(read.points[:, 0].astype(int) % 10)) == 10
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert np.array_equal(read_points(path, limit=100).points, read.points)
    assert not np.array_equal(read_points(path, limit=100, seed=1).points, read.points)
    assert len(read_points(path)) == 1000


def test_a_hundred_million_points_take_no_memory(tmp_path):
    """A file of 1.6 GB, which takes no room on the disk."""
    path = tmp_path / "a.bin"
    with open(path, "wb") as file:
        file.truncate(16 * 100_000_000)
    tracemalloc.start()
    read = read_points(path, limit=50)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.notes == ["50 of 100,000,000 points, drawn at random"] and len(read) == 50
    assert most < 2 * 16 * module._BLOCK + 2**22


# -- what cannot be read ----------------------------------------------------------------------------------------------


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


PLY = "ply\nformat {}\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
MESH = PLY.format("ascii 1.0", 3).replace(
    "end_header", "element face {}\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 2 0\n3 {}"
)
PCD = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {0}\nHEIGHT 1\nPOINTS {0}\nDATA {1}\n"


@pytest.mark.parametrize(
    "name, data, words",
    [
        *((f"a{suffix}", "", "holds no points") for suffix in (".ply", ".pcd", ".npz", ".npy", ".las", ".off")),
        ("a.ply", "ply\nformat ascii 1.0\n", "its header does not end"),
        ("a.ply", PLY.format("ascii 1.0", 0), "holds no points"),
        ("a.ply", PLY.format("ascii 1.0", 2) + "1 2 3\n", "cut short, 1 of 2 points are there"),
        ("a.ply", PLY.format("ascii 1.0", 2) + "1 2 3\n1 2 x\n", "'x' is no number"),
        ("a.ply", PLY.format("ascii 1.0", 1) + "1 2\n", "rows of 2 numbers, the header promises 3"),
        ("a.ply", PLY.format("binary_little_endian 1.0", 9) + "abc", "cut short, 0 of 9 points are there"),
        ("a.ply", PLY.format("binary_little_endian 1.0", 10**15) + "abc", "of 1,000,000,000,000,000 points are there"),
        ("a.ply", PLY.format("zip 1.0", 1), "unknown format 'zip'"),
        ("a.ply", PLY.format("ascii 1.0", "many"), r"not a .ply file, or damaged \(invalid literal"),
        ("a.ply", PLY.format("ascii 1.0", 1).replace(" z", " w") + "1 2 3", r"no coordinate z among .*\(x, y, w\)"),
        ("a.ply", PLY.format("ascii 1.0", 1).replace("vertex", "face") + "1 2 3", "it has no vertices"),
        ("a.pcd", PCD.format(0, "binary"), "holds no points"),
        ("a.pcd", PCD.format(3, "binary") + "abc", "cut short, 0 of 3 points are there"),
        ("a.pcd", PCD.format(3, "binary_compressed") + "abcdefghijklm", "not a .pcd file, or damaged"),
        ("a.pcd", PCD.format(10**9, "binary_compressed") + "abc", "11.2 GiB when unpacked, 2 at most"),
        ("a.pcd", PCD.format(2, "ascii") + "1 2 3", "cut short, 1 of 2"),
        ("a.pcd", PCD.format(2, "nothing"), "not a .pcd file, or damaged"),
        ("a.laz", "LASFxxxx" * 99, "not a .laz file, or damaged"),
        ("a.npy", "rubbish", "not a .npy file"),
        ("a.npy", "ply\n", "not a .npy file: its first bytes are those of a .ply file"),
        ("a.bin", b"\x93NUMPY" + b"1" * 26, "its first bytes are those of a .npy file"),
        ("a.npz", "rubbish", "not a .npz file, or damaged"),
        ("a.txt", "", "holds no points"),
        ("a.txt", "# nothing\n", "holds no points"),
        ("a.txt", "a b c\n", "no line of it begins with a number"),
        ("a.txt", "some words\n;\nand, others\n", "no line of it begins with a number"),
        ("a.txt", "1 2\n3 4\n", "a table of 2x2 float64; a cloud has rows of numbers, at least 3 columns each"),
        ("a.txt", "1 2 3\n4 5\n", "lines of 3 numbers, and of 2"),
        ("a.txt", "1 2 3\n4 5 tree\n", "'tree' is no number"),
        ("a.txt", "1 2 3\nnan 5 inf\n4 5 nan\n", None),
        ("a.txt", "nan nan nan\n1 inf 2\n", "none of its 2 points has finite coordinates"),
        ("a.txt", "1e300 0 0\n-1e300 0 0\n", "further apart than float32 can hold"),
        ("a.txt", b"1 2 3\n\0\0\0", "not lines of numbers"),
        ("a.txt", b"1" * 10**6, "not lines of numbers"),
        ("a.bin", b"", "holds no points"),
        ("a.bin", b"1" * 30, "30 bytes are no whole rows of 4 float32; KITTI's scans have 4"),
        ("a.pcd.bin", b"1" * 32, "32 bytes are no whole rows of 5 float32"),
        ("a.off", "OFF\n3 9", "not a .off file, or damaged"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n", "a mesh without area"),
        ("a.off", "OFF\n3 1 0\n0 0 nan\n1 1 1\n2 0 2\n3 0 1 2\n", "corners of its faces have no finite coordinates"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 1 1\n2 0 2\n3 0 1 7\n", "not a .off file, or damaged"),
        ("a.off", "OFF\n3 2 0\n0 0 0\n1 1 1\n2 0 2\n3 0 1 2\n", "cut short, 1 of 2 faces are there"),
        ("a.ply", MESH.format(1, "0 1 2"), None),
        ("a.ply", MESH.format(2, "0 1 2"), "not a .ply file, or damaged .*early end-of-file"),
        ("a.ply", MESH.format(10**12, "0 1 2"), "cut short, 1,000,000,000,000 faces are not there"),
        ("a.ply", MESH.format(1, "0 1 3"), "corners that are not among its 3 vertices"),
        ("a.ply", MESH.format(1, "0 1 -1"), "corners that are not among its 3 vertices"),
        ("a.ply", MESH.format(1, "0 1 1"), "a mesh without area"),
        ("a.ply", MESH.format(1, "0 1 2").replace("0 2 0", "0 nan 0"), "no finite coordinates"),
        ("a.ply", MESH.format(1, "0 1 2").replace("3 0 1", "2 0"), "none of its faces has three corners"),
        ("a.ply", MESH.format(1, "0 1 2").replace("list uchar int", "int"), "its faces are no lists"),
        ("a.stl", b" " * 80 + b"\2\0\0\0" + b"\0" * 60, "cut short, 1 of 2 faces are there"),
        ("a.stl", "solid a\nfacet normal 0 0 1\nouter loop\n", "cut short, it has no end"),
        ("a.obj", "rubbish", "holds no points|damaged"),
        ("a.stl", "rubbish", "holds no points|damaged"),
    ],
)
def test_one_line_for_what_cannot_be_read(tmp_path, name, data, words):
    path = write(tmp_path, name, data)
    if words is None:
        (note,) = read_points(path).notes
        assert note in ("2 points without finite coordinates left out", "10,000 points sampled on 1 face")
        return
    with pytest.raises(BrokenCloud, match=words) as caught:
        read_points(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_single_points_spoil_nothing(tmp_path, cloud):
    """One point far away does not move the others; numbers that are not finite become 0."""
    table = np.column_stack([cloud["points"], cloud["normals"]]).astype(np.float32)
    table[7, :3], table[9, 3:] = 1e6, np.nan
    np.save(tmp_path / "a.npy", table)
    read = read_points(tmp_path / "a.npy", columns="x y z nx ny nz")
    assert not read.origin.any() and np.array_equal(read.points, table[:, :3])
    assert np.array_equal(read.normals, np.nan_to_num(table[:, 3:]))
    assert read.notes == ["normals of 1 point not finite, taken as 0"]
    np.savetxt(tmp_path / "b.xyz", [(0, 0, 0, np.inf), (1, 2, 3, np.nan), (4, 5, 6, 0.5)])
    read = read_points(tmp_path / "b.xyz")
    assert read.intensity.tolist() == [0, 0, 0.5] and read.notes == ["intensity of 2 points not finite, taken as 0"]


def test_arrays_are_clouds_as_files_are(cloud):
    table = np.column_stack([cloud["points"], cloud["intensity"]])
    check(points_of_array(table), cloud, "intensity")
    check(points_of_array(table[:, [3, 0, 1, 2]], "- x y z"), cloud)
    table[0] = np.nan
    assert points_of_array(table).notes == ["1 point without finite coordinates left out"]
    cases = {
        "array: a table of 500x2": table[:, :2],
        "array: a table of 4 float32": table[0],
        "an array of 0x4 holds no points": table[:0],
        "array: none of its 1 points": table[:1],
    }
    for words, wrong in cases.items():
        with pytest.raises(InputError, match=words):
            points_of_array(wrong)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((0, 3)), "holds no points"),
        (np.zeros(7), "an array of 7; a cloud is"),
        (np.float32(3), "an array of a single value"),
        (np.zeros((2, 3, 4)), "an array of 2x3x4"),
        (np.zeros((5, 2)), "a table of 5x2 float64"),
        (np.full((5, 3), "a"), "a table of 5x3 <U1"),
        (np.zeros((5, 3), complex), "a table of 5x3 complex128"),
        (np.zeros(5, [("a", "f4")]), r"no coordinate x among its columns \(a\)"),
    ],
)
def test_arrays_that_are_no_clouds(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BrokenCloud, match=words):
        read_points(tmp_path / "a.npy")
    if array.ndim != 2 or array.shape[1] < 3:
        np.savez(tmp_path / "a.npz", a=array)
        with pytest.raises(BrokenCloud, match="no array points .* among: a"):
            read_points(tmp_path / "a.npz")


def test_no_file_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    bomb = np.array([Bomb()] * 3)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "a.npz", points=np.array([[Bomb()] * 3]))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(BrokenCloud):
            read_points(tmp_path / name)
    assert not (tmp_path / "boom").exists()


def test_an_archive_that_promises_more_than_it_holds(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="<f4", fortran_order=False, shape=(10**12, 3)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points.npy", buffer.getvalue())
    with pytest.raises(BrokenCloud, match="not a .npz file, or damaged"):
        read_points(tmp_path / "a.npz")


def test_damaged_files_never_end_in_another_error(tmp_path, cloud, caplog):
    """Every format, cut and overwritten anywhere: read, or refused in a line."""
    table = np.concatenate((cloud["points"], cloud["intensity"][:, None]), 1)[:60].astype(np.float32)
    rows = np.array(np.rec.fromarrays(table.T, names="x,y,z,intensity"))
    for text in (False, True):
        plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")], text=text).write(tmp_path / f"{text}.ply")
    for encoding in pypcd4.Encoding:
        if encoding != pypcd4.Encoding.BINARYSCOMPRESSED:
            pypcd4.PointCloud.from_xyzi_points(table).save(tmp_path / f"{encoding.value}.pcd", encoding=encoding)
    las = laspy.LasData(laspy.LasHeader(point_format=3, version="1.2"))
    las.xyz = table[:, :3]
    las.write(tmp_path / "a.las")
    las.write(tmp_path / "a.laz")
    np.save(tmp_path / "a.npy", table)
    np.savez_compressed(tmp_path / "a.npz", points=table)
    np.savetxt(tmp_path / "a.txt", table)
    table.tofile(tmp_path / "a.bin")
    for suffix in ("off", "obj", "stl", "ply"):
        trimesh.creation.box().export(tmp_path / f"a.{suffix}")
    random = np.random.default_rng(0)
    refused = 0
    caplog.clear()
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        for trial in range(25):
            bad = bytearray(good)
            if trial % 2:
                del bad[random.integers(len(bad)) :]
            else:
                for place in random.integers(0, len(bad), 1 + trial // 4):
                    bad[place] = random.integers(256)
            path.write_bytes(bad)
            try:
                assert np.isfinite(read_points(path, samples=10).points).all()
            except BrokenCloud as error:
                refused += 1
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        path.write_bytes(good)
        assert len(read_points(path)) >= 60
    assert refused > 100 and not caplog.records


def test_names_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.ply", "b/.1.ply", "a.PCD", "c.laz", "notes.md", "b/x.jpg"):
        write(tmp_path, name, "x")
    (tmp_path / "folder.ply").mkdir()
    assert [str(p.relative_to(tmp_path)) for p in find_clouds(tmp_path)] == ["a.PCD", "b/2.ply", "c.laz"]
    assert is_cloud("A.NPZ") and not is_cloud("a.jpg")
    assert _CLOUDS == set(module._READERS)
    found = find([tmp_path, tmp_path / "b/x.jpg"], ["cloud"])
    assert [s.name for s in found if not s.error] == ["a", "b/2", "c"]
    assert [str(s.error) for s in found if s.error] == [
        f"{tmp_path}/b/x.jpg is an image; only point clouds are read here"
    ]
    with pytest.raises(InputError, match="not a point cloud by its name; these are: .ply .pcd .las"):
        read_points("a.jpg")
    with pytest.raises(BrokenCloud, match="none.ply: No such file or directory"):
        read_points(tmp_path / "none.ply")
    with pytest.raises(BrokenCloud, match="folder.ply: Is a directory"):
        read_points(tmp_path / "folder.ply")
    with pytest.raises(InputError, match="unknown column 'w'; there are: x y z intensity"):
        read_points(tmp_path / "a.txt", columns="x y w")
    with pytest.raises(InputError, match="no column z in 'x y intensity'"):
        read_points(tmp_path / "a.txt", columns="x y intensity")
    with pytest.raises(InputError, match="column y is named twice"):
        read_points(tmp_path / "a.txt", columns="x y y z")
    for wrong in (dict(limit=0), dict(samples=0)):
        with pytest.raises(InputError, match="at least 1 point, not 0"):
            read_points(tmp_path / "c.laz", **wrong)


@pytest.mark.parametrize(
    "name, package",
    [
        ("a.pcd", "pypcd4"),
        ("a.las", "laspy"),
        ("a.laz", "laspy"),
        ("b.laz", "lazrs"),
        ("a.off", "trimesh"),
        ("a.ply", "plyfile"),
    ],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    path = write(tmp_path, name, MESH.format(1, "0 1 2") if name == "a.ply" else "x")
    with pytest.raises(InputError) as caught:
        read_points(path)
    assert not isinstance(caught.value, BrokenCloud)
    want = f"reading {path.suffix} files takes {package}; `pip install 'linescan[points]'` installs it"
    assert str(caught.value) == want
