"""Encoders that match a teacher's map of features: a model's, or what is read from files."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import linescan
from linescan.engine.cards import ModelCard, preprocess_of, restore, save_model
from linescan.engine.metrics import read_metrics
from linescan.engine.training import train
from linescan.errors import InputError
from linescan.tasks.distill_encoder import EncoderDistillationTask, FeatureFiles, map_of
from linescan.tasks.recipes import EncoderDistillationRecipe
from tests.conftest import write_images

STUDENT = dict(img_size=32, dims=(8, 16, 32), depths=(1, 1, 2), dim=32)
VIT = dict(img_size=48, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "photos", each=4, size=40)


@pytest.fixture(scope="module")
def features(photos, tmp_path_factory):
    """Files of a teacher: means of each photo's colours over 2 x 2 places, in three channels."""
    folder = tmp_path_factory.mktemp("features")
    for path in photos.rglob("*.png"):
        target = folder / path.relative_to(photos).with_suffix(".npz")
        target.parent.mkdir(exist_ok=True)
        pixels = np.asarray(linescan.media.images.read_image(path), np.float32) / 255
        np.savez(target, pixels.reshape(2, 20, 2, 20, 3).mean((1, 3)).transpose(2, 0, 1))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "vit.safetensors"
    model = linescan.engine.cards.build("vit_tiny_patch16_224", **VIT)
    save_model(path, model, ModelCard("vit_tiny_patch16_224", VIT, [], preprocess_of(model, 3, 48)))
    return str(path)


def test_a_model_as_teacher(photos, teacher):
    """Another normalisation, size and width: the teacher gets its own, the student a projection that is not kept."""
    recipe = EncoderDistillationRecipe(
        str(photos), model="rwkvsam_small_prompt", model_args=STUDENT, teacher_checkpoint=teacher, flip=0.0
    )
    task = EncoderDistillationTask(recipe)
    batch = {"input": torch.stack([task.data[i]["input"] for i in range(2)])}
    result = task(task.model, batch)
    vit, encoder = task.teacher.model, task.model.encoder
    with torch.no_grad():
        tokens = vit.forward_features(task.teacher.prepare(batch["input"]))[:, 1:]
        target = tokens.mT.unflatten(-1, (3, 3))
        mine = F.interpolate(task.model.projection(encoder.encode(batch["input"]).embedding), (3, 3), mode="bilinear")
    torch.testing.assert_close(result["loss"].detach(), F.mse_loss(mine, target), rtol=1e-4, atol=1e-6)
    result["loss"].backward()
    trained = [name for name, p in task.model.named_parameters() if p.requires_grad]
    assert all((p.grad is not None) == p.requires_grad for p in task.model.parameters())
    assert any(name.startswith("encoder.backbone.stages.2") for name in trained) and "projection.weight" in trained
    assert not [name for name in trained if "decoder" in name or "prompt_encoder" in name]
    assert task.product(task.model) is encoder and not any(p.requires_grad for p in vit.parameters())


def test_backbones_and_their_last_map(photos):
    torch.manual_seed(0)
    for name, args, shape in (
        ("vit_tiny_patch16_224", VIT | {"img_size": 32}, (1, 24, 2, 2)),
        ("rwkvsam_small", dict(dims=(8, 16, 32), depths=(1, 1, 2), num_classes=0), (1, 32, 2, 2)),
        ("resnet18", {}, (1, 512, 1, 1)),
        ("rwkvsam_small_prompt", STUDENT, (1, 32, 2, 2)),
    ):
        assert map_of(linescan.engine.cards.build(name, **args).eval(), torch.zeros(1, 3, 32, 32)).shape == shape
    with pytest.raises(InputError, match="Linear gives no maps"):
        map_of(torch.nn.Linear(1, 1), torch.zeros(1))


def test_files_of_features(photos, features, tmp_path):
    files = FeatureFiles(features, photos)
    assert files.read(str(photos / "circle" / "0.png")).shape == (3, 2, 2)
    with pytest.raises(InputError, match="circle/99.npz is missing"):
        files.read(str(photos / "circle" / "99.png"))
    held_out = FeatureFiles(features / "circle", tmp_path, photos / "circle")  # --val in another folder than --data
    assert held_out.read(str(photos / "circle" / "1.png")).shape == (3, 2, 2)
    files = FeatureFiles(tmp_path, photos)
    (tmp_path / "circle").mkdir()
    good, path = np.zeros((3, 2, 2)), tmp_path / "circle" / "0.npz"
    for arrays, said in (
        ({"a": good, "b": good}, "holds no array"), ({"a": good[0]}, "holds no array"), ({"a": good + np.nan}, "NaN"),
        ({"a": np.array([{}])}, "cannot be read"),
    ):  # fmt: skip
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=said):
            files.read(str(photos / "circle" / "0.png"))
    path.write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="cannot be read"):
        files.read(str(photos / "circle" / "0.png"))
    np.savez(path, features=good, other=good)
    assert files.read(str(photos / "circle" / "0.png")).shape == (3, 2, 2)


def test_training_from_files_learns(photos, features, tmp_path, one_thread):
    recipe = EncoderDistillationRecipe(
        str(photos), model="rwkvsam_small_prompt", model_args=STUDENT, features=str(features), steps=24, batch=4,
        lr=3e-3, bf16=True, evaluate_every=12,
    )  # fmt: skip
    scores = train(recipe, tmp_path / "run", device="cpu", workers=0, log_every=1)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if row.get("loss") is not None]
    assert losses[-1] < 0.5 * losses[0] and scores["cosine"] > 0.8
    model, card = restore(checkpoint=tmp_path / "run" / "best.safetensors")
    assert card.model == "rwkvsam_small_prompt" and hasattr(model, "decode")


def test_a_backbone_of_timm_is_trained_without_its_classifier(photos, teacher, tmp_path):
    recipe = EncoderDistillationRecipe(
        str(photos), model="vit_tiny_patch16_224", model_args={**VIT, "num_classes": 0}, teacher_checkpoint=teacher,
        steps=2, batch=2,
    )  # fmt: skip
    scores = train(recipe, tmp_path / "run", device="cpu", workers=0)
    assert scores["mse"] > 0 and -1 <= scores["cosine"] <= 1
    assert restore(checkpoint=tmp_path / "run" / "model.safetensors")[1].args["num_classes"] == 0


@pytest.mark.parametrize(
    "options, said",
    [
        ((), "needs --teacher"),
        (("--features", "f", "--teacher", "resnet18"), "needs --teacher"),
        (("--features", "nowhere"), "nowhere is not a folder"),
        (("--features", "."), "has no features"),
        (("--features", ".", "--data", "digits"), "which the digits are not"),
    ],
)
def test_what_is_refused(options, said, photos, tmp_path, linescan_here):
    model = ("--model", "vit_tiny_patch16_224", "--model-arg", "depth=1")
    args = ("train", "--task", "distill-encoder", "--data", photos, "--out", tmp_path / "run", *model)
    status, _, error = linescan_here(*args, *options)
    assert status == 2 and said in error and error.count("\n") == 1
