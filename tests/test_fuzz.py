"""Seconds of tools/fuzz.py: files damaged by chance, and hostile ones, are answered or refused in one line."""

from importlib import import_module
from pathlib import Path

import pytest

from .runs import Forked, be_script

SCRIPT = Path(__file__).parents[1] / "tools" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoints", "cards", "images", "videos"])
def test_damaged_files_end_in_one_line(kind, tmp_path):
    done = Forked(tmp_path, be_script, SCRIPT, kind, "--count", "1000", "--seconds", "4").end(300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " refused, " in done.stdout and " used" in done.stdout


@pytest.mark.slow
def test_the_files_that_are_damaged_were_whole(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = vars(import_module("fuzzing.media"))
    for files, whole, use in (("IMAGES", "whole.png", "use_image"), ("VIDEOS", "whole.mp4", "use_video")):
        (tmp_path / whole).write_bytes(script[files]["alpha.png" if files == "IMAGES" else "x.mp4"])
        for name, data in script[files].items():
            (tmp_path / name).write_bytes(data)
            script[use](tmp_path / name)
