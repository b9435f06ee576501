"""Training of promptable segmentors: data, prompts that are drawn, losses, runs that are killed and shared out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from linescan.demos.render import write_scenes
from linescan.engine.cards import restore
from linescan.engine.instance_sets import CocoInstances, PromptSamples, centre, open_instances
from linescan.engine.metrics import read_metrics
from linescan.engine.training import train
from linescan.errors import BrokenImage, InputError
from linescan.media.preprocess import Preprocess
from linescan.tasks.prompt_training import PromptingTask, Rounds
from linescan.tasks.recipes import PromptingRecipe
from tests.runs import contents, finish, kill_and_resume, same, state_of, train_as_two

MODEL = dict(img_size=48, dims=(8, 16, 32), depths=(1, 1, 2), dim=32)
SMALL = tuple(part for key, value in MODEL.items() for part in ("--model-arg", f"{key}={json.dumps(value)}"))
PLAIN = Preprocess((3, 48, 48), (0.0,) * 3, (1.0,) * 3, "bilinear")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes of digits with COCO's annotations: train/ and val/."""
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 12), ("val", 4)):
        write_scenes(root, split, count, size=48)
    return root


def coco(folder, images, annotations):
    """A folder of black images (name: (height, width)) with COCO's annotations."""
    (folder / "images").mkdir(parents=True)
    listed = []
    for i, (name, (height, width)) in enumerate(images.items()):
        Image.new("RGB", (width, height)).save(folder / "images" / name)
        listed.append({"id": i, "file_name": name, "height": height, "width": width})
    (folder / "instances.json").write_text(json.dumps({"images": listed, "annotations": annotations}))
    return folder


