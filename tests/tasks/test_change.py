"""Changes: folders, training with resume and two processes, and the tool on pairs of all kinds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from linescan import ChangeDetector, create_model
from linescan.engine.cards import restore
from linescan.engine.change_sets import COLOURS, ChangeSet, find_changes, open_changes
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.scores import evaluate
from linescan.engine.training import train
from linescan.errors import CheckpointError, InputError
from linescan.heads.mambafcs import Changes
from linescan.media.align import shift_between
from linescan.media.labels import SECOND
from linescan.media.large import PairedPixels, open_pixels
from linescan.media.preprocess import Preprocess
from linescan.tasks.change import Change, ChangeTask, _shift
from linescan.tasks.recipes import ChangeRecipe

from ..conftest import REPOSITORY
from ..parity.recipe import noise as golden_noise
from ..runs import contents, kill_and_resume, same, train_as_two

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(dims=16, depths=[1, 1, 1, 1], drop_path_rate=0.0)
ARGS = [f"--model-arg={key}={json.dumps(value).replace(' ', '')}" for key, value in SMALL.items()]
PLAIN = Preprocess((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
SHOWN = np.array([(90, 160, 80), (30, 60, 200), (120, 120, 120), (90, 160, 80), (20, 90, 30), (160, 40, 30), (0, 0, 0)])


def town(seed, size=(32, 32)):
    """Grass, in which a square of water, ground or building has become one of another: images and labels."""
    dice = np.random.default_rng(seed)
    labels = np.zeros((2, *size), np.uint8)
    for _ in range(2):
        top, left = dice.integers(0, size[0] - 12), dice.integers(0, size[1] - 12)
        labels[:, top : top + 12, left : left + 12] = dice.permutation([1, 2, 5])[:2, None, None]
    images = (SHOWN[labels] + dice.normal(0, 8, (2, *size, 3))).clip(0, 255).astype(np.uint8)
    return *images, *labels


def write(folder, name, arrays, layout=("im1", "im2", "label1", "label2")):
    for part, array in zip(layout, arrays):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / part / f"{name}.png")


@pytest.fixture(scope="module")
def towns(tmp_path_factory):
    root = tmp_path_factory.mktemp("towns") / "towns"
    for part, count in (("train", 16), ("test", 5)):
        for i in range(count):
            write(root / part, f"{i}", town(i + 100 * (part == "test")))
    return root


@pytest.fixture(scope="module")
def trained(towns, tmp_path_factory):
    """A short run; its scores, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = ChangeRecipe(
        str(towns), model_args=SMALL, crop=32, batch=4, steps=40, evaluate_every=40, lr=3e-3, schedule="constant"
    )
    return train(recipe, out, device="cpu", workers=0), out


# -- folders ----------------------------------------------------------------------------------------------------------


def test_layouts_and_lists(towns, tmp_path):
    train_pairs, test_pairs = open_changes(str(towns), None, 0.1)
    assert len(train_pairs) == 16 and len(test_pairs) == 5 and len(train_pairs[0].labels) == 2
    for i in range(6):
        write(tmp_path / "landsat", str(i), town(i), ("A", "B", "labelA", "labelB"))
        write(tmp_path / "levir", str(i), town(i)[:3], ("A", "B", "label"))
    assert [len(part) for part in open_changes(str(tmp_path / "landsat"), None, 0.34)] == [4, 2]
    (tmp_path / "landsat" / "train_list.txt").write_text("0.png\n3.png\n")
    (tmp_path / "landsat" / "test_list.txt").write_text("4\n")
    parts = open_changes(str(tmp_path / "landsat"), None, 0.34)
    assert [[pair.after.stem for pair in part] for part in parts] == [["0", "3"], ["4"]]
    item = ChangeSet(find_changes(tmp_path / "levir"), 0, PLAIN)[0]
    assert "labels" not in item and set(item["change"].unique().tolist()) == {0, 1}
    for wrong, said in (
        (lambda: (tmp_path / "landsat" / "test_list.txt").write_text("9\n"), "has no 9, which a list beside it names"),
        (lambda: (tmp_path / "landsat" / "B" / "2.png").unlink(), "do not hold the same images: 2 is in one alone"),
        (lambda: (tmp_path / "landsat" / "labelB").rename(tmp_path / "gone"), "is no set of changes: im1, im2, label1"),
    ):
        wrong()
        with pytest.raises(InputError, match=said):
            open_changes(str(tmp_path / "landsat"), None, 0.34)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        open_changes(str(tmp_path / "nowhere"), None, 0.1)


