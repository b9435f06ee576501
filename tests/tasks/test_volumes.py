"""Volumes: reading and writing them, sets in BTCV's layout, training a small network, and the command."""

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import linescan
from linescan.engine.cards import ModelCard, read_card, save_model
from linescan.engine.metrics import read_metrics
from linescan.engine.organ_sets import LabelledVolumes, Scan, find_organs, planes, richest_planes
from linescan.engine.processes import Processes
from linescan.engine.scores import Totals, evaluate
from linescan.errors import InputError
from linescan.media.draw import draw_planes
from linescan.media.volumes import Volume, VolumePreprocess, read_volume, write_labels
from linescan.tasks.recipes import VolumeSegmentationRecipe
from linescan.tasks.segment_volumes import OrganDice, VolumeSegmentationTask, VolumeSegmenter, slide_volume

from ..runs import contents, kill_and_resume, same, train_as_two

SMALL = {"embed_dim": 16, "depth": 12, "feature_size": 8}
ARGS = tuple(word for name, value in SMALL.items() for word in ("--model-arg", f"{name}={value}"))
CLASSES = "background", "liver", "left kidney"
ALONE = Processes(0, 1, torch.device("cpu"))


def body(seed: int, shape=(30, 26, 20)) -> tuple[np.ndarray, np.ndarray]:
    """A volume (X, Y, Z) with a dark and a bright organ, and its labels: norms of a small cube keep what is which."""
    dice = np.random.default_rng(seed)
    grid = np.stack(np.indices(shape), -1) / shape
    labels = np.zeros(shape, np.uint8)
    for number, middle in ((1, (0.35, 0.5, 0.5)), (2, (0.75, 0.5, 0.5))):
        radii = dice.uniform(0.15, 0.25, 3)
        labels[(((grid - middle - dice.uniform(-0.05, 0.05, 3)) / radii) ** 2).sum(-1) < 1] = number
    values = np.array([40, -120, 220])[labels] + dice.normal(0, 20, shape)
    return values.astype(np.int16), labels


def write(path, array, axes="RAS", spacing=(1.5, 1.5, 2.0)) -> None:
    """A NIfTI file whose axes are stored in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, np.diag([*spacing, 1]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(image.as_reoriented(turn), path)


@pytest.fixture(scope="module")
def btcv(tmp_path_factory):
    """A small set in BTCV's layout, its files with axes in different orders."""
    root, rows = tmp_path_factory.mktemp("btcv"), []
    for i in range(6):
        files = {"image": f"imagesTr/img{i:04}.nii.gz", "label": f"labelsTr/label{i:04}.nii.gz"}
        for file, array in zip(files.values(), body(i)):
            write(root / file, array, ("RAS", "LPS", "SAR")[i % 3])
        rows.append(files)
    labels = {str(i): name for i, name in enumerate(CLASSES)}
    (root / "dataset_0.json").write_text(
        json.dumps({"labels": labels, "training": rows[:4], "validation": rows[4:], "test": ["a"]})
    )
    return root


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR"])
def test_volumes_are_read_upright_and_labels_written_as_the_file_was(tmp_path, axes):
    values, labels = body(0)
    write(tmp_path / "a.nii.gz", values, axes)
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array, values)
    assert volume.spacing == pytest.approx((1.5, 1.5, 2.0))
    with open(tmp_path / "l.nii.gz", "wb") as file:
        write_labels(file, labels, volume)
    one, other = nibabel.load(tmp_path / "a.nii.gz"), nibabel.load(tmp_path / "l.nii.gz")
    assert one.shape == other.shape and np.allclose(one.affine, other.affine) and other.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(read_volume(tmp_path / "l.nii.gz").array, labels)


