"""Anomalies: folders, scores, training with resume and two processes, and the tool on images of all kinds."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from linescan.engine.anomaly_scores import best_f1_in_steps, ranking, region_overlap
from linescan.engine.anomaly_sets import AnomalySet, Inspected, find_anomalies
from linescan.engine.cards import ModelCard, read_card, restore, save_model
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.scores import Totals, evaluate
from linescan.engine.training import train
from linescan.errors import CheckpointError, InputError
from linescan.media.arrays import read_array
from linescan.media.find import Source
from linescan.media.preprocess import Preprocess
from linescan.tasks.anomaly import Anomaly, AnomalyDetector, AnomalyMaps, AnomalyScores, AnomalyTask, threshold_of
from linescan.tasks.recipes import AnomalyRecipe

from ..runs import contents, kill_and_resume, same, train_as_two

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(teacher="resnet18", directions=2, depths=[1, 1, 1, 1], d_state=1)
ARGS = [f"--model-arg={key}={json.dumps(value).replace(' ', '').strip(chr(34))}" for key, value in SMALL.items()]
SIZE = Preprocess((3, 64, 64), (0.5,) * 3, (0.25,) * 3, "bilinear")


def stripes(seed, size=(70, 90), defect=False):
    """Waves with some noise; a defect is a red square. The image, and where its defect is."""
    dice = np.random.default_rng(seed)
    x = np.indices(size).sum(0)
    image = 128 + 60 * np.sin(x[..., None] / np.array([2.0, 2.5, 3.0])) + dice.normal(0, 4, (*size, 3))
    mask = np.zeros(size, bool)
    if defect:
        top, left = dice.integers(5, 40, 2)
        mask[top : top + 22, left : left + 22] = True
        image[mask] = 255, 0, 0
    return image.clip(0, 255).astype(np.uint8), mask


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """MVTec's layout: a class with masks, and one without."""
    root = tmp_path_factory.mktemp("waves") / "waves"
    for i in range(6):
        write(root / "a" / "train" / "good" / f"{i}.png", stripes(i)[0])
        write(root / "b" / "train" / "good" / f"{i}.png", stripes(i)[0].transpose(1, 0, 2))
    for i in range(4):
        image, mask = stripes(100 + i, defect=True)
        write(root / "a" / "test" / "square" / f"{i}.png", image)
        write(root / "a" / "ground_truth" / "square" / f"{i}_mask.png", mask.astype(np.uint8) * 255)
        write(root / "a" / "test" / "good" / f"{i}.png", stripes(50 + i)[0])
        write(root / "b" / "test" / "square" / f"{i}.png", image.transpose(1, 0, 2))
        write(root / "b" / "test" / "good" / f"{i}.png", stripes(50 + i)[0].transpose(1, 0, 2))
    return root


