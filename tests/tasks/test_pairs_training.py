"""Training on two images of a scene with a small Sigma: published layouts, what is refused, whole runs."""

import numpy as np
import pytest
import torch
from PIL import Image

import linescan
from linescan.engine.cards import read_card, restore
from linescan.engine.mask_sets import IGNORED, LAYOUTS, MaskedScenes, classes_of, open_scenes, scenes_to_score
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.scores import evaluate
from linescan.errors import InputError
from linescan.tasks.recipes import SegmentationRecipe
from linescan.tasks.segment import SegmentationTask, Segmenter

from ..runs import contents, finish, kill_and_resume, same, train_as_two

SMALL = {"depths": [1, 1, 1, 1], "dim": 32, "decoder_depths": [1, 1, 1], "drop_path_rate": 0.0}
ARGS = tuple(f"--model-arg={key}={value}".replace(" ", "") for key, value in SMALL.items())


def write(layout, root, count=6, size=(32, 48), seed=0):
    """Scenes whose left half is known by its colour and whose right half by its temperature; the last is held out."""
    dice = np.random.default_rng(seed)
    for folder in (layout.images, layout.extra, layout.masks):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        classes = dice.integers(0, 2, (size[0] // 8, size[1] // 8)).repeat(8, 0).repeat(8, 1)
        left = np.arange(size[1]) < size[1] // 2
        seen, warm = classes * left, classes * ~left
        image = np.stack([60 + 150 * seen, 90 + 0 * seen, 120 - 60 * seen], -1).astype(np.uint8)
        Image.fromarray(image).save(root / layout.images / f"{i}D.png")
        Image.fromarray((9_000 + 42_000 * warm).astype(np.uint16)).save(root / layout.extra / f"{i}D.png")
        Image.fromarray((classes + layout.first).astype(np.uint8)).save(root / layout.masks / f"{i}D.png")
    (root / layout.train).write_text("".join(f"{i}D\n" for i in range(count - 1)))
    (root / layout.test).write_text(f"{count - 1}D\n")
    return root


@pytest.fixture(scope="module")
def mfnet(tmp_path_factory):
    return write(LAYOUTS[0], tmp_path_factory.mktemp("data") / "MFNet")


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.data.split()[0])
def test_published_layouts(layout, tmp_path):
    root = write(layout, tmp_path, 3)
    train, test = open_scenes(str(root), None, 0.5, 2)
    assert [scene.images[0].stem for scene in train] == ["0D", "1D"] and test == scenes_to_score(root, 2)
    assert [path.parent.name for path in (*test[0].images, test[0].mask)] == list(layout[1:4])
    assert len(open_scenes(str(root), None, 0.5)[0][0].images) == 1, "models of one image read the first"
    classes = classes_of(str(root))
    assert len(classes) == {"MFNet": 9, "PST900": 5, "NYUDepth v2": 40, "SUN RGB-D": 37}[layout.data]
    mask = np.asarray(Image.open(test[0].mask)).copy()
    mask[0, :3] = (layout.first, 255, len(classes) - 1 + layout.first)
    mask[1, :3] = 0
    Image.fromarray(mask).save(test[0].mask)
    item = MaskedScenes(test, classes)[0]
    assert item["mask"][0, :3].tolist() == [0, IGNORED, len(classes) - 1]
    assert item["mask"][1, :3].tolist() == [IGNORED if layout.first else 0] * 3
    mask[0, 0] = len(classes) + layout.first
    Image.fromarray(mask).save(test[0].mask)
    with pytest.raises(InputError, match=f"{mask[0, 0]} is none of {len(classes)} classes, from {layout.first} on"):
        MaskedScenes(test, classes)[0]


def test_pairs_of_all_kinds_of_files(mfnet, tmp_path):
    """Second images of 16 bits, grey, of colours and with alpha; of another size, missing or torn."""
    root = write(LAYOUTS[0], tmp_path / "set", 5)
    scenes, _ = open_scenes(str(root), None, 0.5, 2)
    deep = np.asarray(Image.open(scenes[0].images[1]))
    grey = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    colours = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for image, scene in zip((grey, grey.convert("RGBA"), Image.fromarray(colours)), scenes[1:]):
        image.save(scene.images[1])
    data = MaskedScenes(scenes, classes_of(str(root)), grey_extra=True)
    items = [data[i]["images"] for i in range(4)]
    assert all(torch.equal(items[0][3:], item[3:]) for item in items[1:3]) and torch.equal(items[0][3], items[0][5])
    luma = np.asarray(Image.fromarray(colours).convert("L"))
    assert np.array_equal(items[3][4], luma)
    assert not torch.equal(MaskedScenes(scenes, data.classes)[3]["images"], items[3])
    grey.crop((0, 0, 40, 32)).save(scenes[1].images[1])
    with pytest.raises(InputError, match=r"Modal/1D.png has 32x40 pixels, its mask .*Label/1D.png has 32x48"):
        data[1]
    scenes[1].images[1].write_bytes(scenes[2].images[1].read_bytes()[:60])
    with pytest.raises(InputError, match="Modal/1D.png: "):
        data[1]
    scenes[1].images[1].unlink()
    with pytest.raises(InputError, match=r"train2.txt names 1D, of which .*Modal has no image"):
        open_scenes(str(root), None, 0.5, 2)
    (root / "test.txt").write_text("\n")
    with pytest.raises(InputError, match="test.txt names no scenes"):
        scenes_to_score(root, 2)
    (root / "test.txt").unlink()
    with pytest.raises(InputError, match="test.txt: No such file"):
        scenes_to_score(root, 2)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_the_encoder_starts_from_a_classifier_and_other_classes_from_another_run(mfnet, tmp_path):
    torch.manual_seed(0)
    classifier = linescan.create_model("vmamba_vanilla_tiny", depths=SMALL["depths"], dims=32, num_classes=3)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    options = {"model": "sigma_tiny", "model_args": SMALL, "size": "32x32", "holdout": 0.4}
    recipe = SegmentationRecipe(str(mfnet), encoder_checkpoint=str(tmp_path / "classifier.pth"), **options)
    task = SegmentationTask(SegmentationTask.resolve(recipe))
    task.load_weights()
    trunk = task.model.encoder.trunk.state_dict()
    assert all(torch.equal(trunk[key], value) for key, value in classifier.state_dict().items() if key in trunk)
    assert recipe.resumed().encoder_checkpoint is None and task.model.decode_head.output.out_channels == 9
    own = tmp_path / "own.safetensors"
    linescan.engine.cards.save_model(own, task.model, task.card())
    rooms = write(LAYOUTS[2], tmp_path / "NYUDepthv2", 3)
    tuned = SegmentationTask(SegmentationTask.resolve(SegmentationRecipe(str(rooms), checkpoint=str(own))))
    tuned.load_weights()
    assert tuned.model.decode_head.output.out_channels == 40 and len(tuned.card().classes) == 40
    kept = tuned.model.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in task.model.state_dict().items() if k != "decode_head.output.weight")
    with pytest.raises(InputError, match="mhsvm_vmunet_4h has none"):
        SegmentationTask(SegmentationRecipe(str(mfnet), model="mhsvm_vmunet_4h", encoder_checkpoint="x.pth"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_it_learns_from_both_survives_kill_9_and_trains_in_two_processes(mfnet, tmp_path, linescan_here):
    (tmp_path / "MFNet").symlink_to(mfnet)
    args = (
        "train", "--task", "segmentation", "--data", "MFNet", "--model", "sigma_tiny", *ARGS, "--size", "32x48",
        "--augment", "mirror", "--dice-weight", "0", "--batch", "2", "--steps", "16", "--lr", "4e-3", "--warmup", "3",
        "--schedule", "poly", "--decay-rate", "0.9", "--min-lr", "0", "--save-every", "5", "--evaluate-every", "16",
        "--log-every", "1", "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=1, rows=9)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))
    rows = read_metrics(tmp_path / "whole" / "metrics.csv")
    assert rows[-1]["val_accuracy"] > 0.7 and rows[0]["loss"] > 2 * rows[-2]["loss"]
    train_as_two(tmp_path, *args, "--steps", "3", "--bf16", "-o", "two")
    weights = tmp_path / "whole" / "best.safetensors"
    said = linescan_here("evaluate", "--task", "segmentation", "-d", mfnet, "-c", weights, "--workers", 0, "--device",
                         "cpu", "--json")  # fmt: skip
    assert f'"accuracy": {rows[-1]["val_accuracy"]}' in said[1] and said[0] == 0
    segment, scene = Segmenter(checkpoint=weights, device="cpu"), scenes_to_score(mfnet, 2)[0]
    [mask] = segment([scene.images])
    right = (mask == np.asarray(Image.open(scene.mask))).mean()
    assert right == pytest.approx(rows[-1]["val_accuracy"], abs=1e-3) and read_card(weights).classes[2] == "person"
    network, card = restore(checkpoint=weights)
    swapped = SegmentationTask.judge(SegmentationRecipe(str(mfnet)), network, card)
    swapped.data.scenes[:] = [scene._replace(images=(scene.images[0],) * 2) for scene in swapped.data.scenes]
    blind = evaluate(swapped, network, Processes(0, 1, torch.device("cpu"))).scores
    assert blind["accuracy"] < rows[-1]["val_accuracy"] - 0.05, "half of it is to be seen in the second image alone"
