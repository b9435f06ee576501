"""Masked pre-training: masks, targets, losses, and that its result is what fine-tuning starts from."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from linescan.backbones.vision_rwkv import VisionRWKV
from linescan.engine.cards import ModelCard, build, read_card, save_model
from linescan.engine.data import training_batches
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.recipe import Run
from linescan.engine.training import Training
from linescan.errors import InputError
from linescan.heads.mae import MaskedAutoencoder, patches_of
from linescan.layers.pos_embed import sinusoid_2d
from linescan.media.preprocess import Preprocess
from linescan.tasks.classify import ClassificationTask
from linescan.tasks.pretrain import TokenTeacher, draw_mask
from linescan.tasks.recipes import ClassificationRecipe, PretrainingRecipe

from ..runs import contents, finish, kill_and_resume, same, write_clips

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
RWKV = dict(model="vrwkv_tiny", model_args=dict(img_size=16, patch_size=4, depth=2, embed_dim=32),
            decoder_dim=16, decoder_depth=1)  # fmt: skip
VIDEO = dict(
    model="videomamba_video_tiny_patch16_224",
    model_args=dict(img_size=32, patch_size=8, depth=3, embed_dim=32, num_frames=4, d_state=4),
)
TEACHER = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=16)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "clips", each=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small CLIP-like tower: a pre-norm, quick GELU, and a head without bias that projects tokens."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    name = "vit_base_patch16_clip_quickgelu_224"
    torch.manual_seed(0)
    card = ModelCard(name, TEACHER, [str(i) for i in range(16)], Preprocess((3, 32, 32), (0.48,) * 3, (0.26,) * 3))
    save_model(path, build(name, **TEACHER), card)
    return path


def start(out, data, **recipe) -> tuple[Training, object]:
    training = Training(PretrainingRecipe(str(data), **{"epochs": 2, "batch": 8, "warmup": 0.0, **recipe}), out, ALONE)
    return training, iter(training_batches(training.task.data, training.steps, 0, 0, training.last))


# -- masks ------------------------------------------------------------------------------------------------------------

shapes = st.tuples(*(st.integers(1, n) for n in (3, 4, 6, 7)))


@given(shapes, st.floats(0.05, 0.95), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_masks_hide_what_their_names_say(shape, ratio, seed):
    torch.manual_seed(seed)
    batch, frames, height, width = shape
    noise, importance = torch.rand(shape), torch.rand(batch, frames, height * width).softmax(-1)

    def mask(kind):
        made = draw_mask(noise, kind, ratio, importance)
        assert made.dtype == torch.bool and made.shape == (batch, frames * height * width)
        assert torch.equal(made, draw_mask(noise, kind, ratio, importance))  # a function of the noise
        return made.view(batch, frames, height, width)

    assert (mask("random").flatten(1).sum(1) == int(ratio * frames * height * width)).all()
    for kind in ("tube", "attention"):
        assert (mask(kind).flatten(2).sum(2) == int(ratio * height * width)).all()
    assert torch.equal(mask("tube"), mask("tube")[:, :1].expand(shape))
    for kind in ("row", "frame-row"):
        rows = mask(kind).float().mean(3)
        assert ((rows == 0) | (rows == 1)).all() and (rows.sum((1, 2)) == frames * int(ratio * height)).all()
    assert (mask("frame-row")[..., 0].sum(2) == int(ratio * height)).all()


def test_attention_draws_the_visible_in_proportion():
    """One of four patches is kept: as often as its importance says; of two without replacement never the same twice."""
    importance = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(4000, 1, 4)
    torch.manual_seed(0)
    visible = ~draw_mask(torch.rand(4000, 1, 2, 2), "attention", 0.75, importance)
    torch.testing.assert_close(visible.float().mean(0), importance[0, 0], atol=0.03, rtol=0)
    pairs = ~draw_mask(torch.rand(4000, 1, 2, 2), "attention", 0.5, importance)
    assert (pairs.sum(1) == 2).all() and (pairs.float().mean(0).diff() > 0).all()


# -- Vision-RWKV ------------------------------------------------------------------------------------------------------


def autoencoder(grid=(4, 4), channels=1, **options) -> MaskedAutoencoder:
    common = dict(img_size=(4 * grid[0], 4 * grid[1]), patch_size=4, in_chans=channels, num_classes=0, **options)
    torch.manual_seed(0)
    return MaskedAutoencoder(VisionRWKV(embed_dim=32, depth=2, **common), VisionRWKV(embed_dim=16, depth=1, **common))


def test_patches_are_row_major_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patches_of(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4].view(2, 2, 3), images[1, :, 2:4, 2:4].permute(1, 2, 0))
    with pytest.raises(ValueError, match="4x6 pixels do not fall into patches of 4x4"):
        patches_of(images, 4)


def test_positions_start_as_sinusoids():
    table = sinusoid_2d((3, 5), 16)[0]
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(table[2, 3, :4], (3 * frequencies).sin())  # the column, sines
    torch.testing.assert_close(table[2, 3, 12:], (2 * frequencies).cos())  # the row, cosines
    assert torch.equal(autoencoder((3, 5)).encoder.pos_embed, sinusoid_2d((3, 5), 32))


@pytest.mark.parametrize("version", [4, 6])
def test_hidden_patches_are_not_seen(version):
    """Pixels of a hidden patch change nothing; those of a visible one do; the order of the draw is the sequence."""
    options = dict(version=6) if version == 6 else {}
    if version == 6:
        torch.manual_seed(0)
        common = dict(img_size=16, patch_size=4, in_chans=1, num_classes=0, version=6, depth=1, embed_dim=64)
        model = MaskedAutoencoder(VisionRWKV(**common), VisionRWKV(**common))
    else:
        model = autoencoder(**options)
    model.eval()
    images, order = torch.randn(2, 1, 16, 16), torch.rand(2, 16).argsort(1)
    restored = model(images, order, 4)
    assert restored.shape == (2, 16, 16)
    changed = images.clone()
    hidden, seen = int(order[0, 9]), int(order[0, 1])
    changed[0, 0, 4 * (hidden // 4) : 4 * (hidden // 4) + 4, 4 * (hidden % 4) : 4 * (hidden % 4) + 4] += 1
    torch.testing.assert_close(model(changed, order, 4), restored)
    changed[0, 0, 4 * (seen // 4) : 4 * (seen // 4) + 4, 4 * (seen % 4) : 4 * (seen % 4) + 4] += 1
    assert not torch.allclose(model(changed, order, 4)[0], restored[0])
    again = torch.cat([order[:, :4].flip(1), order[:, 4:]], 1)
    assert not torch.allclose(model(images, again, 4), restored)
    shuffled = torch.cat([order[:, :4], order[:, 4:].flip(1)], 1)
    torch.testing.assert_close(model(images, shuffled, 4), restored)


def test_every_parameter_of_the_autoencoder_is_trained():
    model = autoencoder()
    order = torch.rand(2, 16).argsort(1)
    model(torch.randn(2, 1, 16, 16), order, 4).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="without class token"):
        autoencoder(class_token=True)


def test_the_loss_is_of_hidden_pixels(tmp_path):
    training, batches = start(tmp_path, "digits", **RWKV)
    batch = next(batches).content
    result = training.task(training.model, batch)
    order, target = batch["noise"].argsort(1), patches_of(batch["input"], 4)
    hidden = torch.ones(8, 16, dtype=torch.bool).scatter(1, order[:, :4], False)
    error = (result["output"] - target).square().mean(-1)
    torch.testing.assert_close(result["loss"], error[hidden].mean())
    normed, _ = start(tmp_path / "normed", "digits", **RWKV, norm_pixels=True)
    normed.bare.load_state_dict(training.bare.state_dict())
    deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (result["output"] - (target - target.mean(-1, keepdim=True)) / deviation).square().mean(-1)
    torch.testing.assert_close(normed.task(normed.model, batch)["loss"], error[hidden].mean())


def test_images_train_evaluate_and_fine_tune(tmp_path):
    recipe = PretrainingRecipe("digits", **RWKV, epochs=3, batch=64, lr=3e-3, warmup=1, evaluate_every=1)
    scores = Training(recipe, tmp_path / "mae", ALONE, Run(log_every=5)).run()
    losses = [row["val_loss"] for row in read_metrics(tmp_path / "mae" / "metrics.csv") if "val_loss" in row]
    assert losses[-1] < 0.85 * losses[0] and scores == {"loss": losses[-1]}
    card = read_card(tmp_path / "mae" / "best.safetensors")
    assert card.model == "vrwkv_tiny" and card.args["num_classes"] == 0 and card.classes == []

    tuned = ClassificationRecipe("digits", checkpoint=str(tmp_path / "mae" / "model.safetensors"), epochs=1)
    task = ClassificationTask(ClassificationTask.resolve(tuned))
    task.load_weights()
    weights = load_file(tmp_path / "mae" / "model.safetensors")
    own = task.model.state_dict()
    assert set(own) - set(weights) == {"head.weight", "head.bias"} and own["head.weight"].shape == (10, 32)
    assert all(torch.equal(own[name], value) for name, value in weights.items())
    more, _ = start(tmp_path / "more", "digits", **RWKV, checkpoint=str(tmp_path / "mae" / "model.safetensors"))
    encoder = more.bare.encoder.state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in weights.items()), "pre-training goes on"


# -- VideoMamba -------------------------------------------------------------------------------------------------------


def test_a_teachers_tokens_and_attention(teacher):
    """Against the model itself: tokens before its last norm, its head, and the softmax of its last block."""
    student = Preprocess((3, 32, 32), (0.48,) * 3, (0.26,) * 3)
    wrapped = TokenTeacher(None, teacher, {}, student, layers=2, interval=1, project=True, attends=True)
    clips = torch.randn(2, 3, 4, 32, 32)
    targets, attention = wrapped(clips)
    vit = timm.create_model("vit_base_patch16_clip_quickgelu_224", **TEACHER).eval()
    vit.load_state_dict(load_file(teacher))
    with torch.no_grad():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(clips.transpose(1, 2).flatten(0, 1))))
        first = vit.blocks[0](x)
        attn, y = vit.blocks[1].attn, vit.blocks[1].norm1(first)
        q, k, _ = attn.qkv(y).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 12**-0.5).softmax(-1).mean(1)[:, 0, 1:]
        last = vit.blocks[1](first)
    assert targets.shape == (2, 2, 1 + 4 * 16, 16)
    torch.testing.assert_close(attention, weights.view(2, 4, 16), rtol=1e-4, atol=1e-5)
    for layer, tokens in zip(targets, (first, last)):
        patches = F.normalize(vit.head(tokens[:, 1:]), dim=-1).view(2, 64, 16)
        torch.testing.assert_close(layer[:, 1:], patches, rtol=1e-4, atol=1e-5)
        classes = F.normalize(vit.head(tokens[:, 0].view(2, 4, -1).mean(1)), dim=-1)
        torch.testing.assert_close(layer[:, 0], classes, rtol=1e-4, atol=1e-5)
    middle, _ = wrapped(clips, step=2)  # of two frames per token, the second
    whole, _ = wrapped(clips[:, :, 1::2])
    torch.testing.assert_close(middle, whole)


def test_a_teacher_of_linescan_without_class_token(tmp_path):
    args = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_classes=4)
    card = ModelCard("vrwkv_tiny", args, list("abcd"), Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    save_model(tmp_path / "t.safetensors", build("vrwkv_tiny", **args), card)
    student = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    targets, attention = TokenTeacher(None, tmp_path / "t.safetensors", {}, student)(torch.randn(1, 3, 2, 32, 32))
    assert targets.shape == (1, 1, 33, 24) and attention is None
    with pytest.raises(InputError, match="--mask attention needs a teacher with attention"):
        TokenTeacher(None, tmp_path / "t.safetensors", {}, student, attends=True)
    with pytest.raises(InputError, match="has 2 blocks of tokens; 3 of them, 1 apart"):
        TokenTeacher(None, tmp_path / "t.safetensors", {}, student, layers=3)


def test_the_loss_against_a_teacher(tmp_path, clips, teacher):
    """2 - 2 cos over the visible tokens; the last block is left out, as published, unless asked for."""
    training, batches = start(tmp_path, clips, **VIDEO, teacher_checkpoint=str(teacher), mask="tube", mask_ratio=0.5)
    batch = next(batches).content
    assert batch["noise"].shape == (8, 4, 4, 4)
    result = training.task(training.model.eval(), batch)
    mask = F.pad(draw_mask(batch["noise"], "tube", 0.5), (1, 0))
    student = training.bare.student
    decoded, _ = student.forward_decoded(batch["input"], mask)
    targets, _ = training.task.teacher(batch["input"])
    visible = targets[:, ~mask].view(1, 8, 1 + 4 * 8, 24)
    torch.testing.assert_close(result["loss"], (2 - 2 * (decoded * visible).sum(-1)).mean())

    before = {k: v.clone() for k, v in student.state_dict().items()}
    training.take_step(batches)
    training.take_step(batches)
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("blocks.1.") for k in moved) and not any(
        k.startswith(("blocks.2.", "norm.")) for k in moved
    )
    whole, _ = start(tmp_path / "whole", clips, **VIDEO, teacher_checkpoint=str(teacher), include_last=True)
    assert all(p.requires_grad for p in whole.bare.student.blocks.parameters())


def test_what_wants_a_gradient_gets_one(tmp_path, clips, teacher):
    """Or training in several processes would wait for it."""
    for i, options in enumerate((dict(), dict(layers=2), dict(include_last=True))):
        training, batches = start(tmp_path / str(i), clips, **VIDEO, teacher_checkpoint=str(teacher), **options)
        training.task(training.model, next(batches).content)["loss"].backward()
        for name, p in training.bare.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name


def test_evaluation_is_always_the_same(tmp_path, clips, teacher):
    training, _ = start(tmp_path, clips, **VIDEO, teacher_checkpoint=str(teacher))
    assert training.evaluate() == training.evaluate()


def test_clips_train_and_fine_tune(tmp_path, clips, teacher):
    recipe = PretrainingRecipe(
        str(clips), **VIDEO, teacher_checkpoint=str(teacher), project=True, epochs=12, batch=8, lr=5e-3, warmup=1,
        evaluate_every=12, ema=0.5,
    )  # fmt: skip
    training = Training(recipe, tmp_path / "run", ALONE, Run(workers=0, log_every=1))
    training.run()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not any("decoder" in name or name.startswith("head") for name in weights)
    student = training.ema.module.student.state_dict()
    assert all(torch.equal(student[name], value) for name, value in weights.items())
    for checkpoint in ("model.safetensors", "state.pt"):
        tuned = ClassificationRecipe(str(clips), checkpoint=str(tmp_path / "run" / checkpoint), epochs=1)
        task = ClassificationTask(ClassificationTask.resolve(tuned))
        task.load_weights()
        own = task.model.state_dict()
        assert own["head.weight"].shape == (4, 32) and task.model.num_frames == 4
        assert all(torch.equal(own[name], value) for name, value in weights.items())


def test_what_cannot_be_pre_trained(tmp_path, clips, teacher):
    with pytest.raises(InputError, match="vim_tiny_patch16_224 cannot be pre-trained"):
        start(tmp_path, "digits", model="vim_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=1))
    with pytest.raises(InputError, match="needs --teacher"):
        start(tmp_path, clips, **VIDEO)
    with pytest.raises(InputError, match="it has no --teacher and no --mask"):
        start(tmp_path, "digits", **RWKV, mask="tube")
    with pytest.raises(InputError, match="--mask-ratio 0.99 leaves 0 of 16 patches visible"):
        start(tmp_path, "digits", **RWKV, mask_ratio=0.99)
    args = {**VIDEO["model_args"], "patch_size": 16}
    with pytest.raises(InputError, match="16 tokens per frame, the student 2x2; another --teacher-arg img_size=N"):
        start(tmp_path, clips, model=VIDEO["model"], model_args=args, teacher_checkpoint=str(teacher))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "clips"])
def test_killed_and_resumed(tmp_path, clips, teacher, kind):
    common = (
        "train", "--task", "pretrain", "-e", 3, "--warmup", 1, "--ema", 0.9, "--drop-path", 0.2, "--save-every", 1,
        "--log-every", 1, "--device", "cpu", "--clip-grad", 1,
    )  # fmt: skip
    model = RWKV if kind == "images" else VIDEO
    names = ("-m", model["model"], *(f"--model-arg={k}={v}" for k, v in model["model_args"].items()))
    if kind == "images":
        args = (
            *common,
            *names,
            "-d",
            "digits",
            "-b",
            180,
            "--decoder-dim",
            16,
            "--decoder-depth",
            1,
            "--accumulate",
            2,
        )
    else:
        args = (*common, *names, "-d", clips, "-b", 4, "--teacher-checkpoint", teacher, "--workers", 1)
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=1, rows=8)
    assert same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))
