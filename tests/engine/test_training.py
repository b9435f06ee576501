"""The loop: what a step does, and that stopping and resuming changes nothing."""

import json
from dataclasses import replace

import pytest
import torch

from linescan.checkpoint import CheckpointError
from linescan.engine.cards import read_card, restore
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.training import Recipe, Training
from linescan.errors import Diverged, InputError

ALONE = Processes(0, 1, torch.device("cpu"))
VIT = dict(model="vit_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2))
VIM = dict(model="vim_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=2, embed_dim=16, d_state=4))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(out, **recipe) -> tuple[Training, object]:
    from linescan.engine.data import training_batches

    training = Training(Recipe(**{"data": "digits", **VIT, "epochs": 2, **recipe}), out, ALONE)
    return training, iter(training_batches(training.samples, training.steps, 0, 0, training.last))


def test_accumulation_is_a_larger_batch(tmp_path):
    moments = []
    for batch, accumulate in ((32, 1), (8, 4)):
        training, batches = start(tmp_path, batch=batch, accumulate=accumulate, warmup=0)
        training.take_step(batches)
        moments.append([training.optimizer.state[p]["exp_avg"] for p in training.bare.parameters()])
        assert training.steps.per_step == 32
    for whole, parts in zip(*moments):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
        assert whole.abs().max() > 0


def test_the_average_is_what_timm_says_and_what_is_judged(tmp_path):
    training, batches = start(tmp_path, ema=0.9, lr=1e-2, warmup=0)
    name = "head.weight"
    expected = training.bare.state_dict()[name].clone()
    for step in range(1, 6):
        training.take_step(batches)
        decay = training.ema.get_decay(step)
        expected = decay * expected + (1 - decay) * training.bare.state_dict()[name]
    torch.testing.assert_close(training.ema.module.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, training.bare.state_dict()[name])
    assert training.weights is training.ema.module


def test_the_learning_rate_rises_and_falls(tmp_path):
    training, batches = start(tmp_path, epochs=4, warmup=1, lr=1e-3, min_lr=1e-4, batch=360)
    rates = []
    for _ in range(training.last):
        training.take_step(batches)
        rates.append(training.lr)
    assert rates[0] == 0 and training.steps.per_epoch == 4
    assert max(rates) == pytest.approx(rates[4]) and rates[4] == pytest.approx(1e-3, rel=0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 1e-4 <= rates[-1] < 2e-4


def test_biases_and_norms_are_not_decayed(tmp_path):
    training, _ = start(tmp_path)
    decayed = {id(p) for g in training.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in training.bare.named_parameters():
        if parameter.ndim == 1 or name in ("pos_embed", "cls_token"):
            assert id(parameter) not in decayed, name
    assert decayed


def same(a, b) -> bool:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read(out) -> dict:
    return {k: v for k, v in torch.load(out / "state.pt", weights_only=True).items() if k != "seconds"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("model", [VIT, VIM], ids=["vit", "vim"])
def test_resuming_takes_the_same_steps(tmp_path, model):
    """Stopped again and again between two saved states, with everything random switched on."""
    recipe = Recipe(
        "digits", epochs=2, batch=60, accumulate=2, mixup=0.8, cutmix=1.0, erasing=0.5, ema=0.9, drop_path=0.2,
        clip_grad=1.0, **model,
    )  # fmt: skip
    Training(recipe, tmp_path / "whole", ALONE, save_every=5, log_every=2).run()

    for stop in (3, 4, 6, 1):
        training = Training(recipe, tmp_path / "parts", ALONE, resume=True, save_every=5, log_every=2)
        step, left = training.take_step, [stop]

        def stumble(batches):
            if not left[0]:
                raise Stop
            left[0] -= 1
            step(batches)

        training.take_step = stumble
        with pytest.raises(Stop):
            training.run()
    Training(recipe, tmp_path / "parts", ALONE, resume=True, save_every=5, log_every=2).run()

    assert same(read(tmp_path / "whole"), read(tmp_path / "parts"))
    for name in ("model.safetensors", "best.safetensors", "recipe.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    whole, parts = (read_metrics(tmp_path / out / "metrics.csv") for out in ("whole", "parts"))
    for row in whole + parts:
        del row["seconds"]
    assert whole == parts and len(whole) == 14


def test_a_finished_run_resumes_to_its_scores(trained):
    recipe = Recipe(**json.loads((trained / "recipe.json").read_text()))
    before = (trained / "metrics.csv").read_text()
    scores = Training(recipe, trained, ALONE, resume=True).run()
    assert scores.top1 == pytest.approx(read_card(trained / "model.safetensors").trained["val_top1"])
    assert (trained / "metrics.csv").read_text() == before


def test_a_run_is_not_overwritten_or_resumed_as_another(trained):
    recipe = Recipe(**json.loads((trained / "recipe.json").read_text()))
    with pytest.raises(InputError, match="already holds a run"):
        Training(recipe, trained, ALONE)
    with pytest.raises(InputError, match="lr=0.003, not 0.1"):
        Training(replace(recipe, lr=0.1), trained, ALONE, resume=True)
    with pytest.raises(InputError, match="processes=1, not 2"):
        Training(recipe, trained, Processes(0, 2, torch.device("cpu")), resume=True)


def test_a_damaged_state_is_refused(tmp_path, trained):
    recipe = Recipe(**json.loads((trained / "recipe.json").read_text()))
    whole = (trained / "state.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"nonsense" * 10):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            Training(recipe, tmp_path, ALONE, resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_good_state(tmp_path):
    recipe = Recipe("digits", **VIT, epochs=2, batch=360, lr=1e-3, warmup=0)
    training = Training(recipe, tmp_path, ALONE, log_every=100)
    step = training.take_step

    def poison(batches):
        if training.step == 6:
            with torch.no_grad():
                training.bare.head.weight.fill_(float("nan"))
        step(batches)

    training.take_step = poison
    with pytest.raises(Diverged, match="the loss is nan after step 8"):
        training.run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 4
    assert all(v.isfinite().all() for v in state["model"].values())


def test_broken_pictures_are_left_out_and_named(pictures, tmp_path, capsys):
    (pictures / "circle" / "3.png").write_bytes(b"broken")
    (pictures / "square" / "5.png").write_bytes(b"")
    training = Training(
        Recipe(str(pictures), **VIT, epochs=1, batch=8, augment="standard", holdout=0.5), tmp_path / "run", ALONE
    )
    scores = training.run()
    assert scores.images + len(scores.broken) == 12
    said = capsys.readouterr().err
    assert said.count("circle/3.png: not an image") == said.count("square/5.png: not an image") == 1


def test_fine_tuning_keeps_the_features_and_not_the_classifier(tmp_path, trained, pictures):
    recipe = Recipe(str(pictures), **VIT, epochs=1, checkpoint=str(trained / "model.safetensors"))
    recipe = replace(recipe, model_args={**recipe.model_args, "in_chans": 1}, augment="light")
    training = Training(recipe, tmp_path / "run", ALONE)
    before, _ = restore(checkpoint=trained / "model.safetensors")
    assert torch.equal(training.bare.patch_embed.proj.weight, before.patch_embed.proj.weight)
    assert training.bare.head.weight.shape == (3, 24)


def test_half_precision_and_checkpointing_compute_nearly_the_same(tmp_path):
    losses = []
    for options in ({}, {"bf16": True}, {"grad_checkpointing": True}):
        training, batches = start(tmp_path, **options)
        training.take_step(batches)
        losses.append(training.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(epochs=0), "epochs must be more than 0"),
        (dict(ema=1.0), "ema must be at least 0 and less than 1"),
        (dict(batch=7, mixup=0.5), "the batch must be even"),
        (dict(warmup=-1), "warmup must not be negative"),
    ],
)
def test_recipes_that_make_no_sense(wrong, said):
    with pytest.raises(InputError, match=said):
        Recipe("digits", **wrong)


def test_the_number_of_classes_must_be_that_of_the_data(tmp_path):
    with pytest.raises(InputError, match="num_classes=7, but the data have 10 classes"):
        start(tmp_path, model_args={**VIT["model_args"], "num_classes": 7})


def test_models_of_videos_are_refused(tmp_path):
    with pytest.raises(InputError, match="videomamba_video_tiny_patch16_224 reads videos; training takes models of"):
        start(tmp_path, model="videomamba_video_tiny_patch16_224", model_args={"depth": 1})
