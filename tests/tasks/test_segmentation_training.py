"""Training segmentation models of the zoo: losses and scores by hand, sets with masks, whole runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import linescan
from linescan.engine.cards import read_card, restore
from linescan.engine.mask_sets import IGNORED, Augment, MaskedScenes, classes_of, find_scenes, open_scenes
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.scores import Totals, evaluate
from linescan.errors import InputError
from linescan.tasks.recipes import SegmentationRecipe
from linescan.tasks.segment import MaskScores, SegmentationTask, Segmenter, cross_entropy, dice_loss

from ..runs import contents, finish, kill_and_resume, same, train_as_two

VMUNET = "dims=[32,64,128,256] depths=[1,1,1,1] depths_decoder=[1,1,1,1] heads=Z d_state=1 drop_path_rate=0".split()
ARGS = tuple(word for arg in VMUNET for word in ("--model-arg", arg))
ALONE = Processes(0, 1, torch.device("cpu"))


def lesion(seed: int, size=(60, 80)) -> tuple[np.ndarray, np.ndarray]:
    """Skin with a dark ellipse, and where it is."""
    dice = np.random.default_rng(seed)
    y, x = np.indices(size) / min(size)
    centre, radii = dice.uniform(0.35, 0.65, 2) * (1, size[1] / min(size)), dice.uniform(0.25, 0.45, 2)
    mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    colour = np.where(mask[..., None], (110, 60, 50), (210, 160, 140)) * dice.uniform(0.8, 1.1)
    return (colour + dice.normal(0, 12, (*size, 3))).clip(0, 255).astype(np.uint8), mask


def write(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    """A small set in ISIC's layout."""
    root = tmp_path_factory.mktemp("isic")
    for i in range(20):
        image, mask = lesion(i)
        part = root / ("train" if i < 14 else "val")
        write(part / "images" / f"ISIC_{i:03}.png", image)
        write(part / "masks" / f"ISIC_{i:03}_segmentation.png", np.where(mask, 255, 0).astype(np.uint8))
    return root


# -- losses and scores ------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(2, (2, 4, 5), generator=generator).byte()
    p, t = logits[:, 0].sigmoid(), target.double()
    assert cross_entropy(logits, target) == pytest.approx(F.binary_cross_entropy(p, t).item())
    each = [1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, t)]
    assert dice_loss(logits, target) == pytest.approx((sum(each) / 2).item())
    # What is not known has no part; two channels are one that is their difference.
    unknown = target.clone()
    unknown[0, :2] = IGNORED
    known = unknown != IGNORED
    assert cross_entropy(logits, unknown) == pytest.approx(F.binary_cross_entropy(p[known], t[known]).item())
    a, b = p[0, 2:], t[0, 2:]
    first = 1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1)
    assert dice_loss(logits, unknown) == pytest.approx(((first + each[1]) / 2).item())
    pair = torch.cat([torch.zeros_like(logits), logits], 1)
    assert cross_entropy(pair, unknown) == pytest.approx(cross_entropy(logits, unknown).item())
    both = [dice_loss(logits, unknown), dice_loss(-logits, torch.where(known, 1 - target, unknown))]
    assert dice_loss(pair, unknown) == pytest.approx((sum(both) / 2).item())
    assert cross_entropy(logits, torch.full_like(target, IGNORED)) == 0