def test_labels_are_numbers_palettes_or_colours(tmp_path):
    first, second, before, after = town(0)
    before[0, 0], row, column = 0, *np.argwhere(before[1:])[0] + (1, 0)
    after[0, 0] = after[row, column] = 255  # of which the second has changed in any case
    coloured = np.array(COLOURS[7], np.uint8)[before]
    palette = Image.fromarray(after)
    palette.putpalette(list(range(256)) * 3)
    write(tmp_path, "0", (first, second, coloured, after))
    palette.save(tmp_path / "label2" / "0.png")
    data = ChangeSet(find_changes(tmp_path), 7, PLAIN)
    item = data[0]
    np.testing.assert_array_equal(item["labels"], np.stack([before, after]))
    assert item["change"][0, 0] == 255 and item["change"][row, column] == 1
    np.testing.assert_array_equal(item["change"][1:], (before[1:] > 0))
    np.testing.assert_allclose(item["before"].movedim(0, -1), first / 255, atol=1e-6)
    with pytest.raises(InputError, match="label1/0.png: a mask is grey or has a palette"):
        ChangeSet(find_changes(tmp_path), 4, PLAIN)[0]
    after[:] = 9
    write(tmp_path, "0", (first, second, before, after))
    with pytest.raises(InputError, match="label2/0.png: 9 is none of 7 classes, from 0 on"):
        data[0]
    write(tmp_path, "0", (first, second[1:], before, before))
    with pytest.raises(InputError, match="has 32x32 pixels, .*im2/0.png 31x32; all of a pair have one size"):
        data[0]
    coloured[3, 3] = 1, 2, 3
    write(tmp_path, "0", (first, second, coloured, before))
    with pytest.raises(InputError, match=r"the colour \(1, 2, 3\) is none of those of 7 classes"):
        data[0]


def test_pairs_are_changed_alike(tmp_path):
    """Images whose red is the label before, and whose green the label after, say where each pixel comes from."""
    dice = np.random.default_rng(0)
    before, after = dice.integers(0, 7, (2, 40, 24), np.uint8)
    image = np.dstack([before, after, np.full_like(before, 7)])
    write(tmp_path, "0", (image, image, before, after))
    data = ChangeSet(find_changes(tmp_path), 7, PLAIN, crop=32, augment="turn")
    seen = set()
    for _ in range(12):
        item = data[0]
        assert item["labels"].shape == (2, 32, 32)
        known = item["labels"][0] != 255
        assert known.sum() == 32 * 24  # the rest is filled up
        for name in ("before", "after"):
            shown = (item[name] * 255).round().long()
            assert torch.equal(shown[:2, known], item["labels"][:, known]) and not shown[:, ~known].any()
        seen.add(tuple(item["labels"][0].flatten().tolist()))
    assert len(seen) > 6
    item = ChangeSet(find_changes(tmp_path), 7, PLAIN, augment="jitter")[0]
    assert not torch.equal(item["before"], item["after"]) and (item["labels"][0].numpy() == before).all()
    with pytest.raises(InputError, match="--augment is none, or of turn, jitter, joined by .; not 'spin'"):
        ChangeSet([], 7, PLAIN, augment="turn+spin")


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_small_run_finds_changes_and_names_them(trained, towns, tmp_path, linescan_here):
    scores, out = trained
    assert scores["sek"] > 0.2 and scores["f_scd"] > 0.6 and scores["oa"] > 0.85, scores
    rows = read_metrics(out / "metrics.csv")
    assert rows[0]["sek"] > rows[-2]["sek"] and all(row["lovasz"] > 0 for row in rows if "lovasz" in row)
    arguments = ("evaluate", "--task", "change", "--data", towns, "-c", out / "best.safetensors")
    status, said, _ = linescan_here(*arguments, "-o", tmp_path / "report", "--json", "--workers", 0)
    found = json.loads(said)
    assert status == 0 and {name: found[name] for name in scores} == pytest.approx(scores, abs=1e-6)
    assert found["samples"] == 5 and np.sum(found["confusion"]) == 5 * 2 * 32 * 32
    assert "sports field" in (tmp_path / "report" / "report.html").read_text()
    assert len((tmp_path / "report" / "pairs.csv").read_text().splitlines()) == 6