def test_scaled_files_and_arrays(tmp_path):
    values, _ = body(0)
    image = nibabel.Nifti1Image(values.astype(np.float32) * 0.5 + 3, np.eye(4))
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "scaled.nii")
    assert np.abs(read_volume(tmp_path / "scaled.nii").array - (values * 0.5 + 3)).max() < 0.02
    np.save(tmp_path / "a.npy", values)
    volume = read_volume(tmp_path / "a.npy")
    assert volume.affine is None and volume.spacing is None and (volume.array == values).all()
    with open(tmp_path / "l.npy", "wb") as file:
        write_labels(file, np.uint8(values > 0), volume)
    assert (np.load(tmp_path / "l.npy") == (values > 0)).all()


def test_what_is_no_volume_is_said_in_one_line(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.save(tmp_path / "nan.npy", np.full((3, 4, 5), np.nan))
    np.save(tmp_path / "words.npy", np.full((3, 4, 5), "a"))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    write(tmp_path / "four.nii", np.zeros((3, 4, 5, 2), np.float32))
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    whole = tmp_path / "short.nii.gz"
    write(whole, body(0)[0])
    whole.write_bytes(whole.read_bytes()[:-4000])
    for name, said in (
        ("flat.npy", "a volume has three axes, not the shape .3, 4."), ("nan.npy", "it holds NaN"),
        ("words.npy", "holds real numbers"), ("objects.npy", "Python objects"),
        ("four.nii", "three axes, not the shape .3, 4, 5, 2."), ("broken.nii.gz", "not a NIfTI file, or damaged"),
        ("short.nii.gz", "."), ("absent.nii", "No such file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: .*{said}") as refusal:
            read_volume(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_resampling_and_intensities():
    volume = Volume(np.linspace(-300, 300, 24, dtype=np.float32).reshape(2, 3, 4), np.diag([3.0, 1.5, 1, 1]))
    prepared = VolumePreprocess((1.5, 1.5, 2.0), (-175, 250), 32)
    values = prepared(volume)
    assert values.shape == (4, 3, 2) and values.min() == 0 and values.max() == 1
    labels = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), volume.affine)
    assert (
        prepared.labels(labels).shape == (4, 3, 2) and (prepared.labels(labels)[0] == prepared.labels(labels)[1]).all()
    )
    bare = replace(volume, affine=None)
    assert prepared(bare).shape == (2, 3, 4)
    assert torch.allclose(prepared(bare), torch.from_numpy((volume.array + 175) / 425).clamp(0, 1))
    for wrong in (((1, 1, 0), (0, 1), 32), ((1, 1, 1), (1, 1), 32), ((1, 1, 1), (0, 1), 8), ((1, 1), (0, 1), 32)):
        with pytest.raises(InputError, match="spacing|window"):
            VolumePreprocess(*wrong)


# -- sets -------------------------------------------------------------------------------------------------------------


def test_lists_of_volumes(btcv, tmp_path):
    found = find_organs(btcv)
    assert found.classes == CLASSES and len(found.train) == 4 and len(found.held_out) == 2
    content = json.loads((btcv / "dataset_0.json").read_text())
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).symlink_to(btcv / name)
    listed = tmp_path / "dataset.json"

    def written(**changes):
        listed.write_text(json.dumps({**content, "validation": [], **changes}))
        return find_organs(tmp_path, 0.25)

    split = written(labels={name: i for i, name in enumerate(CLASSES)})  # as newer lists have them
    assert split.classes == CLASSES and len(split.train) == 3 and len(split.held_out) == 1
    row = content["training"][0]
    for changes, said in (
        ({"labels": {"0": "a", "2": "b"}}, "labels are numbered from 0 on"),
        ({"training": []}, "lists no volumes under training"),
        ({"training": [{**row, "image": "/etc/passwd"}]}, "/etc/passwd is not below its folder"),
        ({"training": [{**row, "image": "../a.nii"}]}, "../a.nii is not below its folder"),
        ({"training": [{**row, "label": "labelsTr/no.nii"}]}, "lists labelsTr/no.nii, which is not there"),
        ({"training": [{"image": "a"}]}, "is no list of volumes as BTCV has it"),
        ({"training": ["a"]}, "is no list of volumes as BTCV has it"),
    ):
        with pytest.raises(InputError, match=said):
            written(**changes)
    with pytest.raises(InputError, match="is no set of volumes: it holds no .json file"):
        find_organs(btcv / "imagesTr")
    (btcv / "other.json").write_text("{}")
    with pytest.raises(InputError, match="2 .json files; name one of them"):
        find_organs(btcv)
    (btcv / "other.json").unlink()
    assert find_organs(btcv / "dataset_0.json") == found


