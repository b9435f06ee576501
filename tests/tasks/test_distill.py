"""Distillation: what is matched, that the teacher stays as it is, and whole runs."""

import json

import pytest
import timm
import torch
from torch.nn import functional as F

from linescan.engine.cards import ModelCard, build, read_card, restore, save_model
from linescan.engine.data import training_batches
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.recipe import Run
from linescan.engine.training import Training
from linescan.errors import InputError
from linescan.media.preprocess import Preprocess
from linescan.tasks.recipes import DistillationRecipe, read_recipe
from linescan.tasks.teacher import Teacher

from ..runs import contents, finish, kill_and_resume, same, state_of, train_as_two

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
VIM = dict(model="vim_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=1, embed_dim=32, d_state=4))
VIT = dict(model="vit_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2))


def start(out, teacher, **recipe) -> tuple[Training, object]:
    recipe = DistillationRecipe(
        "digits",
        **{**VIM, "teacher_checkpoint": str(teacher / "model.safetensors"), "epochs": 1, "batch": 32, **recipe},
    )
    training = Training(recipe, out, ALONE)
    return training, iter(training_batches(training.task.data, training.steps, 0, 0, training.last))


def losses(training, batches) -> tuple[dict, dict, torch.Tensor]:
    batch = next(batches).content
    training.model.train()
    teacher = training.task.teacher
    return training.task(training.model, batch), batch, teacher.model(teacher.prepare(batch["input"]))


def test_soft(tmp_path, trained):
    training, batches = start(tmp_path, trained, temperature=2.0, label_weight=0.5, match_weight=3.0, smoothing=0.0)
    result, batch, theirs = losses(training, batches)
    mine = result["output"]
    p = (theirs / 2).softmax(-1)
    expected = 4 * (p * (p.log() - (mine / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(result["match_loss"], expected)
    torch.testing.assert_close(result["label_loss"], F.cross_entropy(mine, batch["label"]))
    torch.testing.assert_close(result["loss"], 0.5 * result["label_loss"] + 3 * expected)


def test_hard(tmp_path, trained):
    training, batches = start(tmp_path, trained, match="hard")
    result, _, theirs = losses(training, batches)
    torch.testing.assert_close(result["match_loss"], F.cross_entropy(result["output"], theirs.argmax(1)))


def test_features_through_a_projection_that_is_trained(tmp_path, trained):
    training, batches = start(tmp_path, trained, match="features", layer_decay=0.5, warmup=0)
    student = training.bare
    assert student.projection.weight.shape == (24, 32)
    result, batch, _ = losses(training, batches)
    with torch.no_grad():
        teacher = training.task.teacher.model
        tokens = teacher.forward_features(training.task.teacher.prepare(batch["input"]))
        theirs = teacher.forward_head(tokens, pre_logits=True)
        classifier = student.classifier
        mine = student.projection(classifier.forward_head(classifier.forward_features(batch["input"]), pre_logits=True))
    torch.testing.assert_close(result["match_loss"].detach(), F.mse_loss(mine, theirs), rtol=1e-4, atol=1e-5)
    before = student.projection.weight.clone()
    training.take_step(batches)
    assert not torch.equal(student.projection.weight, before)
    rates = {id(p): g["lr"] for g in training.optimizer.param_groups for p in g["params"]}
    assert rates[id(student.projection.weight)] == training.recipe.lr > rates[id(student.classifier.pos_embed)]
    same_width, _ = start(tmp_path / "other", trained, match="features", **VIT)
    assert isinstance(same_width.bare.projection, torch.nn.Identity)


def test_tokens_as_videomamba_distils_itself(tmp_path, trained):
    """2 - 2 cos over all tokens of two VideoMambas, the student's through a norm and a linear map."""
    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=16, d_state=4, num_classes=10, in_chans=1)
    card = ModelCard("videomamba_tiny_patch16_224", args, list("0123456789"), Preprocess((1, 16, 16), (0.5,), (0.5,)))
    save_model(tmp_path / "model.safetensors", build(card.model, **args), card)
    own = {k: v for k, v in args.items() if k not in ("num_classes", "in_chans")} | {"embed_dim": 24}
    training, batches = start(tmp_path, tmp_path, match="tokens", model=card.model, model_args=own)
    result, batch, _ = losses(training, batches)
    teacher, student = training.task.teacher, training.bare
    mine = student.projection(student.classifier.forward_features(batch["input"]))
    theirs = teacher.model.forward_features(teacher.prepare(batch["input"]))
    assert mine.shape == theirs.shape == (32, 5, 16)
    torch.testing.assert_close(result["match_loss"], (2 - 2 * F.cosine_similarity(mine, theirs, dim=-1)).mean())
    assert type(student.projection[0]) is type(student.classifier.norm)


def test_the_teacher_sees_its_own_normalisation_and_size(tmp_path):
    args = dict(img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    card = ModelCard(
        "vit_tiny_patch16_224", args, ["a", "b", "c"], Preprocess((3, 32, 32), (0.1, 0.2, 0.3), (0.5,) * 3)
    )
    save_model(tmp_path / "teacher.safetensors", build(card.model, **args), card)
    student = Preprocess((3, 16, 16), (0.4, 0.5, 0.6), (0.25,) * 3)
    teacher = Teacher(None, tmp_path / "teacher.safetensors", {}, student)
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(x, p):
        return (x - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]

    expected = F.interpolate(normalised(pixels, card.preprocess), (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher.prepare(normalised(pixels, student)), expected, rtol=1e-4, atol=1e-4)
    clip = normalised(pixels, student)[:, :, None].expand(-1, -1, 5, -1, -1)
    prepared = teacher.prepare(clip)
    assert prepared.shape == (2, 3, 5, 32, 32)
    torch.testing.assert_close(prepared[:, :, 3], expected, rtol=1e-4, atol=1e-4)
    assert not teacher.train().model.training and not any(p.requires_grad for p in teacher.parameters())
    grey = Preprocess((1, 16, 16), (0.5,), (0.5,))
    with pytest.raises(InputError, match="reads 3 channels, the student 1"):
        Teacher(None, tmp_path / "teacher.safetensors", {}, grey)


def test_classes_in_another_order_are_matched_by_name(tmp_path, trained):
    model, card = restore(checkpoint=trained / "model.safetensors")
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[order])
        model.head.bias.copy_(model.head.bias[order])
    shuffled = ModelCard(card.model, card.args, [card.classes[i] for i in order], card.preprocess)
    (tmp_path / "teacher").mkdir()
    save_model(tmp_path / "teacher" / "model.safetensors", model, shuffled)
    one, batches = start(tmp_path / "one", trained)
    other, _ = start(tmp_path / "other", tmp_path / "teacher")
    x = next(batches).content["input"]
    torch.testing.assert_close(one.task.target(x), other.task.target(x))


def test_teachers_that_do_not_fit(tmp_path, trained):
    with pytest.raises(InputError, match="needs --teacher"):
        DistillationRecipe("digits", **VIM)
    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2, num_classes=3, in_chans=1)
    card = ModelCard("vit_tiny_patch16_224", args, ["a", "b", "c"], Preprocess((1, 16, 16), (0.5,), (0.5,)))
    save_model(tmp_path / "model.safetensors", build(card.model, **args), card)
    with pytest.raises(InputError, match="the teacher has 3 classes, the data have 10; --match features"):
        start(tmp_path / "run", tmp_path)
    start(tmp_path / "run", tmp_path, match="features")
    with pytest.raises(
        InputError, match=r"--match tokens: the student's are \(1, 17, 24\), the teacher's \(1, 5, 24\)"
    ):
        start(tmp_path / "run", trained, match="tokens", model_args={**VIM["model_args"], "patch_size": 4})
    with pytest.raises(InputError, match="unknown model 'resnet_of_mine'"):
        Training(DistillationRecipe("digits", **VIM, teacher="resnet_of_mine"), tmp_path / "run", ALONE)


def test_the_teacher_is_not_trained_and_not_in_the_file(tmp_path, trained):
    training, batches = start(tmp_path, trained, lr=1e-2, warmup=0, ema=0.5)
    before = {k: v.clone() for k, v in training.task.teacher.model.state_dict().items()}
    for _ in range(3):
        training.take_step(batches)
    assert same(dict(training.task.teacher.model.state_dict()), before)
    training.save()
    state = state_of(tmp_path)
    assert not any("teacher" in k for entry in ("model", "trained", "ema") for k in state[entry])
    model, _ = restore("vim_tiny_patch16_224", tmp_path / "state.pt", **VIM["model_args"], in_chans=1, num_classes=10)
    assert same(dict(model.state_dict()), dict(training.ema.module.classifier.state_dict()))


def test_a_student_of_a_good_teacher_beats_its_labels(tmp_path, trained):
    """Labels count for nothing, and still it learns: what it knows is the teacher's. Then its file is a plain model."""
    recipe = DistillationRecipe(
        "digits", **VIM, teacher_checkpoint=str(trained / "model.safetensors"), label_weight=0.0, epochs=3, batch=32,
        lr=5e-3, warmup=1, evaluate_every=3,
    )  # fmt: skip
    scores = Training(recipe, tmp_path, ALONE).run()
    teacher = read_card(trained / "model.safetensors").trained["val_top1"]
    assert scores["top1"] > 0.6 * teacher
    model, card = restore(checkpoint=tmp_path / "model.safetensors")
    assert card.model == VIM["model"] and type(model) is type(build(VIM["model"], **VIM["model_args"]))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,lr,loss,label_loss,match_loss,val_loss,val_top1,val_top5,seconds"
    row = next(row for row in read_metrics(tmp_path / "metrics.csv") if "loss" in row)
    assert row["loss"] == pytest.approx(row["match_loss"], rel=1e-5)
    finished = Training(read_recipe(tmp_path / "recipe.json"), tmp_path, ALONE, Run(resume=True))
    assert finished.run() == scores


def test_a_teacher_of_timm_by_name(tmp_path, trained, monkeypatch):
    """Its published weights are fetched; here they come from a file that timm is told of."""
    args = dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2, in_chans=1, num_classes=10)
    teacher = timm.create_model("vit_tiny_patch16_224", **args)
    torch.save(teacher.state_dict(), tmp_path / "vit.pth")
    from linescan.engine import cards

    def from_file(name, **given):
        given.pop("pretrained", None)
        model = timm.create_model(name, **given)
        model.load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True))
        return model

    monkeypatch.setattr(cards, "build", from_file)
    made = Teacher("vit_tiny_patch16_224", None, args, Preprocess((1, 16, 16), (0.5,), (0.5,)))
    assert same(dict(made.model.state_dict()), dict(teacher.state_dict()))


RECIPE = (
    "train", "--task", "distill", "-d", "digits", "--match", "features", "-e", 2, "-b", 180, "--accumulate", 2,
    "--mixup", 0.8, "--erasing", 0.5, "--ema", 0.9, "--drop-path", 0.2, "--save-every", 1, "--log-every", 1,
    "--device", "cpu", "-m", VIM["model"], *(f"--model-arg={k}={v}" for k, v in VIM["model_args"].items()),
)  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, trained):
    args = (*RECIPE, "--teacher-checkpoint", trained / "model.safetensors")
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=1, rows=6)
    assert same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, trained):
    """The same samples in the same steps, without anything random per process."""
    args = [
        "train", "--task", "distill", "-d", "digits", "-e", "1", "--log-every", "1", "--device", "cpu",
        "--teacher-checkpoint", str(trained / "model.safetensors"), "-m", VIT["model"],
        *(f"--model-arg={k}={v}" for k, v in VIT["model_args"].items()),
    ]  # fmt: skip
    finish(tmp_path, (*args, "-b", 120), "one")
    train_as_two(tmp_path, *args, "-b", 60, "-o", "two")
    one, two = (read_metrics(tmp_path / out / "metrics.csv") for out in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3), (name, a["step"])
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["task"] == "distill"