def test_the_loss_is_the_published_sum(towns):
    """Of the golden data's logits; `sek` is that of all calls but the first."""
    data = REPOSITORY / "tests" / "parity" / "data"
    manifest = json.loads((data / "mambafcs__losses_and_metrics.json").read_text())
    with np.load(data / "mambafcs__losses_and_metrics.npz") as arrays:
        change, *labels = (torch.from_numpy(arrays[f"label_{name}"]).long() for name in ("cd", "t1", "t2"))

    def logits(name, target, classes):
        noise = golden_noise(name, (len(target), classes, *target.shape[1:]), manifest["salt"])
        return torch.from_numpy(2 * noise + 1.5 * np.eye(classes)[target].transpose(0, 3, 1, 2))

    answers = Changes(logits("pred_cd", change, 2), logits("pred_t1", labels[0], 7), logits("pred_t2", labels[1], 7))
    task = ChangeTask(ChangeRecipe(str(towns), model="mambafcs_base", model_args=SMALL))
    batch = {"before": None, "after": None, "change": change, "labels": torch.stack(labels, 1)}
    found = task(lambda before, after: answers, batch)
    values = manifest["values"]
    wanted = values["total_with_first_call"] + 0.5 * (values["sek_loss_later_calls"] - values["sek_loss_first_call"])
    assert found["loss"].item() == pytest.approx(wanted, rel=1e-5)
    assert found["similarity"].item() == pytest.approx(values["similarity"], rel=1e-5)
    task.recipe = replace(task.recipe, sek_from=3)
    for step, sek in ((2, 0), (3, found["sek"].item())):
        task.step = step
        assert task(lambda before, after: answers, batch)["sek"].item() == sek, "from step 3 on"


def test_other_classes_and_changes_alone(trained, tmp_path):
    _, out = trained
    for i in range(4):
        write(tmp_path / "town", str(i), town(i))
        write(tmp_path / "alone", str(i), town(i)[:3], ("A", "B", "label"))
    common = dict(crop=32, batch=2, steps=1, holdout=0.5, augment="none")
    (tmp_path / "town" / "classes.txt").write_text("same\n" + "\n".join("abcdefg"))
    recipe = ChangeRecipe(str(tmp_path / "town"), checkpoint=str(out / "best.safetensors"), bf16=True, **common)
    train(recipe, tmp_path / "tuned", device="cpu", workers=0)
    model, card = restore(checkpoint=tmp_path / "tuned" / "model.safetensors")
    assert card.classes == ["same", *"abcdefg"] and model.num_classes == 8
    before, _ = restore(checkpoint=out / "best.safetensors")
    task = ChangeTask(ChangeTask.resolve(recipe))
    task.load_weights()
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(task.model.encoder.state_dict()[name], value)

    recipe = ChangeRecipe(str(tmp_path / "alone"), model_args=SMALL, **common)
    scores = train(recipe, tmp_path / "binary", device="cpu", workers=0)
    assert list(scores) == ["oa", "f1", "iou", "miou"]
    detect = ChangeDetector(checkpoint=tmp_path / "binary" / "model.safetensors", device="cpu")
    change = detect(*town(0)[:2])
    assert not change.semantic and change.classes == ["unchanged", "changed"] and change.before.max() <= 1
    for data, said in (("town", "resnet18 finds no changes"), ("alone", "labels of changes alone, and mambafcs_base")):
        with pytest.raises(InputError, match=said):
            if data == "town":
                ChangeTask(ChangeRecipe(str(tmp_path / data), model="resnet18"))
            ChangeTask.judge(ChangeRecipe(str(tmp_path / data)), model, card)
    with pytest.raises(InputError, match="--classes is names with commas between"):
        ChangeTask(replace(recipe, model="mambafcs_base", data=str(tmp_path / "town"), classes="one"))


def test_the_encoder_starts_from_a_classifier(towns, tmp_path):
    torch.manual_seed(3)
    classifier = create_model("vmamba_base_s2l15", dims=16, depths=[1, 1, 1, 1])
    torch.save({"model": classifier.state_dict()}, tmp_path / "vmamba.pth")
    recipe = ChangeRecipe(
        str(towns), model="mambafcs_base", model_args=SMALL, encoder_checkpoint=str(tmp_path / "vmamba.pth"), crop=32
    )
    task = ChangeTask(recipe)
    task.load_weights()
    assert torch.equal(
        task.model.encoder.trunk.stages[2].blocks[0].mixer.ssm.D, classifier.stages[2].blocks[0].mixer.ssm.D
    )
    assert torch.equal(task.model.encoder.trunk.patch_embed.conv1.weight, classifier.patch_embed.conv1.weight)
    with pytest.raises(CheckpointError, match="is not a checkpoint of this VMamba"):
        ChangeTask(replace(recipe, model_args=SMALL | {"dims": 32})).load_weights()
    assert ChangeRecipe("x", encoder_checkpoint="imagenet", pretrained=True).resumed() == ChangeRecipe("x")