@pytest.mark.parametrize("count", [2, 4])
def test_scores_are_those_of_scikit_learn(count):
    from sklearn import metrics

    dice = np.random.default_rng(count)
    truth, found = dice.integers(count, size=(3, 6, 7)), dice.integers(count, size=(3, 6, 7))
    truth[0, :2] = IGNORED
    names = [str(i) for i in range(count)]
    judge = MaskScores(
        SimpleNamespace(classes=names), SimpleNamespace(size=(6, 7), logits=lambda model, images: images)
    )
    logits = F.one_hot(torch.from_numpy(found), count).permute(0, 3, 1, 2).float()
    logits = logits[:, 1:] - 0.5 if count == 2 else logits
    totals = Totals()
    for part in (slice(0, 2), slice(2, 3)):
        batch = {"images": logits[part], "mask": torch.from_numpy(truth[part]), "index": torch.arange(3)[part]}
        judge.measure(None, batch, totals)
    totals.reduce(ALONE)
    scores = judge.scores(totals)
    known = truth != IGNORED
    t, f = truth[known], found[known]
    average = {"average": "binary"} if count == 2 else {"average": "macro"}
    assert scores["miou"] == pytest.approx(metrics.jaccard_score(t, f, **average))
    assert scores["dice"] == pytest.approx(metrics.f1_score(t, f, **average))
    assert scores["sensitivity"] == pytest.approx(metrics.recall_score(t, f, **average))
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(t, f))
    each = [((t != k) & (f != k)).sum() / (t != k).sum() for k in range(count)]
    assert scores["specificity"] == pytest.approx(each[1] if count == 2 else np.mean(each))
    alone = metrics.jaccard_score(truth[2].ravel(), found[2].ravel(), **average)
    assert totals["worth"][totals["index"] == 2].item() == pytest.approx(alone)


