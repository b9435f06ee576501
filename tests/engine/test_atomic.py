"""Files are whole or absent."""

import pytest

from linescan.engine.atomic import atomic, sweep


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    with atomic(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"new, but not all of it")
        file.flush()
        raise RuntimeError
    assert path.read_bytes() == b"old"
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