@pytest.mark.slow
def test_kill_9_and_two_processes(towns, tmp_path, linescan_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "towns").symlink_to(towns)
    args = (
        "train", "--task", "change", "--data", "towns", *ARGS, "--crop", "32", "--batch", "2", "--steps", "8",
        "--ema", "0.9", "--save-every", "3", "--evaluate-every", "8", "--log-every", "1", "--workers", "0",
        "--device", "cpu",
    )  # fmt: skip
    assert linescan_here(*args, "-o", "whole")[0] == 0
    kill_and_resume(tmp_path, args, "killed", times=1, rows=6)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))
    train_as_two(tmp_path, *args, "-o", "two")
    [last] = [row for row in read_metrics(tmp_path / "two" / "metrics.csv") if row["step"] == 8 and "val_oa" in row]
    model, card = restore(checkpoint=tmp_path / "two" / "model.safetensors")
    judge = ChangeTask.judge(ChangeRecipe(str(towns)), model, card)
    alone = evaluate(judge, model, Processes(0, 1, torch.device("cpu"))).scores
    assert {name: last[f"val_{name}"] for name in alone} == pytest.approx(alone, abs=1e-3)


# -- the tool ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detect(trained):
    return ChangeDetector(checkpoint=trained[1] / "best.safetensors", device="cpu")


def test_a_change_is_what_the_network_says(detect):
    first, second, before, after = town(200)
    change = detect(first, second)
    inputs = (detect.model.preprocess.normalised(torch.from_numpy(x).movedim(-1, 0)[None]) for x in (first, second))
    with torch.no_grad():
        expected = [x[0].numpy() for x in detect.module(*inputs).decide()]
    for ours, wanted in zip((change.changed, change.before, change.after), expected):
        np.testing.assert_array_equal(ours, wanted)
    assert (change.before == before).mean() > 0.8 and (change.after == after).mean() > 0.8
    assert change.share == pytest.approx(change.changed.mean()) and detect.classes == list(SECOND)
    assert sum(share for *_, share in change.transitions) == pytest.approx(change.share)
    back = detect(second, first)
    assert (back.before == after).mean() > 0.8, "the order of the images matters"
    drawn = detect.draw(detect.open((first, second)), change)
    assert drawn.width > 2 * 384 and drawn.height > 2 * 384
    with pytest.raises(InputError, match="both images are of one size, got 32x32 and 30x32 pixels"):
        detect(first, second[2:])
    with pytest.raises(InputError, match="mambafcs_base reads two images of a place, before and after"):
        detect([first])


def test_windows_cut_both_images_alike(detect, trained):
    first, second, *_ = town(201, (40, 64))
    tool = ChangeDetector(checkpoint=trained[1] / "best.safetensors", device="cpu", window=(40, 32), stride=32)
    halves = [detect(first[:, at], second[:, at]).codes for at in (slice(0, 32), slice(32, 64))]
    np.testing.assert_array_equal(tool(first, second).codes, np.concatenate(halves, 1))


def test_windows_that_the_model_cannot_read_are_refused_once(trained, towns, tmp_path, linescan_here):
    images, options = towns / "test", ("-c", trained[1] / "best.safetensors", "-o", tmp_path, "--device", "cpu")
    status, _, said = linescan_here("change", images / "im1", images / "im2", *options, "--window", 3)
    assert status == 2 and said.count("windows of 3x3 pixels: VMamba expects images of at least 4x4 pixels") == 1


def test_codes_of_many_classes_and_of_nothing():
    codes = np.array([[0, 20 * 30 + 7], [0, 0]], np.uint16)
    change = Change(codes, [str(i) for i in range(30)])
    assert change.before.tolist() == [[0, 20], [0, 0]] and change.after.tolist() == [[0, 7], [0, 0]]
    assert change.transitions == [("20", "7", 0.25)] and change.share == 0.25
    assert Change(codes[:, :1], ["a", "b"]).transitions == []


