"""Files are whole or absent, and nothing half-written stays."""

import errno
import os
import resource

import pytest
import torch

from linescan.engine.atomic import atomic, atomic_path, expect_folder, identities, inputs_kept, sweep
from linescan.errors import InputError


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_inputs_are_never_replaced_by_whatever_name(tmp_path):
    (tmp_path / "x").write_bytes(b"read")
    (tmp_path / "y").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    os.link(tmp_path / "x", tmp_path / "hard")
    with inputs_kept(identities([tmp_path / "x", tmp_path / "absent", "\0"])):
        for name in ("x", "link", "hard", "../" + tmp_path.name + "/x"):
            with pytest.raises(InputError, match="an output would replace this input"), atomic(tmp_path / name) as file:
                file.write(b"new")
        with atomic(tmp_path / "y") as file:
            file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"read" and (tmp_path / "y").read_bytes() == b"new"
    with atomic(tmp_path / "x") as file:
        file.write(b"new")
    assert names(tmp_path) == ["hard", "link", "x", "y"] and (tmp_path / "x").read_bytes() == b"new"


def test_folders_are_tried_out(tmp_path):
    """Permissions alone say nothing of what root may do, of read-only disks and of full ones."""
    expect_folder(tmp_path / "to" / "be" / "made")
    assert names(tmp_path) == []
    with pytest.raises(InputError, match="^/proc: nothing can be written into this folder .*; --out names another"):
        expect_folder("/proc/linescan")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(InputError, match="x is a file; --out needs a folder there"):
        expect_folder(tmp_path / "x" / "y")


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    with atomic(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"new, but not all of it")
        file.flush()
        raise RuntimeError
    assert path.read_bytes() == b"old" and names(tmp_path) == ["x"]
    with atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["x"]


def test_writers_that_open_the_file_themselves(tmp_path):
    path = tmp_path / "x.npy"
    with atomic_path(path) as partial:
        partial.write_text("whole")
        assert partial.parent == tmp_path and not path.exists()
    assert path.read_text() == "whole" and names(tmp_path) == ["x.npy"]
    with pytest.raises(FileNotFoundError) as error, atomic_path(path):
        path.unlink()  # and nothing is written
    assert error.value.filename == str(path) and names(tmp_path) == []


@pytest.fixture
def a_full_disk():
    """Files of this process may hold 64 kB; Python turns the signal that goes with it into an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(tmp_path, a_full_disk):
    path = tmp_path / "state.pt"
    with atomic(path) as file:
        file.write(b"old")
    for size in (2**16 + 1, 2**20):  # the error comes when the buffer is flushed, or while writing
        with pytest.raises(OSError) as error, atomic(path) as file:
            file.write(b"x" * 10)
            file.write(b"x" * size)
        assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
        assert path.read_bytes() == b"old" and names(tmp_path) == ["state.pt"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for path, kind in (
        (tmp_path / "file" / "x", NotADirectoryError),
        (tmp_path / "missing" / "x", FileNotFoundError),
        (tmp_path / "folder", IsADirectoryError),
        (tmp_path / ("x" * 300), OSError),
    ):
        with pytest.raises(kind) as error, atomic(path) as file:
            file.write(b"content")
        assert error.value.filename == str(path) and str(path) in str(error.value)
        assert ".partial" not in str(error.value)
    assert error.value.errno == errno.ENAMETOOLONG
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["inside"]


def test_a_folder_that_may_not_be_written(tmp_path):
    """As another user, since root may write anywhere: in a process of its own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "x").write_bytes(b"old")
    folder.chmod(0o555)
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.chdir(folder)
                os.setuid(65534)
            with atomic("x") as file:
                file.write(b"new")
        except PermissionError as error:
            os._exit(0 if error.filename == "x" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(folder) == ["x"] and (folder / "x").read_bytes() == b"old"


def test_names_as_long_as_can_be(tmp_path):
    """The name of the unfinished file is longer than what it is made from; two of them never meet."""
    paths = [tmp_path / ("é" * 125 + end) for end in ("12345", "54321")]
    with atomic(paths[0]) as one, atomic(paths[1]) as other:
        one.write(b"one")
        other.write(b"other")
    assert [p.read_bytes() for p in paths] == [b"one", b"other"] and len(names(tmp_path)) == 2


def test_what_a_killed_process_leaves_is_swept(tmp_path):
    for name in (".x.partial", ".y.partial", "kept", "z.partial"):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path)
    assert names(tmp_path) == ["kept", "z.partial"]


def test_stopped_within_a_write(tmp_path):
    """Ctrl-C is Ctrl-C, whatever the writer says when it cannot close its archive."""
    path = tmp_path / "x"
    for writes in range(1, 4):
        left = writes

        def write(data):
            nonlocal left
            if not (left := left - 1):
                raise KeyboardInterrupt
            return len(data)

        with pytest.raises(KeyboardInterrupt), atomic(path) as file:
            file.write = write
            torch.save({"weight": torch.zeros(100_000)}, file)
        assert names(tmp_path) == []