def test_cubes_are_cut_and_changed_with_their_labels(btcv):
    found = find_organs(btcv)
    preprocess = VolumePreprocess((1.5, 1.5, 2.0), (-175, 250), 16)
    data, middles = LabelledVolumes(found.train, CLASSES, preprocess, repeats=3), 0
    assert len(data.order(np.random.default_rng(0))) == 12
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        item = data[0]
        volume, labels = item["volume"][0], item["labels"]
        assert volume.shape == labels.shape == (16, 16, 16) and volume.dtype == torch.float32
        dark, bright, rest = volume[labels == 1], volume[labels == 2], volume[labels == 0].mean()
        assert rest.isnan() or not ((dark >= rest).any() or (bright <= rest).any())  # they still belong together
        middles += bool(labels[8, 8, 8])
        seen.add(labels.numpy().tobytes())
    assert len(seen) > 20 and middles > 9
    wide = LabelledVolumes(found.train, CLASSES, replace(preprocess, window=40), repeats=1)
    assert wide[1]["labels"].shape == (40, 40, 40)
    (values, labels), (volume, own) = body(0), LabelledVolumes(found.train, CLASSES, preprocess).whole(0)
    assert (own.numpy() == labels).all() and np.allclose(volume, ((values + 175) / 425).clip(0, 1), atol=1e-6)


def test_volumes_that_do_not_fit_their_labels(tmp_path):
    values, labels = body(0)
    write(tmp_path / "a.nii", values)
    for array, said in ((labels[1:], "a.nii has 30x26x20 voxels, its labels .* have 29x26x20"), (labels * 2, "0 to 4")):
        write(tmp_path / "l.nii", array)
        with pytest.raises(InputError, match=said):
            LabelledVolumes([Scan(tmp_path / "a.nii", tmp_path / "l.nii")], CLASSES, VolumePreprocess(
                (1, 1, 1), (0, 1), 16))[0]  # fmt: skip


def test_planes_stand_upright_where_the_classes_are():
    labels = np.zeros((4, 6, 8), np.uint8)
    labels[1, 2, 7] = 2
    found = planes(np.full((4, 6, 8), 2.0), labels)
    assert [name for name, _, _ in found] == ["axial, z = 7", "coronal, y = 2", "sagittal, x = 1"]
    assert [mask.shape for _, _, mask in found] == [(6, 4), (8, 4), (8, 6)]
    assert [np.argwhere(mask == 2).tolist() for _, _, mask in found] == [[[3, 1]], [[0, 1]], [[0, 2]]]
    assert all(image.dtype == np.uint8 and (image == 255).all() for _, image, _ in found)
    labels[:, :, 0] = 1  # a large class: each counts alike
    labels[1, 2, 5] = 3
    labels[3, 4, 5] = 3
    labels[0, 2, 5] = 4
    assert richest_planes(labels) == (1, 2, 5), "2 and half of 3; these and 4; 3 and 4"
    assert richest_planes(np.zeros((4, 6, 8), np.uint8)) == (2, 3, 4)
    drawn = draw_planes(found, ["background", "a", "b"])
    assert drawn.width >= 640 and drawn.height > 40 * 8, "enlarged, with words above and below"
    assert draw_planes(found, ["background", "a", "b"], legend_rows=0).height < drawn.height