def test_shifts():
    dice = np.random.default_rng(0)
    ground = dice.integers(0, 255, (120, 90, 3)).astype(np.uint8)
    ground = np.asarray(Image.fromarray(ground).resize((45, 60)).resize((90, 120)))
    first, second = ground[8:104, 8:72], ground[3:99, 14:78]
    assert shift_between(first, second) == (5, -6) and shift_between(second, first) == (-5, 6)
    assert shift_between(first, first) == (0, 0)
    changed = first.copy()
    changed[20:50, 10:40] = 7
    assert shift_between(first, changed) == (0, 0)
    other = dice.integers(0, 255, first.shape).astype(np.uint8)
    large = dice.integers(0, 255, (4, 256, 256, 3))  # in which some place is always higher than the middle
    assert [shift_between(*pair) for pair in zip(large, large[1:])] == [None] * 3
    assert shift_between(first, other) is None and shift_between(first, np.full_like(first, 9)) is None
    wide = np.asarray(Image.fromarray(ground).resize((1700, 250)))  # compared at a third of its size, told in its own
    assert _shift(PairedPixels([open_pixels(wide[6:216, 30:1630]), open_pixels(wide[:210, :1600])])) == (6, 30)


def test_the_command_on_folders_of_pairs_of_all_kinds(trained, tmp_path, linescan_here):
    _, out = trained
    first, second, *_ = town(202, (34, 50))
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    for name in ("plain", "broken", "alone", "size"):
        Image.fromarray(first).save(tmp_path / "old" / f"{name}.png")
    Image.fromarray(second).save(tmp_path / "new" / "plain.jpg", quality=95)
    Image.fromarray(second[1:]).save(tmp_path / "new" / "size.png")
    (tmp_path / "new" / "broken.png").write_bytes(b"\x89PNG no image")
    Image.fromarray(np.dstack([second, np.full(second.shape[:2], 9, np.uint8)])).save(tmp_path / "old" / "alpha.png")
    Image.fromarray(second[..., 0].astype(np.uint16) * 257).save(tmp_path / "new" / "alpha.png")
    arguments = ("-c", out / "best.safetensors", "-o", tmp_path / "out", "--device", "cpu")
    status, said, told = linescan_here("change", tmp_path / "old", tmp_path / "new", *arguments, "--json")
    assert status == 1 and "2 of 5 done" in told
    outcomes = {str(one["source"][0] if isinstance(one["source"], list) else one["source"]): one
                for one in json.loads(said)}  # fmt: skip
    by_name = {path.rpartition("/")[2]: one for path, one in outcomes.items()}
    both = " and ".join(str(tmp_path / folder / "size.png") for folder in ("old", "new"))
    assert by_name["size.png"]["error"] == f"{both}: both images are of one size, got 34x50 and 33x50 pixels"
    assert "broken.png" in by_name["broken.png"]["error"] and "has no partner" in by_name["alone.png"]["error"]
    answer = by_name["plain.png"]["answer"]
    assert 0 < answer["changed"] < 1 and answer["shift"] is None and answer["transitions"][0]["from"] in SECOND
    maps = {part: Image.open(tmp_path / "out" / part / "plain.png") for part in ("change", "before", "after")}
    assert all(image.size == (50, 34) and image.mode == "P" for image in maps.values())
    changed = np.asarray(maps["change"])
    assert changed.mean() == pytest.approx(answer["changed"])
    assert not np.asarray(maps["before"])[changed == 0].any()
    assert (tmp_path / "out" / "overlays" / "plain.jpg").exists()
    assert json.loads((tmp_path / "out" / "classes.json").read_text())[5] == {
        "id": 5, "name": "building", "color": [128, 0, 0]
    }  # fmt: skip
    pair = (tmp_path / "old" / "plain.png", tmp_path / "new" / "plain.jpg")
    (tmp_path / "old").rename(tmp_path / "before")  # as OUT's own folder is called
    status, _, told = linescan_here(
        "change", tmp_path / "before" / "plain.png", pair[1], *arguments[:2], "-o", tmp_path
    )
    assert status == 1 and "an output would replace this input" in told and not (tmp_path / "change").exists()
    (tmp_path / "before").rename(tmp_path / "old")
    status, said, _ = linescan_here("change", *pair, *arguments, "--no-overlays", "--window", "32")
    assert status == 0 and "% changed" in said
    status, _, told = linescan_here("change", *pair, "-c", out / "best.safetensors", "-m", "sigma_tiny")
    assert status == 2 and "sigma_tiny finds no changes; `linescan list --task change`" in told
