"""What the paths, folders, patterns and lists that a user gives mean."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linescan.errors import InputError
from linescan.media.find import find, find_images, find_videos, pair


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def paths(sources, root: Path) -> list[str]:
    assert all(source.error is None for source in sources)
    return [os.path.relpath(source.path, root) for source in sources]


def errors(sources) -> list[str]:
    return [str(source.error) for source in sources if source.error]


def test_folders_hold_what_their_suffixes_say_and_nothing_hidden(tmp_path):
    make(tmp_path, "a.PNG", "b.jpeg", "sub/c.tif", "d.mp4", "notes.txt", "x.pdf", "x.eps")
    make(tmp_path, ".hidden.png", "._a.PNG", ".cache/e.png", "sub/.DS_Store")
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path / "gone.png", tmp_path / "dangling.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert paths(find([tmp_path], ["image"]), tmp_path) == ["a.PNG", "b.jpeg", "sub/c.tif"]
    assert paths(find([tmp_path]), tmp_path) == ["a.PNG", "b.jpeg", "d.mp4", "sub/c.tif"]
    assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == ["a.PNG", "b.jpeg", "sub/c.tif"]
    assert find([tmp_path / ".hidden.png"])[0].error is None, "what is named is taken"


def test_one_missing_path_among_good_ones(tmp_path):
    make(tmp_path, "a.png", "b.png", "clip.mp4")
    (tmp_path / "empty").mkdir()
    arguments = ["b.png", "gone.png", "*.tif", "empty", "clip.mp4", "a.png", "x" * 300 + ".png", "nul\0.png"]
    sources = find([tmp_path / a if "\0" not in a else a for a in arguments], ["image"])
    assert [s.path.name for s in sources if not s.error] == ["b.png", "a.png"]
    for message, words in zip(
        errors(sources),
        ["gone.png does not exist", "no file matches", "empty holds no images", "clip.mp4 is a video; only images",
         "File name too long", "not a path"],
    ):  # fmt: skip
        assert words in message and "\n" not in message
    assert len(sources) == 8
    assert errors(find([tmp_path / "a.png"], ["video", "frames"])) == [
        f"{tmp_path}/a.png is an image; only videos or folders of frames are read here"
    ]
    with pytest.raises(InputError, match="no images are given"):
        find([], ["image"])
    with pytest.raises(InputError, match="image, video, frames, cloud, volume, not 'sound'"):
        find(["x"], ["sound"])


def test_patterns_and_names_that_look_like_them(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "b.png", "photo [old].jpg", "deep/er/c.png", "deep/d.png", ".h/e.png", ".f.png")
    monkeypatch.chdir(tmp_path)
    assert paths(find(["*.png"]), tmp_path) == ["a.png", "b.png"]
    assert paths(find(["**/*.png"]), tmp_path) == ["a.png", "b.png", "deep/d.png", "deep/er/c.png"]
    assert paths(find([tmp_path / "[ab].png"]), tmp_path) == ["a.png", "b.png"]
    assert paths(find(["photo [old].jpg"]), tmp_path) == ["photo [old].jpg"], "a name comes before a pattern"
    make(tmp_path, "in [1]/x.png", "in [1]/*/y.png")
    assert paths(find(["in [1]/x*"]), tmp_path) == ["in [1]/x.png"], "also in front of one"
    assert paths(find(["in [1]/**/*.png"]), tmp_path) == ["in [1]/*/y.png", "in [1]/x.png"]
    assert find(["in [1]/none.png"])[0].error
    assert paths(find(["d*"]), tmp_path) == ["deep/d.png", "deep/er/c.png"], "folders match, too"
    assert paths(find([".h/*.png"]), tmp_path) == [".h/e.png"]
    assert paths(find([".*.png"]), tmp_path) == [".f.png"]
    assert errors(find(["a**b"])) == ["no file matches a**b"]


def test_a_list_on_standard_input(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "with space.png", "c.png")
    lines = f"{tmp_path}/with space.png\n\n{tmp_path}/gone.png\r\n{tmp_path}/[c].png\n"
    sources = find([tmp_path / "a.png", "-"], stdin=io.StringIO(lines))
    assert [s.path.name for s in sources if not s.error] == ["a.png", "with space.png", "c.png"]
    assert errors(sources) == [f"{tmp_path}/gone.png does not exist"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(str(tmp_path)))
    assert len(find(["-"])) == 3


def test_each_file_once(tmp_path, monkeypatch):
    make(tmp_path, "in/a.png", "in/b.png")
    os.symlink("in", tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    assert paths(find(["in/b.png", "in", "./in/../in/a.png", "again", "in/*"]), tmp_path) == ["in/b.png", "in/a.png"]


def test_links_are_followed_and_loops_end(tmp_path):
    make(tmp_path, "root/a.png", "elsewhere/b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "link")
    for i in range(12):  # each of these doubles the number of ways in
        os.symlink(tmp_path / "root", tmp_path / "root" / f"loop{i}")
        os.symlink(tmp_path / "root", tmp_path / "elsewhere" / f"back{i}")
    os.symlink("itself.png", tmp_path / "root" / "itself.png")
    assert paths(find([tmp_path / "root"]), tmp_path) == ["root/a.png", "root/link/b.png"]
    sources = find([tmp_path / "root" / "**" / "*.png"])
    assert [s.path.name for s in sources if not s.error] == ["a.png"] and "itself.png is not a file" in errors(sources)[
        0
    ]


def test_very_deep_folders(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    make(tmp_path, "a.png")
    assert paths(find([tmp_path]), tmp_path) == ["a.png"]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # too deep for pytest, which removes old folders


def as_somebody(test) -> int:
    """The exit status of `test` in a process that is not root's."""
    child = os.fork()
    if not child:
        status = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            test()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_folder_that_cannot_be_read_is_an_error_and_the_rest_goes_on(tmp_path):
    make(tmp_path, "a.png", "locked/b.png", "open/c.png")
    (tmp_path / "locked").chmod(0)
    os.chmod(tmp_path, 0o755)

    def look():
        os.chdir(tmp_path)
        sources = find(["."])
        assert [s.path.name for s in sources if not s.error] == ["a.png", "c.png"]
        assert errors(sources) == ["./locked: Permission denied"]
        assert errors(find(["locked/b.png"])) == ["'locked/b.png': Permission denied"]
        with pytest.raises(InputError, match="locked: Permission denied"):
            find_images(".")

    old = os.getcwd()
    os.chdir(tmp_path)
    try:
        for folder in (tmp_path, *tmp_path.parents[:3]):
            if str(folder).startswith("/tmp/pytest"):
                folder.chmod(0o755)
        assert as_somebody(look) == 0
    finally:
        os.chdir(old)
        (tmp_path / "locked").chmod(0o755)