@pytest.fixture(scope="module")
def trained(waves, tmp_path_factory):
    """A short run; its scores, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = AnomalyRecipe(
        str(waves), model_args=SMALL, teacher_checkpoint="random", size=64, batch=6, steps=30, seed=1
    )
    return train(recipe, out, device="cpu", workers=0), out


# -- folders ----------------------------------------------------------------------------------------------------------


def test_layout_of_mvtec(waves):
    found = find_anomalies(waves)
    assert list(found.categories) == ["a", "b"] and len(found.train) == 12 and len(found.test) == 16
    assert {one.defect for one in found.train} == {""} and {one.defect for one in found.test} == {"", "square"}
    data = AnomalySet(found.test, found.categories, SIZE)
    bad = next(i for i, one in enumerate(found.test) if one.mask)
    item = data[bad]
    assert item["input"].shape == (3, 64, 64) and item["label"] == 1 and item["category"] == 0
    share = 22 * 22 / (70 * 90)
    assert item["mask"].shape == (64, 64) and item["mask"].float().mean() == pytest.approx(share, abs=0.02)
    red = item["input"][0] - item["input"][1] > 2
    assert (red != item["mask"]).float().mean() < 0.03, "the mask lies where the defect is"
    assert not data[next(i for i, one in enumerate(found.test) if not one.defect)]["mask"].any()
    alone = find_anomalies(waves / "b")
    assert list(alone.categories) == ["b"] and len(alone.train) == 6
    item = AnomalySet(alone.test, alone.categories, SIZE)[0]
    assert "mask" not in item


def test_layout_of_visa(tmp_path):
    root = tmp_path / "visa"
    for i in range(5):
        write(root / "candle" / "Data" / "Images" / "Normal" / f"{i:04d}.JPG", stripes(i)[0])
    image, mask = stripes(9, defect=True)
    write(root / "candle" / "Data" / "Images" / "Anomaly" / "000.JPG", image)
    write(root / "candle" / "Data" / "Masks" / "Anomaly" / "000.png", mask.astype(np.uint8)[:40] * 3)
    found = find_anomalies(root, 0.4)
    with pytest.raises(InputError, match=r"000.JPG has 70x90 pixels, its mask .*000.png has 40x90"):
        AnomalySet(found.test, found.categories, SIZE)[2]
    write(root / "candle" / "Data" / "Masks" / "Anomaly" / "000.png", mask.astype(np.uint8) * 3)
    assert len(found.train) == 3 and [one.defect for one in found.test] == ["", "", "defect"]
    assert AnomalySet(found.test, found.categories, SIZE)[2]["mask"].any(), "masks of VisA hold small numbers"
    rows = [f"candle,test,normal,candle/Data/Images/Normal/000{i}.JPG," for i in (1, 4)]
    rows.append("candle,train,normal,candle/Data/Images/Normal/0000.JPG,")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(["object,split,label,image,mask", *rows]))
    for place in (root, root / "candle"):
        found = find_anomalies(place)
        assert [one.path.stem for one in found.test] == ["0001", "0004", "000"] and len(found.train) == 3


def test_masks_of_all_kinds(tmp_path):
    """Half of a pixel is not a defect, alpha is none, and a mask is upright where its photo is turned."""
    mask = np.zeros((8, 16), np.uint8)
    mask[1:5, 2:9] = 9
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (8, 16), "grey")
    photo.save(tmp_path / "x.jpg", exif=exif)
    one = Inspected(tmp_path / "x.jpg", 0, "crack", tmp_path / "mask.png")
    kinds = {"L": mask, "LA": np.dstack([mask, np.full_like(mask, 255)]), "I;16": mask.astype(np.uint16)}
    kinds["RGBA"] = np.dstack([0 * mask, mask, 0 * mask, np.full_like(mask, 255)])
    for values in kinds.values():
        write(tmp_path / "mask.png", values)
        found = AnomalySet([one], ["x"], replace(SIZE, size=(3, 4, 8)))[0]["mask"].numpy()
        smooth = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize((8, 4), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, np.asarray(smooth) > 127)


def test_plain_folders_and_what_is_refused(waves, tmp_path):
    found = find_anomalies(waves / "a" / "train" / "good", 0.34)
    assert len(found.train) == 4 and len(found.test) == 2 and not any(one.defect for one in found.test)
    with pytest.raises(InputError, match="holds no images to train on: neither CLASS/train/good"):
        find_anomalies(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        find_anomalies(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere is not a folder"):  # before the teacher's weights are fetched
        AnomalyTask(AnomalyRecipe(str(tmp_path / "nowhere"), model="mambaad_resnet34"))
    for name in ("train/good/0.png", "test/crack/0.png"):
        write(tmp_path / "c" / name, stripes(0)[0])
    (tmp_path / "c" / "ground_truth").mkdir()
    with pytest.raises(InputError, match="holds no mask of 0: neither 0_mask.png nor 0.png"):
        find_anomalies(tmp_path / "c")
    with pytest.raises(InputError, match="--size must be a multiple of 32, not 100"):
        AnomalyRecipe("x", size=100)
    with pytest.raises(InputError, match="resnet18 finds no anomalies; `linescan list --task anomaly`"):
        AnomalyTask(AnomalyRecipe(str(waves), model="resnet18"))


# -- scores -----------------------------------------------------------------------------------------------------------


def overlap_by_definition(masks, maps, steps=200, limit=0.3):
    from skimage.measure import label

    found, alarms = [], []
    low, high = maps.min(), maps.max()
    regions = [np.argwhere(numbers == i) for numbers in map(label, masks) for i in range(1, numbers.max() + 1)]
    of = [n for n, numbers in enumerate(map(label, masks)) for _ in range(numbers.max())]
    for threshold in np.arange(low, high, (high - low) / steps):
        above = maps > threshold
        found.append(np.mean([above[n][tuple(region.T)].mean() for n, region in zip(of, regions)]))
        alarms.append((above & ~masks).sum() / (~masks).sum())
    found, alarms = np.array(found), np.array(alarms)
    found, alarms = found[alarms < limit], alarms[alarms < limit]
    alarms = (alarms - alarms.min()) / (alarms.max() - alarms.min())
    return sum((alarms[i] - alarms[i + 1]) * (found[i] + found[i + 1]) / 2 for i in range(len(found) - 1))


def test_scores_on_given_maps():
    dice = np.random.default_rng(0)
    maps = dice.random((3, 20, 24))
    masks = np.zeros(maps.shape, bool)
    masks[0, 2:7, 3:9] = masks[0, 7:9, 9:12] = masks[1, 15:18, 1:4] = masks[1, 3, 3] = True  # two of them touch
    maps[masks] += 0.5 * dice.random(masks.sum())
    assert region_overlap(masks, maps) == pytest.approx(overlap_by_definition(masks, maps), abs=1e-12)
    labels, scores = masks.ravel(), maps.ravel()
    auroc, ap, best = ranking(labels, scores)
    above = scores[labels][:, None] > scores[~labels]
    assert auroc == pytest.approx(above.mean(), abs=1e-12)
    order = labels[np.argsort(-scores)]
    precision, recall = order.cumsum() / np.arange(1, order.size + 1), order.cumsum() / order.sum()
    assert ap == pytest.approx((precision * np.diff(recall, prepend=0)).sum(), abs=1e-12)
    f1 = 2 * precision * recall / (precision + recall).clip(1e-9)
    assert best == pytest.approx(f1.max(), abs=1e-12)
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    steps = [2 * (labels & (scaled > t)).sum() / (labels.sum() + (scaled > t).sum()) for t in np.arange(21) / 20]
    assert best_f1_in_steps(masks, maps) == pytest.approx(max(steps), abs=1e-6) and max(steps) < best
    # A value at a threshold is not above it.
    assert best_f1_in_steps(np.array([1, 1]), np.array([0.0, 1.0])) == pytest.approx(2 / 3)
    tied = dice.integers(0, 9, maps.shape) / 8
    for limit in (0.3, (tied[~masks] > 0.5).mean()):
        wanted = overlap_by_definition(masks, tied, 8, limit)
        assert region_overlap(masks, tied, 8, limit) == pytest.approx(wanted, abs=1e-12)
    assert region_overlap(masks, np.ones_like(maps)) == 0 and region_overlap(masks, masks.astype(float)) == 1
    assert threshold_of([0.0, 1.0, 2.0, 3.0], 0.5) == 2.0, "the score of an image, the higher of two"
    assert threshold_of([3.0, 1.0, 2.0], 0.0) == 3.0


def test_held_out_scores_are_means_over_the_classes(waves, trained):
    _, out = trained
    model, card = restore(checkpoint=out / "model.safetensors")
    judge = AnomalyTask.judge(AnomalyRecipe(str(waves)), model, card)
    assert judge.names[-1] == "threshold" and "aupro" in judge.names and judge.masked == [0]
    result = evaluate(judge, model, Processes(0, 1, torch.device("cpu")), batch=3)
    labels, scores, maps, masks = [], [], [], []
    with torch.no_grad():
        for i in range(len(judge.data)):
            item = judge.data[i]
            map = model.eval().anomaly_maps(item["input"][None])[0]
            labels.append(item["label"]), scores.append(map.max().item())
            maps.append(map.numpy()), masks.append(item["mask"].numpy())
    labels, scores = np.array(labels), np.array(scores)
    each = [ranking(labels[part], scores[part]) for part in (slice(8), slice(8, 16))]
    image = np.mean(each, 0)
    assert [result.scores[n] for n in ("image_auroc", "image_ap", "image_f1")] == pytest.approx(
        image.tolist(), abs=1e-4
    )
    pixels = region_overlap(np.stack(masks[:8]), np.stack(maps[:8]))
    assert result.scores["aupro"] == pytest.approx(pixels, abs=1e-3)
    assert result.scores["threshold"] == pytest.approx(scores[labels == 0].max(), abs=1e-5)
    halved = AnomalyTask.judge(AnomalyRecipe(str(waves), false_alarms=0.5), model, card)
    middle = np.sort(scores[labels == 0])[4]
    assert halved.scores(result.totals)["threshold"] == pytest.approx(middle, abs=1e-5)
    # Without a defective image there is a mean score alone, of which less is better.
    plain = AnomalyTask.judge(AnomalyRecipe(str(waves / "a" / "train" / "good"), holdout=0.5), model, card)
    assert plain.names == ("score", "threshold") and not plain.higher and plain.better({"score": 1.0}, 2.0)
    found = evaluate(plain, model, Processes(0, 1, torch.device("cpu"))).scores
    assert 0 < found["score"] <= found["threshold"]


def made(**rows) -> Totals:
    totals = Totals()
    totals.keep(**{name: torch.as_tensor(np.array(values)) for name, values in rows.items()})
    return totals


def test_each_class_is_scored_by_itself(tmp_path):
    """Of classes with both kinds of images; pixels of those with masks; the threshold is of all normal images."""
    dice, path = np.random.default_rng(3), tmp_path / "x"
    images = [Inspected(path, of, "crack" if bad else "", path if bad else None) for of in (0, 2) for bad in (0, 0, 1)]
    images += [Inspected(path, 1)] * 2
    judge = AnomalyScores(SimpleNamespace(images=images, categories="abc"), 0.25)
    assert judge.judged == judge.masked == [0, 2] and judge.primary == "image_auroc" and judge.higher
    label, of = np.array([bool(one.defect) for one in images]), np.array([one.category for one in images])
    score, maps, masks = dice.random(8), dice.random((6, 5, 7)), dice.random((6, 5, 7)) > 0.6
    totals = made(label=label, category=of, score=score)
    for name, values in {"map": maps.astype(np.float32), "mask": masks, "of": of[:6]}.items():
        totals.keep(**{name: torch.as_tensor(values)})
    found = judge.by_category(totals)
    assert list(found) == ["a", "c"]
    for name, mine in (("a", slice(3)), ("c", slice(3, 6))):
        image, pixels = ranking(label[mine], score[mine]), ranking(masks[mine].ravel(), maps[mine].ravel())
        got = list(found[name].values())
        assert got[:6] == pytest.approx([*image, *pixels], abs=1e-6)
        assert got[7] == pytest.approx(region_overlap(masks[mine], maps[mine].astype(np.float32)))
    assert judge.scores(totals)["threshold"] == np.sort(score[~label])[4], "a quarter of six may be above: one"


def test_the_report_shows_what_the_threshold_misses(waves, tmp_path):
    """Defects at the threshold are missed, the lowest first; normal images with the highest scores."""
    found = find_anomalies(waves / "b")
    judge = AnomalyScores(AnomalySet(found.test, found.categories, SIZE), 0.0)
    label = np.array([bool(one.defect) for one in found.test])
    score = np.empty(8)
    score[~label], score[label] = (0.1, 0.4, 0.2, 0.3), (0.4, 0.41, 0.15, 0.9)
    totals = made(label=label, category=np.zeros(8, int), score=score, index=np.arange(8))
    judge.report(totals, tmp_path, "Waves")
    page = (tmp_path / "report.html").read_text()
    missed, alarms = page.split("Missed defects")[1].split("Normal images with the highest scores")
    shown = [re.findall(r"<b>([0-9.]+)</b>", part) for part in (missed, alarms)]
    assert shown == [["0.1500", "0.4000"], ["0.4000", "0.3000", "0.2000", "0.1000"]]


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_learns_and_the_teacher_does_not(waves, trained):
    scores, out = trained
    rows = [row["loss"] for row in read_metrics(out / "metrics.csv") if "loss" in row]
    assert rows[-1] < 0.7 * rows[0]
    assert scores["image_auroc"] > 0.9 and scores["pixel_auroc"] > 0.8
    card = read_card(out / "best.safetensors")
    assert card.model == "mambaad_resnet34" and card.args == SMALL and card.preprocess.size == (3, 64, 64)
    assert 0 < card.trained["val_threshold"] < 1
    # A run that starts from its weights has the teacher, and the size.
    more = AnomalyTask(AnomalyTask.resolve(AnomalyRecipe(str(waves), checkpoint=str(out / "best.safetensors"))))
    more.load_weights()
    before, _ = restore(checkpoint=out / "best.safetensors")
    assert same(more.model.state_dict(), before.state_dict()) and more.data[0]["input"].shape == (3, 64, 64)


def test_the_loss_is_of_all_levels():
    a, b, c, d = torch.rand(4, 2, 3, 4, 4)
    loss = AnomalyTask.forward(None, lambda images: ([a, b], [c, d]), {"input": a})["loss"]
    assert loss.item() == pytest.approx(5 * ((a - c).square().mean() + (b - d).square().mean()).item())


def test_fine_tuning_keeps_the_size_of_its_checkpoint_when_resumed(waves, trained):
    recipe = AnomalyRecipe(str(waves), checkpoint=str(trained[1] / "model.safetensors"))
    started = AnomalyTask.resolve(recipe)
    assert AnomalyTask(started.resumed()).card().preprocess.size == (3, 64, 64)


def test_the_teacher_comes_from_a_file_of_a_classifier(waves, tmp_path):
    import timm

    classifier = timm.create_model("resnet18", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "teacher.pth")
    recipe = AnomalyRecipe(str(waves), model="mambaad_resnet34", model_args=SMALL, size=64)
    task = AnomalyTask(replace(recipe, teacher_checkpoint=str(tmp_path / "teacher.pth")))
    task.load_weights()
    assert torch.equal(task.model.teacher.layer3[1].conv2.weight, classifier.layer3[1].conv2.weight)
    assert recipe.resumed().teacher_checkpoint == "random", "the state of a run has the teacher"
    grey = Preprocess((3, 96, 96), (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    save_model(tmp_path / "own.safetensors", classifier, ModelCard("resnet18", {}, ["a", "b", "c"], grey))
    started = AnomalyTask.resolve(replace(recipe, teacher_checkpoint=str(tmp_path / "own.safetensors")))
    again = AnomalyTask(started.resumed()).card().preprocess
    assert (again.mean, again.std) == (grey.mean, grey.std), "images are normalised as the teacher was trained"
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pth")
    (tmp_path / "small.pth").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="small.pth"):
        AnomalyTask(replace(recipe, teacher_checkpoint=str(tmp_path / "small.pth"))).load_weights()
    del (state := classifier.state_dict())["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="1 keys missing .first: layer2.0.conv1.weight"):
        AnomalyTask(replace(recipe, teacher_checkpoint=str(tmp_path / "less.pth"))).load_weights()


@pytest.mark.slow
def test_kill_9_and_two_processes(waves, tmp_path, linescan_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waves").symlink_to(waves)
    args = (
        "train", "--task", "anomaly", "--data", "waves", *ARGS, "--teacher-checkpoint", "random", "--size", "64",
        "--batch", "2", "--steps", "8", "--ema", "0.9", "--save-every", "3", "--evaluate-every", "8",
        "--log-every", "1", "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    assert linescan_here(*args, "-o", "whole")[0] == 0
    kill_and_resume(tmp_path, args, "killed", times=1, rows=6)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))
    train_as_two(tmp_path, *args, "-o", "two")
    [last] = [row for row in read_metrics(tmp_path / "two" / "metrics.csv") if row["step"] == 8 and "val_aupro" in row]
    model, card = restore(checkpoint=tmp_path / "two" / "model.safetensors")
    judge = AnomalyTask.judge(AnomalyRecipe(str(waves)), model, card)
    alone = evaluate(judge, model, Processes(0, 1, torch.device("cpu"))).scores
    assert last["val_aupro"] == pytest.approx(alone["aupro"], abs=1e-3)


# -- the tool ---------------------------------------------------------------------------------------------------------


def test_the_command_finds_anomalies_in_images_of_all_kinds(waves, trained, tmp_path, linescan_here):
    _, out = trained
    inputs = tmp_path / "in"
    image, _ = stripes(200, defect=True)
    write(inputs / "bad.png", image)
    write(inputs / "good.png", stripes(201)[0])
    write(inputs / "grey16.png", (stripes(202)[0][..., 0].astype(np.uint16) * 257))
    write(inputs / "sub" / "alpha.png", np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]))
    write(inputs / "thin.png", stripes(203, (3, 200))[0])
    (inputs / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    arguments = ("anomaly", str(inputs), "-c", str(out / "model.safetensors"), "-o", str(tmp_path / "out"), "--json")
    status, said, told = linescan_here(*arguments)
    assert status == 1 and "broken.jpg" in told and "5 of 6 done" in told
    answers = {a["source"].split("/")[-1]: a.get("answer") for a in json.loads(said)}
    card = read_card(out / "model.safetensors")
    assert answers["bad.png"]["anomalous"] and answers["bad.png"]["threshold"] == card.trained["val_threshold"]
    assert answers["bad.png"]["score"] > answers["good.png"]["score"] and answers["broken.jpg"] is None
    assert answers["alpha.png"]["score"] == pytest.approx(answers["bad.png"]["score"], abs=1e-5)
    made = tmp_path / "out"
    map, _ = read_array(made / "maps" / "bad.tif")
    assert map.dtype == np.float32 and map.shape == (64, 64, 1)
    assert map.max() == pytest.approx(answers["bad.png"]["score"])
    lines = (made / "scores.csv").read_text().splitlines()
    assert lines[0] == "image,score,anomalous" and len(lines) == 6
    scores = [float(line.split(",")[1]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(answers["bad.png"]["score"], abs=1e-5)
    assert (made / "report.html").read_bytes().count(b"<figure>") == 5
    assert (made / "overlays" / "sub" / "alpha.jpg").exists()


def test_thresholds_on_normal_images(waves, trained, tmp_path):
    _, out = trained
    detect = AnomalyDetector(checkpoint=out / "model.safetensors", device="cpu")
    normal = sorted((waves / "a" / "train" / "good").iterdir())
    (tmp_path / "no.png").write_bytes(b"")
    broken = detect.calibrate([*normal, tmp_path / "no.png"], 0.0)
    scores = [found.score for found in detect(normal)]
    detect.calibrate(normal, 0.5)
    assert detect.threshold == pytest.approx(sorted(scores)[3]), "half of six may be above"
    assert detect.calibrate([*normal, tmp_path / "no.png"]) == broken
    assert detect.threshold == pytest.approx(max(scores)) and len(broken) == 1 and "no.png" in broken[0]
    image, mask = stripes(300, defect=True)
    found = detect(image)
    assert found.anomalous and not any(one.anomalous for one in detect(normal))
    x, y = found.place
    top, left = np.argwhere(mask).min(0)
    assert left - 8 <= x * 90 <= left + 30 and top - 8 <= y * 70 <= top + 30, "the place is that of the defect"
    assert found.drawn().size[0] >= 384 and "threshold" in repr(detect)
    other = AnomalyDetector(checkpoint=out / "model.safetensors", device="cpu", threshold=0.0)
    assert other(image).anomalous and other(image).threshold == 0.0
    with pytest.raises(InputError, match="none of the normal images can be read; the first: .*no.png"):
        detect.calibrate([tmp_path / "no.png"])


def test_what_is_said_of_a_score():
    """At the threshold an image is normal; the drawing is as light as it is above 0 and twice the threshold at most."""
    map = np.full((4, 6), 0.25, np.float32)
    map[1, 2] = 0.5
    for threshold, anomalous, said in (
        (0.5, False, "normal, score 0.5000 <= 0.5000, most at 42% of the width, 38% of the height"),
        (0.25, True, "anomalous, score 0.5000 > 0.2500, most at 42% of the width, 38% of the height"),
        (None, None, "score 0.5000, most at 42% of the width, 38% of the height"),
    ):
        found = Anomaly(map, threshold, Image.new("RGB", (384, 256)))
        assert found.anomalous is anomalous and AnomalyMaps.describe(None, found) == said
        assert found.place == (2.5 / 6, 1.5 / 4)
        drawn = np.asarray(found.drawn())
        assert (drawn[96, 160] == 255).all() == (anomalous is True), "a cross where an anomaly is"
        corner = {0.5: (57, 12, 54), 0.25: (106, 34, 34), None: (6, 4, 30)}[threshold]
        assert np.abs(drawn[-1, -1] - np.array(corner)).max() <= 1, threshold


def test_a_report_of_what_was_scored(waves, trained, tmp_path):
    _, out = trained
    model, card = restore(checkpoint=out / "model.safetensors")
    judge = AnomalyTask.judge(AnomalyRecipe(str(waves)), model, card)
    result = evaluate(judge, model, Processes(0, 1, torch.device("cpu")))
    found, files = judge.report(result.totals, tmp_path / "report", "Waves")
    assert set(found["classes"]) == {"a", "b"} and "aupro" in found["classes"]["a"]
    assert [path.name for path in files] == ["report.html", "classes.csv", "scores.csv"]
    lines = files[2].read_text().splitlines()
    assert len(lines) == 17 and {line.split(",")[1] for line in lines[1:]} == {"normal", "square"}
    assert b"Missed defects" in files[0].read_bytes() and len(files[1].read_text().splitlines()) == 3


def test_whole_images_are_resized_and_normalised_as_by_torchvision():
    from torchvision.transforms import v2

    image = Image.fromarray(stripes(7, (50, 81))[0])
    preprocess = Preprocess((3, 32, 48), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), "bilinear")
    steps = v2.Compose([v2.Resize((32, 48)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    wanted = v2.functional.normalize(steps(image), preprocess.mean, preprocess.std)
    assert torch.allclose(preprocess.whole(image), wanted, atol=1e-5)
    assert Preprocess((1, 8, 8), (0.0,), (1.0,), "bilinear").whole(image.convert("L")).shape == (1, 8, 8)


def test_the_page_holds_the_highest_scores(tmp_path, monkeypatch):
    monkeypatch.setattr("linescan.tasks.anomaly.WORST", 3)
    writer, scores = AnomalyMaps(tmp_path), [0.3, 0.9, 0.1, 0.5, 0.7, 0.2]
    for i, score in enumerate(scores):
        batch = np.zeros((2, 4, 6), np.float32)
        batch[1, 1, 2] = score
        writer.save(Source(tmp_path / f"{i}.png", str(i)), Anomaly(batch[1], 0.4, Image.new("RGB", (60, 40))))
    assert all(answer.map.base is None for _, _, answer, _ in writer.worst), "of a batch, only what is shown is kept"
    writer.close()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 3 and page.index("0.9000") < page.index("0.7000") < page.index("0.5000")
    assert "3 of them above the threshold 0.4000" in page
    rows = [line.split(",")[1:] for line in (tmp_path / "scores.csv").read_text().splitlines()[1:]]
    assert [float(score) for score, _ in rows] == pytest.approx(sorted(scores, reverse=True))
    assert [flag for _, flag in rows] == ["1", "1", "1", "0", "0", "0"]