def test_annotations_of_all_kinds(tmp_path):
    square = [10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]
    counts = [10 * 20 + 5, 4, 20 * 30 - 10 * 20 - 9]  # runs go down the columns
    folder = coco(
        tmp_path / "set", {"a.png": (20, 30), "none.png": (20, 30)},
        [
            {"image_id": 0, "segmentation": [square]},
            {"image_id": 0, "segmentation": [square, [0, 0, 4, 0, 4, 4, 0, 4]]},
            {"image_id": 0, "segmentation": {"size": [20, 30], "counts": counts}},
            {"image_id": 0, "segmentation": {"size": [20, 30], "counts": counts}, "iscrowd": 1},
            {"image_id": 1, "segmentation": []},
        ],
    )  # fmt: skip
    found = CocoInstances(folder / "instances.json", folder / "images")
    assert len(found) == 1
    first, second, third = found.masks(0)
    assert first.sum() == 100 and first[5:15, 10:20].all() and second.sum() == 116 and second[:4, :4].all()
    assert third.sum() == 4 and third[5:9, 10].all()
    (folder / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(BrokenImage, match="a.png"):
        found.image(0, 3)


@pytest.mark.parametrize(
    "segmentation, said", [({"size": [9, 30], "counts": [270]}, "9 x 30"), ([["a"]], "damaged"), ({"a": 1}, "damaged")]
)
def test_damaged_masks_are_named(tmp_path, segmentation, said):
    folder = coco(tmp_path / "set", {"a.png": (20, 30)}, [{"image_id": 0, "segmentation": segmentation}])
    found = CocoInstances(folder / "instances.json", folder / "images")
    with pytest.raises(InputError, match=said):
        found.masks(0)


def test_layouts(scenes, tmp_path):
    train_set, held_out = open_instances(str(scenes), None, 0.1)
    assert (len(train_set), len(held_out)) == (12, 4)
    parts = open_instances(str(scenes / "train"), None, 0.25)
    assert [len(part) for part in parts] == [9, 3] and not set(parts[0].names) & set(parts[1].names)
    official = tmp_path / "coco"
    (official / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (official / f"{split}2017").symlink_to(scenes / split / "images")
        (official / "annotations" / f"instances_{split}2017.json").symlink_to(scenes / split / "instances.json")
    assert [len(part) for part in open_instances(str(official), None, 0.1)] == [12, 4]
    assert open_instances("digits", None, 0.1)[1].masks(0)[0].shape == (96, 96)
    for content, said in (
        ("[]", "no COCO"),
        ('{"images": []}', "no COCO"),
        ('{"images": [], "annotations": []}', "no obj"),
    ):
        (tmp_path / "instances.json").write_text(content)
        with pytest.raises(InputError, match=said):
            open_instances(str(tmp_path), None, 0.1)
    with pytest.raises(InputError, match=r"has no instances.json"):
        open_instances(str(official / "annotations"), None, 0.1)


def test_prompts_that_are_drawn_from_masks(tmp_path):
    bent = np.zeros((20, 30), bool)
    bent[3:10, 4:20] = bent[3:19, 4:6] = True
    assert centre(bent) == (11, 6)  # in its wide part, though its mean lies to the left
    assert centre(np.eye(5, dtype=bool)) == (2, 2)

    square, line = [10, 0, 20, 0, 20, 20, 10, 20], [0, 0, 2, 0, 2, 20, 0, 20]
    listed = [{"image_id": 0, "segmentation": [part]} for part in (square, line)]
    folder = coco(tmp_path / "set", {"a.png": (20, 30)}, listed)
    found = CocoInstances(folder / "instances.json", folder / "images")
    whole = PromptSamples(found, PLAIN)[0]  # scaled by 1.6 to 32 x 48, and padded to 48 x 48
    assert whole["input"].shape == (3, 48, 48) and whole["masks"].shape == (2, 48, 48)
    assert whole["boxes"].tolist() == [[16, 0, 32, 32], [0, 0, 3, 32]] and not whole["masks"][:, 32:].any()
    assert whole["points"][0].tolist() == [23, 15] and whole["points"][1, 0] == 1

    torch.manual_seed(0)
    np.random.seed(0)
    drawn = [PromptSamples(found, PLAIN, objects=5, flip=float(flip))[0] for flip in (False, True) for _ in range(10)]
    for i, sample in enumerate(drawn):
        columns = sample["masks"].any(1)
        assert columns[:, 16:32].any() and (columns[:, -3:].any() == (i >= 10))
        for mask, (x, y), box in zip(sample["masks"], sample["points"].int().tolist(), sample["boxes"]):
            assert mask[y, x] and (box[:2] < box[2:]).all() and (box >= 0).all() and box[3] <= 32
    assert len({tuple(box) for sample in drawn for box in sample["boxes"].tolist()}) > 20
    batch = PromptSamples.collate([whole, drawn[0]])
    assert batch["image"].tolist() == [0] * 2 + [1] * 5 and batch["masks"].shape == (7, 48, 48)


def test_corrections_lie_where_the_answer_is_wrong():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 2:6] = True
    logits = torch.where(masks, 5.0, -5.0)
    logits[0, 3, 4], logits[1, 7, 0] = -5, 5  # a hole, and a speck beside the object; the third is right
    points, labels = Rounds.corrections(logits, masks)
    assert points[0].tolist() == [[4, 3]] and points[1].tolist() == [[0, 7]] and labels.flatten().tolist() == [1, 0, 1]
    x, y = points[2, 0].int().tolist()
    assert masks[2, y, x]


def test_two_rounds_of_prompts(monkeypatch):
    """A click, then a click more; a box, then the box with a click and the first answer."""
    task = PromptingTask(PromptingRecipe("digits", model="rwkvsam_small_prompt", model_args=MODEL, objects=2))
    batch = task.data.collate([task.data[i] for i in range(2)])
    masks, prompter, given = batch["masks"], task.model.prompter, []
    empty = torch.full((2, 1, 12, 12), -9.0)

    def decode(features, **prompts):
        given.append((features, prompts))
        return empty, torch.zeros(2, 1)

    monkeypatch.setattr(prompter, "decode", decode)
    encoded = prompter.encode(batch["input"])
    monkeypatch.setattr(prompter, "encode", lambda x: encoded)
    task.model(batch)
    for features, _ in given:
        assert torch.equal(features.embedding, encoded.embedding) and torch.equal(features.stride4, encoded.stride4)
    click, box, clicks, better = (prompts for _, prompts in given)
    assert click.keys() == {"points"} and torch.equal(click["points"][:, 0], batch["points"][::2])
    assert box.keys() == {"boxes"} and torch.equal(box["boxes"], batch["boxes"][1::2])
    assert torch.equal(clicks["points"][:, 0], batch["points"][::2]) and clicks["labels"].tolist() == [[1, 1]] * 2
    assert torch.equal(better["boxes"], box["boxes"]) and better["masks"] is not None and better["labels"].all()
    for points, own in ((clicks["points"][:, 1], masks[::2]), (better["points"][:, 0], masks[1::2])):
        assert all(mask[y, x] for mask, (x, y) in zip(own, points.int().tolist()))  # nothing was found: it is missed

    empty = -empty  # now everything is found: the next click lies beside
    task.model(batch)
    assert given[6][1]["labels"].tolist() == [[1, 0]] * 2 and given[7][1]["labels"].tolist() == [[0]] * 2


def test_losses_and_gradients():
    torch.manual_seed(0)
    task = PromptingTask(PromptingRecipe("digits", model="rwkvsam_small_prompt", model_args=MODEL, objects=3))
    batch = task.data.collate([task.data[i] for i in range(2)])
    result = task(task.model, batch)
    result["loss"].backward()
    assert not [name for name, p in task.model.named_parameters() if p.grad is None]

    torch.manual_seed(1)
    logits, scores, objects = task.model(batch)
    target, p = batch["masks"][objects].float(), logits.sigmoid()
    assert objects.tolist() == [0, 2, 4, 1, 3, 5] * 2
    cross = -(target * p.log() + (1 - target) * (1 - p).log())
    certain = target * p + (1 - target) * (1 - p)
    focal = ((0.25 * target + 0.75 * (1 - target)) * (1 - certain) ** 2 * cross).mean()
    dice = (1 - (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)).mean()
    found, masks = logits > 0, target.bool()
    iou = F.mse_loss(scores, (found & masks).sum((1, 2)) / (found | masks).sum((1, 2)))
    torch.manual_seed(1)
    result = task(task.model, batch)
    for name, value in (("focal", focal), ("dice", dice), ("iou", iou), ("loss", 20 * focal + dice + iou)):
        assert torch.allclose(result[name], value, rtol=1e-4), name


@pytest.mark.slow
def test_training_learns_and_its_scores_are_those_of_the_tool(scenes, tmp_path, one_thread):
    from linescan import Prompter
    from linescan.tasks.prompt import Prompt

    recipe = PromptingRecipe(str(scenes), model_args=MODEL, epochs=12, batch=4, lr=4e-3, objects=4, bf16=True)
    scores = train(recipe, tmp_path / "run", device="cpu", workers=0)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if row.get("loss") is not None]
    assert losses[-1] < 0.8 * losses[0]
    prompter = Prompter(checkpoint=tmp_path / "run" / "model.safetensors")
    _, held_out = open_instances(str(scenes), None, 0.1)
    found = {"click": [], "box": []}
    for i, path in enumerate(held_out.names):
        prompter.set_image(path)
        for mask in held_out.masks(i):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            for name, prompt in (("click", Prompt([centre(mask)])), ("box", Prompt(box=box))):
                answer = prompter.predict(prompt).masks[0]
                found[name].append((answer & mask).sum() / (answer | mask).sum())
    for name, values in found.items():
        assert abs(np.mean(values) - scores[f"{name}_miou"]) < 1e-3
    assert restore(checkpoint=tmp_path / "run" / "best.safetensors")[1].preprocess.size == (3, 48, 48)