def test_videos_are_files_and_folders_of_frames(tmp_path):
    make(tmp_path, "clips/a.mp4", "clips/b.webm", "clips/cover.jpg", "frames/0.png", "frames/1.png")
    make(tmp_path, "nested/x/0.jpg", "nested/y/0.jpg", "nested/stray.png", "text/readme.md")
    wanted = ["clips/a.mp4", "clips/b.webm", "frames", "nested/x", "nested/y"]
    assert [str(p.relative_to(tmp_path)) for p in find_videos(tmp_path)] == wanted
    assert paths(find([tmp_path], ["video", "frames"]), tmp_path) == wanted
    assert find_videos(tmp_path / "frames") == [tmp_path / "frames"]
    [source] = find([tmp_path / "frames"], ["video", "frames"])
    assert source.name == "frames"
    os.chdir(tmp_path / "frames")
    assert [s.name for s in find(["."], ["frames"])] == ["frames"]


def test_what_lies_in_the_output_folder_is_passed_over(tmp_path):
    make(tmp_path, "a.png", "out/overlays/a.png")
    assert paths(find([tmp_path], exclude=[tmp_path / "out"]), tmp_path) == ["a.png"]
    assert paths(find([tmp_path / "**/*.png"], exclude=[tmp_path / "out"]), tmp_path) == ["a.png"]


def test_outputs_never_share_a_name(tmp_path):
    make(tmp_path, "one/x.png", "one/x.jpg", "one/X.bmp", "one/y.tar.png", "two/x.png", "two/sub/z.png", "sub/z.png")
    make(tmp_path, "v/clip.mp4", "v/clip/000000.png", "v/CLIP.mkv", "v/plain.png", "v/plain/0.png")
    names = [s.name for s in find([tmp_path / "one", tmp_path / "two", tmp_path / "v", tmp_path / "sub" / "z.png"])]
    assert len({name.casefold() for name in names}) == len(names) == 12
    assert names[:4] == ["X.bmp", "x.jpg", "x.png", "y.tar"]
    assert {"sub/z", "x.png-2", "plain", "plain/0", "z"} <= set(names)
    folders = {name for name in names if "clip" in name.casefold() and "/" not in name}
    inside = {str(Path(name).parent) for name in names}
    assert len(folders) == 2 and not folders & inside, "no image lies among the frames of a video"


def test_nothing_lies_among_the_frames_of_a_video(tmp_path):
    make(tmp_path, "film.mp4", "photos/film/0.png", "photos/film/1.png")
    assert [s.name for s in find([tmp_path / "film.mp4", tmp_path / "photos"])] == [
        "film",
        "film-2/0.png",
        "film-2/1.png",
    ]
    assert [s.name for s in find([tmp_path / "photos", tmp_path / "film.mp4"])] == ["film/0", "film/1", "film.mp4"]


def test_pairs_are_files_of_one_name(tmp_path):
    first = "a.png", "sub/a.png", "dup.png", "dup.jpg", "caf\u00e9.png", "e\u0301t\u00e9.png", "alone.png", "gone.png"
    make(tmp_path, *(f"rgb/{name}" for name in first))
    make(
        tmp_path,
        "x/a.jpg",
        "x/sub/a.tif",
        "x/dup.png",
        "x/cafe\u0301.png",
        "x/\u00e9t\u00e9.png",
        "x/other.png",
        "x/gone.mp4",
    )
    found = pair(find([tmp_path / "rgb"], ["image"]), find([tmp_path / "x", tmp_path / "x/gone.mp4"], ["image"]))
    together = {os.path.relpath(s.path, tmp_path): s.partners for s in found if not s.error}
    want = {"rgb/a.png": "a.jpg", "rgb/sub/a.png": "sub/a.tif", "rgb/caf\u00e9.png": "cafe\u0301.png"}
    want["rgb/e\u0301t\u00e9.png"] = "\u00e9t\u00e9.png"
    assert together == {name: (tmp_path / "x" / other,) for name, other in want.items()}
    said = errors(found)
    assert len(said) == 6
    for name in (
        "alone.png: it has no partner named alone", "other.png: it has no partner named other",
        "dup.jpg: it has no partner named dup.jpg; two files", "rgb/dup.png: it has no partner named dup.png; two",
        "x/dup.png: it has no partner named dup", "gone.mp4 is a video",
    ):  # fmt: skip
        assert sum(name in line for line in said) == 1, name
    make(tmp_path, "before.png", "after.jpg")
    (only,) = pair(find([tmp_path / "before.png"]), find([tmp_path / "after.jpg"]))
    assert only.name == "before" and only.partners == (tmp_path / "after.jpg",), "the only two, whatever their names"
