"""Labelled images: folders of classes, and how they are split."""

import numpy as np
import pytest

from linescan.engine.image_sets import Digits, Folder, open_data
from linescan.errors import InputError

from ..conftest import write_images


def test_folder(images):
    (images / "circle" / "notes.txt").write_text("not an image")
    (images / ".cache").mkdir()
    found = Folder(images)
    assert found.classes == ["circle", "square", "stripe"]
    assert np.bincount(found.labels).tolist() == [8, 8, 8]
    assert all(found.classes[label] in name for name, label in zip(found.names, found.labels))


def test_the_split_is_stratified_disjoint_and_always_the_same(images):
    train, held_out = open_data(str(images), fraction=0.25)
    assert np.bincount(held_out.labels).tolist() == [2, 2, 2]
    assert sorted(train.names + held_out.names) == Folder(images).names
    assert open_data(str(images), fraction=0.25)[1].names == held_out.names
    digits = Digits(False), Digits(True)
    assert [len(d) for d in digits] == [1438, 359]
    assert not set(digits[0].names) & set(digits[1].names)


def test_train_and_val_folders(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", each=2)
    train, held_out = open_data(str(tmp_path))
    assert (len(train), len(held_out)) == (24, 6)
    write_images(tmp_path / "other", classes=("circle", "star"))
    with pytest.raises(InputError, match="'star'"):
        open_data(str(tmp_path / "train"), str(tmp_path / "other"))


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        Folder(tmp_path / "empty")
    with pytest.raises(InputError, match="is not a folder"):
        Folder(tmp_path / "nowhere")
    write_images(tmp_path / "one", classes=("only",))
    with pytest.raises(InputError, match="one class only"):
        Folder(tmp_path / "one")
    write_images(tmp_path / "hollow")
    (tmp_path / "hollow" / "void").mkdir()
    with pytest.raises(InputError, match="void holds no images"):
        Folder(tmp_path / "hollow")
    write_images(tmp_path / "single", each=1)
    with pytest.raises(InputError, match="cannot be split"):
        open_data(str(tmp_path / "single"))