# -- scores and windows -----------------------------------------------------------------------------------------------


def test_cubes_slide_over_volumes_of_any_size():
    volume = torch.rand(20, 9, 33)
    calls = []

    def forward(x):
        calls.append(len(x))
        return torch.cat([x, -2 * x], 1)

    logits = slide_volume(volume, forward, 16, batch=3)
    assert torch.allclose(logits, torch.stack([volume, -2 * volume]), atol=1e-6) and max(calls) == 3
    assert sum(calls) == 2 * 1 * 4


def test_dice_of_organs_by_hand():
    data = SimpleNamespace(classes=CLASSES)
    judge, totals = OrganDice(data, 8, 1), Totals()
    truth = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    truth[0, :4], truth[1, :, :2] = 1, 2
    found = truth.clone()
    found[0, 2:4] = 0
    found[0, 7, 7] = 2

    def model(cubes):
        return F.one_hot(cubes[:, 0].long(), 3).movedim(-1, 1).float()

    batch = {"volume": found[:, None].float(), "labels": truth, "index": torch.arange(2)}
    judge.measure(model, batch, totals)
    totals.reduce(ALONE)
    scores = judge.scores(totals)
    assert judge.names == ("dice", "dice_liver", "dice_left_kidney")
    assert scores["dice_liver"] == pytest.approx(2 * 128 / (128 + 256))  # the second volume has none, rightly
    assert scores["dice_left_kidney"] == pytest.approx((0 + 1) / 2)  # what is found where there is none counts as 0
    assert scores["dice"] == pytest.approx((scores["dice_liver"] + scores["dice_left_kidney"]) / 2)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_trains_resumes_is_evaluated_and_segments_files(btcv, tmp_path, linescan_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "btcv").symlink_to(btcv)
    args = ("train", "--task", "volume-segmentation", "--data", "btcv", *ARGS, "--window", "16", "--batch", "2",
            "--steps", "30", "--lr", "1e-2", "--warmup", "2", "--evaluate-every", "30", "--save-every", "10",
            "--log-every", "1", "--workers", "0", "--device", "cpu")  # fmt: skip
    assert linescan_here(*args, "-o", "whole")[0] == 0
    kill_and_resume(tmp_path, args, "killed", times=1, rows=20)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))
    weights = tmp_path / "whole" / "model.safetensors"
    card = read_card(weights)
    assert card.classes == list(CLASSES) and card.preprocess == VolumePreprocess((1.5, 1.5, 2.0), (-175.0, 250.0), 16)
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.csv") if "loss" in row]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and card.trained["val_dice"] > 0.85
    status, said, _ = linescan_here("evaluate", "--task", "volume-segmentation", "-d", "btcv", "-c", weights,
                                    "--device", "cpu", "--workers", 0, "--out", "page")  # fmt: skip
    assert status == 0 and f"Dice of 2 organs {card.trained['val_dice']:.4f}" in said
    assert "left kidney" in (tmp_path / "page" / "report.html").read_text()
    # files in, labels out, on the grid of each file; a broken one is named
    values, labels = body(5)
    write(tmp_path / "in" / "tall.nii.gz", np.repeat(values, 2, 2), "LPS", (1.5, 1.5, 1.0))
    np.save(tmp_path / "in" / "array.npy", values)
    (tmp_path / "in" / "broken.nii").write_bytes(b"x")
    status, said, told = linescan_here("segment", "in", "-c", weights, "-o", "out", "--device", "cpu", "--json")
    assert status == 1 and "broken.nii" in told and "2 of 3 done" in told
    answers = {one["source"].split("/")[-1]: one.get("answer") for one in json.loads(said)}
    assert answers["broken.nii"] is None and "ml" not in answers["array.npy"][0]
    found = read_volume(tmp_path / "out" / "labels" / "tall.nii.gz")
    assert nibabel.load(tmp_path / "out" / "labels" / "tall.nii.gz").shape == (30, 26, 40)
    twice = np.repeat(labels, 2, 2)
    assert (found.array == twice).mean() > 0.9
    one = next(one for one in answers["tall.nii.gz"] if one["label"] == "liver")
    assert one["voxels"] == (found.array == 1).sum() and one["ml"] == pytest.approx(
        one["voxels"] * 1.5 * 1.5 / 1000, abs=1e-3
    )
    assert (tmp_path / "out" / "overlays" / "array.jpg").exists()
    train_as_two(tmp_path, *args, "--steps", "2", "--batch", "1", "-o", "two")
    assert {"val_dice", "step"} <= read_metrics(tmp_path / "two" / "metrics.csv")[-1].keys()