def test_answers_at_several_scales_and_mirrored_are_added():
    def logits(_, images):
        ramp = torch.linspace(-1, 1, images.shape[-1])
        return torch.stack([images.float().mean(1) / 90, ramp.expand_as(images[:, 0])], 1)

    images = torch.randint(0, 256, (2, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = SimpleNamespace(size=None, logits=logits)
    once = MaskScores(None, seen).answers(None, images, (6, 8))
    torch.testing.assert_close(once, logits(None, images))
    small = torch.nn.functional.interpolate(images.float(), (4, 5), mode="bilinear").round()
    wanted = 0
    for x in (images, small):
        for turned in (False, True):
            own = logits(None, x.flip(-1) if turned else x).exp()
            own = own.flip(-1) if turned else own
            wanted = wanted + torch.nn.functional.interpolate(own, (6, 8), mode="bilinear")
    found = MaskScores(None, seen, [1.0, 0.6], mirror=True).answers(None, images, (6, 8))
    shares, right = (x / x.sum((1, 2, 3), keepdim=True) for x in (found, wanted))
    torch.testing.assert_close(shares, right)

    def far(_, images):  # one image, and one scale, far above the other
        level = images.float().mean((1, 2, 3)) + 30 * images.shape[-1]
        return level[:, None, None, None] + torch.tensor([0.0, 1.0])[:, None, None].expand(2, *images.shape[-2:])

    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 6, 8)
    found = MaskScores(None, SimpleNamespace(size=None, logits=far), [1.0, 0.5]).answers(None, images, (6, 8))
    assert found.isfinite().all() and (found.argmax(1) == 1).all()
    judge, totals = MaskScores(SimpleNamespace(classes="ab"), seen), Totals()
    judge.measure(None, {"images": images, "mask": torch.ones(2, 12, 16), "index": torch.arange(2)}, totals)
    assert totals["confusion"].sum() == 2 * 12 * 16, "in the resolution of the masks"
    how = SegmentationRecipe("data", scales="0.75,1", mirror=True)
    judge = MaskScores.of([], "abc", SimpleNamespace(size=None, grey_extra=False), how)
    assert judge.factors == [0.75, 1.0] and judge.mirror, "as the recipe says"
    for scales in ("1,x", "", "0.01"):
        with pytest.raises(InputError, match="--scales are numbers of 0.1 to 10"):
            SegmentationRecipe("data", scales=scales)


def test_a_class_that_no_image_has_is_not_in_the_means():
    judge = MaskScores(SimpleNamespace(classes="abc"), SimpleNamespace(size=None))
    scores = judge._summary(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert scores["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2) and scores["accuracy"] == pytest.approx(7 / 8)
    nothing = MaskScores(SimpleNamespace(classes="ab"), SimpleNamespace(size=None))
    assert np.isnan(nothing._summary(np.array([[9, 0], [0, 0]]))["dice"])


# -- sets -------------------------------------------------------------------------------------------------------------


def test_layouts(isic, tmp_path):
    train, held_out = open_scenes(str(isic), None, 0.1)
    assert len(train) == 14 and len(held_out) == 6 and classes_of(str(isic)) == ("background", "foreground")
    train, held_out = open_scenes(str(isic / "train"), None, 0.25)
    assert len(train) == 10 and not set(train) & set(held_out)
    for place in ("images", "extra", "masks"):
        write(tmp_path / place / "sub" / "a.png", np.zeros((4, 5), np.uint8))
    [scene] = find_scenes(tmp_path, 2)
    assert [path.parts[-3] for path in (*scene.images, scene.mask)] == ["images", "extra", "masks"]
    write(tmp_path / "images" / "b.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(InputError, match=r"images/b.png has no mask: there is no .*masks/b, with or without"):
        find_scenes(tmp_path)
    write(tmp_path / "masks" / "b_mask.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(InputError, match=r"images/b.png has no partner of its name in .*extra"):
        find_scenes(tmp_path, 2)
    with pytest.raises(InputError, match="has no images/ and masks/ in it"):
        find_scenes(tmp_path / "masks")


def test_what_masks_may_hold(tmp_path):
    write(tmp_path / "images" / "a.png", np.zeros((2, 3, 3), np.uint8))
    path, wanted = tmp_path / "masks" / "a.png", [[0, 1, 1], [0, 0, 1]]
    two = MaskedScenes(find_scenes_of(tmp_path, path, np.uint8(wanted)), classes_of(str(tmp_path)))
    palette = Image.fromarray(np.uint8(wanted), "P")
    palette.putpalette([0, 0, 0, 200, 30, 30])
    colours = np.uint8(wanted)[..., None] * np.uint8([255, 255, 255])
    for image in (
        Image.fromarray(np.uint8(wanted)), Image.fromarray(np.uint8(wanted) * 255), palette, Image.fromarray(colours),
        Image.fromarray(np.uint16(wanted) * 65535), Image.fromarray(np.bool_(wanted)),
    ):  # fmt: skip
        image.save(path)
        assert two[0]["mask"].tolist() == wanted, image.mode
    write(path, np.uint8([[127, 128, 255], [0, 9, 200]]))  # blurred by JPEG
    assert two[0]["mask"].tolist() == wanted
    write(path, np.uint8([[0, 1, 255], [0, 0, 1]]))  # numbers: 255 stands for pixels whose class is not known
    assert two[0]["mask"].tolist() == [[0, 1, 255], [0, 0, 1]]
    for pixels, said in (
        (np.uint8(wanted) * 3, "its highest value is 3; of two classes masks are 0 and 1, or 0 and 255"),
        (np.uint8(wanted)[:, :2], "images/a.png has 2x3 pixels, its mask .*masks/a.png has 2x2"),
        (colours * np.uint8([1, 0, 0]), "a mask is grey or has a palette; this one has colours"),
    ):
        write(path, pixels)
        with pytest.raises(InputError, match=said):
            two[0]
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\n")
    assert classes_of(str(tmp_path)) == ("sky", "road", "car")
    three = MaskedScenes(two.scenes, classes_of(str(tmp_path)))
    write(path, np.uint8([[0, 2, 1], [255, 0, 1]]))
    assert three[0]["mask"].tolist() == [[0, 2, 1], [255, 0, 1]] and three.preview(0).size[0] >= 336
    write(path, np.uint8([[0, 2, 1], [3, 0, 1]]))
    with pytest.raises(InputError, match="a.png: 3 is none of 3 classes, from 0 on"):
        three[0]
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(InputError, match="names 1 classes, one in a line"):
        classes_of(str(tmp_path))


def find_scenes_of(root, path, pixels):
    write(path, pixels)
    return find_scenes(root)


@pytest.mark.parametrize("words", ["none", "mirror+flip+rotate", "mirror+scale"])
def test_images_and_masks_are_changed_alike(words):
    """Images that are bright where their masks are: so they are afterwards."""
    mask = torch.from_numpy(lesion(3, (70, 90))[1]).byte()
    images, seen = (mask * 200 + 20).expand(6, -1, -1).contiguous(), set()
    augment = Augment(words, (48, 40), outside=0)
    for seed in range(12):
        torch.manual_seed(seed)
        changed, own = augment(images, mask)
        assert changed.shape == (6, 48, 40) and own.shape == (48, 40) and changed.dtype == own.dtype == torch.uint8
        bright, known = changed[5] > 120, own != IGNORED
        assert (bright == (own == 1))[known].float().mean() > 0.97 and torch.equal(changed[0], changed[5])
        assert torch.equal(changed[5] == 0, ~known)  # black and without a class beyond the border
        seen.add(own.numpy().tobytes())
    assert (len(seen) == 1) == (words == "none")
    with pytest.raises(InputError, match="is none, or of mirror, flip, rotate, scale, joined by .; not 'turn'"):
        Augment("mirror+turn", (8, 8))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(isic, tmp_path_factory):
    """A short training from the command line; the folder of its run."""
    from typer.testing import CliRunner

    from linescan.cli import app

    out = tmp_path_factory.mktemp("runs") / "isic"
    args = ("train", "--task", "segmentation", "--data", isic, "--out", out, "--size", 32, "--batch", 7, "--steps", 50,
            "--lr", 5e-3, "--evaluate-every", 50, "--workers", 0, "--device", "cpu", *ARGS)  # fmt: skip
    ran = CliRunner().invoke(app, list(map(str, args)))
    assert ran.exit_code == 0, ran.output
    return out


@pytest.mark.slow
def test_it_trains_is_evaluated_and_segments(isic, trained, tmp_path, linescan_here):
    rows = read_metrics(trained / "metrics.csv")
    losses = [row for row in rows if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["entropy"] + row["dice"], rel=1e-4) for row in losses)
    card = read_card(trained / "model.safetensors")
    assert card.classes == ["background", "foreground"] and card.preprocess.size == (3, 32, 32)
    assert card.trained["val_miou"] > 0.7 and card.trained["val_dice"] > card.trained["val_miou"]
    # evaluate says the same, and writes its page
    weights = trained / "model.safetensors"
    said = linescan_here("evaluate", "--task", "segmentation", "-d", isic, "-c", weights, "--workers", 0, "--device",
                         "cpu", "--out", tmp_path / "page")  # fmt: skip
    assert said[0] == 0 and f"mIoU {card.trained['val_miou']:.4f}" in said[1]
    assert (tmp_path / "page" / "report.html").read_bytes().count(b"<figure>") == 6
    listed = (tmp_path / "page" / "images.csv").read_text().splitlines()[1:]
    assert len(listed) == 6 and [float(line.rpartition(",")[2]) for line in listed] == sorted(
        float(line.rpartition(",")[2]) for line in listed
    )
    # the tool opens the file by itself, and answers as was scored
    segment = Segmenter(checkpoint=weights, device="cpu")
    assert segment.classes == card.classes and segment.model_name == "mhsvm_vmunet_4h"
    right = []
    for i in range(14, 20):
        image, mask = lesion(i)
        answer = segment(image)
        assert answer.shape == mask.shape
        right.append((answer & mask).sum() / (answer | mask).sum())
    assert np.mean(right) == pytest.approx(card.trained["val_miou"], abs=0.08)
    grey = np.asarray(Image.fromarray(lesion(14)[0]).convert("L"))
    np.testing.assert_array_equal(segment(grey), segment(np.repeat(grey[..., None], 3, -1)))
    # fine-tuning, to other classes, keeps all but the head
    (tmp_path / "more" / "images").mkdir(parents=True)
    for i in range(4):
        image, mask = lesion(i)
        write(tmp_path / "more" / "images" / f"{i}.png", image)
        write(tmp_path / "more" / "masks" / f"{i}.png", mask.astype(np.uint8) * (1 + i % 2))
    (tmp_path / "more" / "classes.txt").write_text("skin\nmole\nscar")
    recipe = SegmentationRecipe(str(tmp_path / "more"), checkpoint=str(weights), holdout=0.25, bf16=True)
    started = SegmentationTask.resolve(recipe)
    assert SegmentationTask(started.resumed()).input.size == (32, 32), "the checkpoint's, when resumed"
    task = SegmentationTask(started)
    task.load_weights()
    before, _ = restore(checkpoint=weights)
    own, other = (model.encoder[0].blocks[0].mixer.in_proj.weight for model in (task.model, before))
    assert torch.equal(own, other)
    assert task.model.head.weight.shape[0] == 3 and task.input.size == (32, 32)
    batch = torch.utils.data.default_collate([task.data[0], task.data[1]])
    with torch.autocast("cpu", torch.bfloat16):
        task(task.model, batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())


def test_what_cannot_be_trained_is_said_in_one_line(isic, tmp_path, trained):
    def open_task(**options):
        return SegmentationTask(SegmentationTask.resolve(SegmentationRecipe(str(isic), **options)))

    with pytest.raises(InputError, match="vim_tiny_patch16_224 segments no images"):
        open_task(model="vim_tiny_patch16_224")
    with pytest.raises(InputError, match="mambafcs_base segments no images.* is for `linescan change`"):
        Segmenter("mambafcs_base")
    with pytest.raises(InputError, match="--scales is for models that take images of any size"):
        open_task(scales="0.5,1", model_args={"dims": [32, 64, 128, 256], "depths": [1] * 4, "depths_decoder": [1] * 4})
    with pytest.raises(InputError, match="--size must be as in 256 or 480x640 .height x width., not '1x2x3'"):
        open_task(size="1x2x3")
    with pytest.raises(InputError, match="no model and no checkpoint given"):
        Segmenter()
    with pytest.raises(InputError, match="has 2 classes, the model 3"):
        SegmentationTask.judge(SegmentationRecipe(str(isic)), None, SimpleNamespace(model="sigma_tiny", classes="abc"))


@pytest.mark.slow
def test_killed_resumed_and_two_processes(isic, tmp_path):
    (tmp_path / "isic").symlink_to(isic)
    args = (
        "train", "--task", "segmentation", "--data", "isic", *ARGS, "--size", "32", "--batch", "2", "--steps", "6",
        "--ema", "0.9", "--save-every", "2", "--evaluate-every", "6", "--log-every", "1", "--workers", "0", "--device",
        "cpu", "--bf16",
    )  # fmt: skip
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=1, rows=4)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))
    train_as_two(tmp_path, *args, "-o", "two")
    [last] = [row for row in read_metrics(tmp_path / "two" / "metrics.csv") if "val_dice" in row]
    model, card = restore(checkpoint=tmp_path / "two" / "model.safetensors")
    judge = SegmentationTask.judge(SegmentationRecipe(str(isic)), model, card)
    alone = evaluate(judge, model, ALONE).scores
    assert last["val_miou"] == pytest.approx(alone["miou"], abs=1e-3)


def test_two_images_of_a_scene_and_whole_images_of_any_size(tmp_path):
    """A model that does not resize is trained on parts, and scored on whole images."""
    for i in range(4):
        image, mask = lesion(i, (50 + 8 * i, 64))
        for place in ("images", "extra"):
            write(tmp_path / place / f"{i}.png", image if place == "images" else image[..., 0])
        write(tmp_path / "masks" / f"{i}.png", mask.astype(np.uint8) * (1 + i % 2))
    (tmp_path / "classes.txt").write_text("skin\nmole\nscar")
    small = {"depths": [1, 1, 1, 1], "dim": 32, "decoder_depths": [1, 1, 1]}
    recipe = SegmentationRecipe(str(tmp_path), model="sigma_tiny", model_args=small, size="32x48", holdout=0.5)
    task = SegmentationTask(SegmentationTask.resolve(recipe))
    batch = torch.utils.data.default_collate([task.data[0], task.data[1]])
    assert batch["images"].shape == (2, 6, 32, 48) and batch["mask"].shape == (2, 32, 48)
    losses = task(task.model, batch)
    losses["loss"].backward()
    assert losses["output"].shape == (2, 3, 32, 48)
    result = evaluate(task.evaluator, task.model, ALONE)
    assert result.samples == 2 and 0 <= result.scores["miou"] <= 1
    assert task.card().preprocess.size == (6, 1, 1) and task.card().args["num_classes"] == 3
    path = tmp_path / "own.safetensors"
    linescan.engine.cards.save_model(path, task.model, task.card())
    segment = Segmenter(checkpoint=path, device="cpu")
    scene = tuple(tmp_path / place / "0.png" for place in ("images", "extra"))
    [answer] = segment([scene])
    assert segment.model.images == 2 and answer.shape == np.asarray(Image.open(scene[0])).shape[:2]