@pytest.mark.slow
def test_kill_9_and_two_processes(scenes, tmp_path, linescan_here):
    args = (
        "train", "--task", "prompting", "--data", scenes, *SMALL, "--objects", "2", "--batch", "2", "--steps", "12",
        "--evaluate-every", "6", "--log-every", "1", "--save-every", "2", "--workers", "0", "--device", "cpu",
    )  # fmt: skip
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=1, rows=8)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))

    train_as_two(tmp_path, *args, "-o", "two")  # an unused parameter would end it
    assert state_of(tmp_path / "two")["step"] == 12

    checkpoint = tmp_path / "whole" / "model.safetensors"
    status, text, _ = linescan_here("evaluate", "--task", "prompting", "--data", scenes, "-c", checkpoint, "--json")
    want = read_metrics(tmp_path / "whole" / "metrics.csv")[-1]
    assert status == 0 and abs(json.loads(text)["click_miou"] - want["val_click_miou"]) < 1e-6


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "vit_tiny_patch16_224"), "takes no prompts"),
        (("--objects", "1"), "--objects must be at least 2"),
        (("--data", "nowhere"), "has no instances.json"),
    ],
)
def test_what_is_refused(options, said, tmp_path, linescan_here):
    args = ("train", "--task", "prompting", "--data", "digits", "--out", tmp_path / "run", *SMALL)
    args = args[:-len(SMALL)] if "vit" in options[1] else args  # fmt: skip
    status, _, error = linescan_here(*args, *options)
    assert status == 2 and said in error and error.count("\n") == 1