def test_fine_tuning_to_other_organs_and_the_python_side(btcv, tmp_path):
    args = {"img_size": 16, "num_classes": 3, **SMALL}
    before = linescan.create_model("mamband_unetr_small", **args)
    card = ModelCard("mamband_unetr_small", args, list(CLASSES), VolumePreprocess((1.5, 1.5, 2.0), (-175.0, 250.0), 16))
    save_model(weights := tmp_path / "m.safetensors", before, card)
    values, _ = body(5)
    segment = VolumeSegmenter(checkpoint=weights, device="cpu")
    logits = slide_volume(segment.preprocess(Volume(values)), before.eval(), 16)
    np.testing.assert_array_equal(segment(values), logits.argmax(0).numpy())
    with pytest.raises(InputError, match="a volume is an array"):
        segment(values[0])
    content = json.loads((btcv / "dataset_0.json").read_text())
    content["labels"]["3"] = "spleen"
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).symlink_to(btcv / name)
    (tmp_path / "more.json").write_text(json.dumps(content))
    recipe = VolumeSegmentationRecipe(str(tmp_path / "more.json"), checkpoint=str(weights), bf16=True)
    started = VolumeSegmentationTask.resolve(recipe)
    assert VolumeSegmentationTask(started.resumed()).card().preprocess.window == 16, "the checkpoint's, when resumed"
    task = VolumeSegmentationTask(started)
    task.load_weights()
    assert torch.equal(task.model.encoder1.conv1.weight, before.encoder1.conv1.weight)
    assert task.model.out.out_channels == 4 and task.data.preprocess.window == 16
    batch = torch.utils.data.default_collate([task.data[0], task.data[1]])
    # oneDNN (torch 2.11): the bfloat16 gradient of a convolution over 2x2x2 voxels reads memory that was never written.
    with torch.backends.mkldnn.flags(enabled=False), torch.autocast("cpu", torch.bfloat16):
        task(task.model, batch)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in task.model.parameters())


def test_models_that_segment_no_volumes(btcv, tmp_path):
    with pytest.raises(InputError, match="mhsvm_vmunet_4h segments no volumes"):
        VolumeSegmentationTask(VolumeSegmentationRecipe(str(btcv), model="mhsvm_vmunet_4h"))
    model = linescan.create_model("mamband_unetr_small", img_size=16, num_classes=3, **SMALL)
    args = {"img_size": 16, "num_classes": 3, **SMALL}
    card = ModelCard("mamband_unetr_small", args, list(CLASSES), VolumePreprocess((1, 1, 1), (0, 1), 16))
    save_model(tmp_path / "m.safetensors", model, card)
    judge = VolumeSegmentationTask.judge(VolumeSegmentationRecipe(str(btcv)), model, card)
    assert 0 <= evaluate(judge, model, ALONE).scores["dice"] <= 1
    with pytest.raises(InputError, match="has 3 classes, the model 2"):
        VolumeSegmentationTask.judge(VolumeSegmentationRecipe(str(btcv)), model, replace(card, classes=["a", "b"]))
    with pytest.raises(InputError, match="mamband_unetr_small, which segments no images"):
        linescan.Segmenter(checkpoint=tmp_path / "m.safetensors")
