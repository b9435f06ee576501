"""Training classifiers of images and videos: what a batch is, what is learned, and the command line."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linescan.engine import samples
from linescan.engine.cards import ModelCard, read_card, restore
from linescan.engine.data import BatchReader
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.recipe import Run
from linescan.engine.samples import reader
from linescan.engine.scores import evaluate
from linescan.engine.training import Training
from linescan.errors import InputError
from linescan.media.preprocess import Preprocess
from linescan.media.video import Views, open_video, random_segments
from linescan.tasks.classify import Accuracy, ClassificationTask, default_augment, labelled
from linescan.tasks.recipes import ClassificationRecipe

from ..conftest import SMALL
from ..runs import contents, finish, kill_and_resume, same, write_clips

ALONE = Processes(0, 1, torch.device("cpu"))
VIDEO = dict(
    model="videomamba_video_tiny_patch16_224",
    model_args=dict(img_size=32, patch_size=8, depth=2, embed_dim=32, num_frames=4, d_state=4),
)
CLIPS = ("--model", VIDEO["model"], *(f"--model-arg={k}={v}" for k, v in VIDEO["model_args"].items()))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "clips")


def task(data, **recipe) -> ClassificationTask:
    recipe = ClassificationRecipe(str(data), **{**VIDEO, **recipe})
    return ClassificationTask(ClassificationTask.resolve(recipe))


def batch_of(task: ClassificationTask, keys=((0, 0, 0), (0, 1, 1))) -> dict:
    return BatchReader(task.data, 0, "train").__getitems__(list(keys)).content


def test_clips_from_files_and_folders_of_frames(clips):
    """24 clips in 4 classes, half of them files; a stray image beside them changes nothing."""
    made = task(clips, holdout=0.34, augment="none")
    assert made.classes == ["blue", "green", "red", "white"] and made.unit == "videos"
    assert (len(made.data), len(made.evaluator.data)) == (16, 8)
    names = made.data.images.names
    assert any(name.endswith(".avi") for name in names) and any("." not in name.rsplit("/", 1)[1] for name in names)
    batch = batch_of(made)
    assert batch["input"].shape == (2, 3, 4, 32, 32) and batch["label"].tolist() == made.data.images.labels[:2]
    loss = made(made.model, batch)
    assert loss["loss"].requires_grad and loss["output"].shape == (2, 4)


def test_frames_of_a_clip_are_one_per_segment_in_order():
    import random

    random.seed(0)
    drawn = np.array([random_segments(41, 4) for _ in range(400)])
    assert (np.diff(drawn, axis=1) >= 0).all()
    for i in range(4):
        assert set(drawn[:, i]) == set(range(10 * i, 10 * i + 11))
    assert all(frame == 0 for frame in random_segments(1, 4))


def test_a_clip_is_augmented_alike_in_all_its_frames(clips):
    """Of frames that are all alike, every augmentation makes frames that are alike."""
    preprocess = Preprocess((3, 24, 24), (0.5,) * 3, (0.5,) * 3, "bilinear")
    video = next(name for name in task(clips).data.images.names if not name.endswith(".avi"))

    class Still:
        """A video of one frame, shown eight times."""

        names = [video]

    class One:
        def __init__(self, path):
            self.inner = open_video(path)

        def __len__(self):
            return len(self.inner)

        def images(self, indices, channels):
            return (next(iter(self.inner.images([0], channels))) for _ in indices)

    original, samples.open_video = samples.open_video, One
    try:
        read = reader(preprocess, 8, augment="rand-m9-n2-mstd0.5-inc1", flip=0.5)
        seen = []
        for seed in range(6):
            torch.manual_seed(seed)
            clip = read(Still, 0)
            assert clip.shape == (3, 8, 24, 24) and torch.equal(clip, clip[:, :1].expand_as(clip))
            seen.append(clip[:, 0])
        assert not all(torch.equal(seen[0], other) for other in seen[1:])
        read = reader(preprocess, 8, augment="none", erasing=0.99)
        torch.manual_seed(0)
        clip = read(Still, 0)
        changed = (clip != reader(preprocess, 8, augment="none")(Still, 0)).any(0)
        assert changed.any() and torch.equal(
            changed, changed[:1].expand_as(changed)
        )  # one rectangle through all frames
        assert not torch.equal(clip[:, 0], clip[:, 1])  # of other noise in each
    finally:
        samples.open_video = original


def test_mixup_and_cutmix_treat_a_clip_as_one(clips):
    made = task(clips, mixup=0.8, cutmix=1.0, augment="none")
    flat = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 4, 32, 32).clone()
    torch.manual_seed(0)
    np.random.seed(0)
    kinds = set()
    for _ in range(20):
        inputs, labels = made.mixed({"input": flat.clone(), "label": torch.arange(4)})
        assert torch.equal(inputs, inputs[:, :1, :1].expand_as(inputs))  # alike in channels and frames
        kinds.add(inputs[0, 0, 0].unique().numel())
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        share = (inputs[0] == 3).float().mean() if inputs[0].unique().numel() == 2 else inputs[0].mean() / 3
        assert labels[0, 3].item() == pytest.approx(0.9 * share.item() + 0.025, abs=1e-4)
    assert kinds == {1, 2}  # mixed, and cut


def test_defaults_of_augmentation():
    assert default_augment("digits", 1, 0) == default_augment("digits", 3, 0) == "light"
    assert default_augment("folder", 3, 0).startswith("rand-m9") and default_augment("folder", 3, 8).startswith(
        "rand-m5"
    )
    assert default_augment("folder", 1, 0) == default_augment("folder", 4, 0) == "standard"
    assert default_augment("folder", 13, 0) == default_augment("folder", 2, 8) == "crop"


def test_images_of_any_number_of_channels(tmp_path, capsys):
    """Grey with a second channel, in files; a model of two channels is trained without an augmentation being named."""
    dice = np.random.default_rng(0)
    for label, name in enumerate(("a", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            pixels = dice.integers(0, 100, (20, 20, 2)).astype(np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels, "LA").save(tmp_path / "data" / name / f"{i}.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "a" / "colours.png")
    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2, in_chans=2)
    recipe = ClassificationRecipe(
        str(tmp_path / "data"), model="vit_tiny_patch16_224", model_args=args, epochs=8, batch=4, lr=5e-3, warmup=1,
        holdout=0.3, evaluate_every=8,
    )  # fmt: skip
    training = Training(recipe, tmp_path / "run", ALONE)
    read = training.task.evaluator.data[0]["input"]
    assert read.shape == (2, 16, 16) and read.mean(dim=(1, 2)).diff().abs() > 0.5
    assert training.run()["top1"] == 100
    assert "colours.png: 3 channels; the model expects 2" in capsys.readouterr().err
    with pytest.raises(InputError, match="--augment standard changes colours, of which 2 channels are none"):
        Training(ClassificationRecipe(str(tmp_path / "data"), model=recipe.model, model_args=args, augment="standard"),
                 tmp_path / "other", ALONE)  # fmt: skip


def test_thirteen_bands_of_any_type():
    class Bands:
        def bands(self, index, channels):
            return np.full((30, 40, channels), (2**16 - 1) // 2, np.uint16) if index else np.full((9, 9, 13), 0.5)

    preprocess = Preprocess((13, 16, 16), (0.5,) * 13, (0.25,) * 13)
    for augment in (None, "crop", "light", "none"):
        for index in (0, 1):
            tensor = reader(preprocess, augment=augment)(Bands(), index)
            assert tensor.shape == (13, 16, 16) and tensor.dtype == torch.float32 and tensor.abs().max() < 1e-4


def test_models_and_data_that_do_not_fit(clips, images, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "files" / name / "x.avi").write_bytes(b"")
    with pytest.raises(InputError, match="a holds no images, but videos"):
        task(tmp_path / "files", model="vit_tiny_patch16_224", model_args={})
    (tmp_path / "files" / "b" / "x.avi").unlink()
    with pytest.raises(InputError, match="b holds no videos$"):
        task(tmp_path / "files")
    with pytest.raises(InputError, match="the digits are images"):
        task("digits")
    with pytest.raises(InputError, match="--views are of videos; vit_tiny_patch16_224 reads images"):
        task(images, model="vit_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=1), views="2x2")
    with pytest.raises(InputError, match="--views is CLIPSxCROPS"):
        task(clips, views="many")


def test_a_small_video_model_learns(tmp_path):
    """Four classes of clips, from scratch; then scored again from its file, with more views."""
    data = write_clips(tmp_path / "clips", each=24, files=False)
    recipe = ClassificationRecipe(
        str(data), model=VIDEO["model"], model_args={**VIDEO["model_args"], "global_pool": "avg"}, holdout=0.25,
        epochs=12, batch=8, lr=4e-3, warmup=2, augment="none", smoothing=0.0, evaluate_every=12,
    )  # fmt: skip
    scores = Training(recipe, tmp_path / "run", ALONE, Run(workers=0)).run()
    assert scores["top1"] >= 60
    model, card = restore(checkpoint=tmp_path / "run" / "model.safetensors")
    assert card.classes == ["blue", "green", "red", "white"] and card.args["num_frames"] == 4
    again = evaluate(Accuracy(labelled(str(data), card, 4)), model, ALONE)
    assert again.samples == 96 and again.scores["top1"] >= 60
    views = labelled(str(data), card, 4, Views(2, 3))
    assert views[0]["input"].shape == (6, 3, 4, 32, 32)
    assert evaluate(Accuracy(views, batch=4), model, ALONE).samples == 96


def test_the_data_of_an_evaluation_follow_the_card(tmp_path, images):
    preprocess = Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    card = ModelCard("vit_tiny_patch16_224", {}, ["stripe", "square", "circle"], preprocess)
    data = labelled(str(images), card)
    assert data.images.classes == card.classes and data[0]["input"].shape == (3, 16, 16)
    by_place = ModelCard("vit_tiny_patch16_224", {}, ["x", "y", "z"], preprocess)
    assert labelled(str(images), by_place).images.classes == ["circle", "square", "stripe"]
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    with pytest.raises(InputError, match="--views are of videos; vit_tiny_patch16_224 reads images"):
        ClassificationTask.judge(ClassificationRecipe(str(images), views="2x2"), network, card)
    judge = ClassificationTask.judge(ClassificationRecipe(str(images), batch=8), network, card)
    assert judge.batch == 8 and len(judge.data) == 24
    with pytest.raises(InputError, match="3 classes, the model 2"):
        labelled(str(images), ModelCard("vit_tiny_patch16_224", {}, ["x", "y"], preprocess))


@pytest.mark.slow
def test_videos_from_the_command_line(linescan_here, clips, tmp_path):
    """Train, evaluate with views, a broken clip; kill -9 and resume."""
    args = (
        "train", "-d", clips, *CLIPS, "-e", 3, "-b", 4, "--mixup", 0.5, "--cutmix", 1, "--erasing", 0.3, "--ema", 0.9,
        "--drop-path", 0.1, "--repeats", 2, "--save-every", 1, "--log-every", 1, "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    said = finish(tmp_path, args, "whole").stderr
    assert "20 videos to train on, 4 held out" in said and "epoch   3/3" in said
    kill_and_resume(tmp_path, args, "killed", times=1, rows=10)
    assert same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))

    (clips / "red" / "broken.avi").write_bytes(b"RIFF")
    checkpoint = tmp_path / "whole" / "best.safetensors"
    evaluate = ("evaluate", "-d", clips, "-c", checkpoint, "--views", "2x3", "--json", "--workers", 0)
    status, stdout, _ = linescan_here(*evaluate)
    (clips / "red" / "broken.avi").unlink()
    result = json.loads(stdout)
    assert status == 1 and result["samples"] == 24 and "broken.avi" in result["broken"][0]
    assert set(result) == {"loss", "top1", "top5", "samples", "broken"}
    status, _, stderr = linescan_here("evaluate", "-d", "digits", "-c", checkpoint, "--workers", 0)
    assert status == 2 and stderr.count("\n") == 1


def test_columns_of_the_log(tmp_path, linescan_here):
    status, _, stderr = linescan_here("train", "-d", "digits", "-o", tmp_path / "run", "-e", 1, "-b", 360, *SMALL)
    assert status == 0, stderr
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,lr,loss,val_loss,val_top1,val_top5,seconds"
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    card = read_card(tmp_path / "run" / "model.safetensors")
    assert card.trained == {k: last[k] for k in ("step", "epoch", "val_loss", "val_top1", "val_top5")}
