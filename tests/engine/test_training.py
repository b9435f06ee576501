"""The loop: what a step does, and that stopping and resuming changes nothing."""

import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from linescan import zoo
from linescan.checkpoint import CheckpointError, read_state_dict
from linescan.engine import cards
from linescan.engine.cards import read_card, restore
from linescan.engine.data import training_batches
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes, pick_device
from linescan.engine.recipe import Run
from linescan.engine.training import Training
from linescan.errors import Diverged, InputError
from linescan.tasks.recipes import RECIPES, read_recipe
from linescan.tasks.recipes import ClassificationRecipe as Recipe

from ..runs import same, state_of

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
VIT = dict(model="vit_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2))
VIM = dict(model="vim_tiny_patch16_224", model_args=dict(img_size=16, patch_size=8, depth=2, embed_dim=16, d_state=4))
RESUME = Run(resume=True)


def start(out, **recipe) -> tuple[Training, object]:
    training = Training(Recipe(**{"data": "digits", **VIT, "epochs": 2, **recipe}), out, ALONE)
    return training, iter(training_batches(training.task.data, training.steps, 0, 0, training.last))


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


def test_the_average_follows_quickly_at_first_and_is_what_is_scored(tmp_path):
    training, batches = start(tmp_path, ema=0.5, lr=1e-2, warmup=0)
    name = "head.weight"
    expected = training.bare.state_dict()[name].clone()
    for step in range(1, 6):
        training.take_step(batches)
        decay = min(0.5, 1 - step ** (-2 / 3))  # 0, 0.37, and from the third step on 0.5
        expected = decay * expected + (1 - decay) * training.bare.state_dict()[name]
    torch.testing.assert_close(training.ema.module.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, training.bare.state_dict()[name])
    assert training.weights is training.ema.module


def rates(out, **recipe) -> list[float]:
    """The learning rate of every step."""
    training, _ = start(out, batch=360, **recipe)
    found = []
    for step in range(training.last):
        training.scheduler.step_update(step)
        found.append(training.lr)
    return found


def test_the_learning_rate_rises_and_falls(tmp_path):
    found = rates(tmp_path, epochs=4, warmup=1, lr=1e-3, min_lr=1e-4)
    assert found[0] == 0 and len(found) == 16
    assert max(found) == pytest.approx(found[4]) and found[4] == pytest.approx(1e-3, rel=0.2)
    assert found[4:] == sorted(found[4:], reverse=True)
    assert 1e-4 <= found[-1] < 2e-4


def test_other_schedules(tmp_path):
    common = dict(epochs=4, warmup=0, lr=1.0)
    assert set(rates(tmp_path, schedule="constant", **common)) == {1.0}
    assert rates(tmp_path, schedule="step", decay_every=1, decay_rate=0.5, **common) == pytest.approx(
        [1.0] * 4 + [0.5] * 4 + [0.25] * 4 + [0.125] * 4
    )
    assert rates(tmp_path, schedule="multistep", milestones="1, 3", **common) == pytest.approx(
        [1.0] * 4 + [0.1] * 8 + [0.01] * 4
    )
    poly = rates(tmp_path, schedule="poly", decay_rate=0.9, min_lr=0.0, **common)
    assert poly == pytest.approx([(1 - step / 16) ** 0.9 for step in range(16)])
    try:
        assert rates(tmp_path, schedule="wsd", **common)[:12] == [1.0] * 12
    except InputError as error:
        assert "has no --schedule wsd: `pip install -U timm`" in str(error), "an older timm"
    # In a run by steps, durations are steps.
    assert rates(tmp_path, steps=6, schedule="multistep", milestones="2,4", warmup=0, lr=1.0) == pytest.approx(
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )
    assert rates(tmp_path, steps=8, warmup=4, lr=1.0)[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 0.5], abs=1e-5)
    held = rates(tmp_path, steps=12, warmup=2, hold=4, lr=1.0, min_lr=0.0)
    short = rates(tmp_path, steps=8, warmup=2, lr=1.0, min_lr=0.0)
    assert held == pytest.approx([*short[:2], *short[2:3] * 4, *short[2:]])
    waves = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    reference, wanted = torch.optim.lr_scheduler.CosineAnnealingLR(waves, 5, 0.1), []
    for _ in range(14):
        wanted += reference.get_last_lr()
        waves.step()
        reference.step()
    assert rates(tmp_path, steps=14, warmup=0, period=5, lr=1.0, min_lr=0.1) == pytest.approx(wanted), "down and up"
    rising = rates(tmp_path, steps=12, warmup=2, period=5, lr=1.0, min_lr=0.1)
    assert rising[:2] == [0.0, 0.5] and rising[5] == pytest.approx(0.1) and min(rising[2:]) == rising[5]
    with pytest.raises(InputError, match="--period 2 must be longer than --warmup 2"):
        rates(tmp_path, steps=8, warmup=2, period=2)
    with pytest.raises(InputError, match="--hold 6 leaves nothing of 8 for the learning rate to fall in"):
        rates(tmp_path, steps=8, warmup=2, hold=6)


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion", "muon", "lookahead_adamw"])
def test_other_optimisers_take_the_same_steps_when_resumed(tmp_path, name):
    recipe = Recipe(
        "digits", **VIT, steps=4, batch=64, optimizer=name, lr=1e-3, warmup=0, momentum=0.8, evaluate_every=4
    )
    Training(recipe, tmp_path / "whole", ALONE).run()
    for stop in (2, None):
        training = Training(recipe, tmp_path / "parts", ALONE, Run(resume=True, save_every=1))
        interrupted(training, stop)
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_betas_and_unknown_optimisers(tmp_path):
    training, _ = start(tmp_path, betas=(0.9, 0.95))
    assert {group["betas"] for group in training.optimizer.param_groups} == {(0.9, 0.95)}
    with pytest.raises(InputError, match="--optimizer must be one of timm's, such as .*adam.*, not 'adamv'"):
        start(tmp_path, optimizer="adamv")
    with pytest.raises(InputError, match="--optimizer sgd has no --betas"):
        start(tmp_path, optimizer="sgd", betas=(0.9, 0.95))


def test_biases_and_norms_are_not_decayed(tmp_path):
    training, _ = start(tmp_path)
    decayed = {id(p) for g in training.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in training.bare.named_parameters():
        if parameter.ndim == 1 or name in ("pos_embed", "cls_token"):
            assert id(parameter) not in decayed, name
    assert decayed


def test_layers_nearer_to_the_input_learn_slower(tmp_path):
    training, batches = start(tmp_path, layer_decay=0.5, warmup=0)
    training.take_step(batches)
    rate = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
    stem, block, head = (
        rate[id(training.bare.get_parameter(name))]
        for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")
    )
    assert (stem, block, head) == pytest.approx((head / 4, head / 2, training.recipe.lr))


class Stop(Exception):
    pass


def interrupted(training: Training, steps: int | None) -> None:
    """Runs until so many steps are taken; None: to the end."""
    step, left = training.take_step, [steps]

    def stumble(batches):
        if left[0] == 0:
            raise Stop
        left[0] = left[0] and left[0] - 1
        step(batches)

    training.take_step = stumble
    if steps is None:
        training.run()
    else:
        with pytest.raises(Stop):
            training.run()


@pytest.mark.parametrize("model", [VIT, VIM], ids=["vit", "vim"])
def test_resuming_takes_the_same_steps(tmp_path, model):
    """Stopped again and again between two saved states, with everything random switched on."""
    recipe = Recipe(
        "digits", epochs=2, batch=60, accumulate=2, mixup=0.8, cutmix=1.0, erasing=0.5, ema=0.9, drop_path=0.2,
        clip_grad=1.0, repeats=2, **model,
    )  # fmt: skip
    Training(recipe, tmp_path / "whole", ALONE, Run(save_every=5, log_every=2)).run()
    for stop in (3, 4, 6, 1, None):
        run = Run(resume=True, save_every=5, log_every=2)
        interrupted(Training(recipe, tmp_path / "parts", ALONE, run), stop)

    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    for name in ("model.safetensors", "best.safetensors", "recipe.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    whole, parts = (read_metrics(tmp_path / out / "metrics.csv") for out in ("whole", "parts"))
    for row in whole + parts:
        del row["seconds"]
    assert whole == parts and len(whole) == 14


def test_a_run_by_steps(tmp_path):
    """Three steps beyond an epoch, scored every 4 steps and at the end; the same when resumed in the middle."""
    recipe = Recipe("digits", **VIT, steps=11, batch=180, evaluate_every=4, warmup=2)
    Training(recipe, tmp_path / "whole", ALONE, Run(log_every=5)).run()
    rows = read_metrics(tmp_path / "whole" / "metrics.csv")
    assert [row["step"] for row in rows if "val_top1" in row] == [4, 8, 11]
    assert [row["step"] for row in rows if "loss" in row] == [4, 5, 8, 10, 11]
    assert [row["epoch"] for row in rows if "loss" in row] == [1, 1, 1, 2, 2]
    for stop in (6, None):
        interrupted(Training(recipe, tmp_path / "parts", ALONE, Run(log_every=5, resume=True)), stop)
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    tenth, _ = start(tmp_path / "none", steps=50)
    assert tenth.between == 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_within_a_destructor_ends_the_run(tmp_path, monkeypatch):
    class Buffer:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    training, _ = start(tmp_path)
    step = training.take_step
    monkeypatch.setattr(training, "take_step", lambda batches: (step(batches), Buffer()) and None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            training.run()
        assert training.step == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_says_so_and_shows_its_scores(trained, capsys):
    recipe = read_recipe(trained / "recipe.json")
    before = {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}
    scores = Training(recipe, trained, ALONE, RESUME).run()
    assert scores["top1"] == read_card(trained / "model.safetensors").trained["val_top1"]
    assert {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()} == before
    said = capsys.readouterr().err
    assert "is finished, after 1 epochs of 23 steps: loss" in said and f"top-1 {scores['top1']:.2f} %" in said


def test_a_longer_run_is_a_resumed_one(tmp_path, capsys):
    """One epoch, then two more: the steps of the second and third are those of a run of three from there on."""
    recipe = Recipe("digits", **VIT, epochs=1, batch=360, warmup=0, lr=1e-3)
    Training(recipe, tmp_path, ALONE).run()
    longer = Training(replace(recipe, epochs=3), tmp_path, ALONE, RESUME)
    assert "--epochs raised from 1 to 3: from step 4 on the learning rate follows" in capsys.readouterr().err
    assert (longer.step, longer.last) == (4, 12)
    longer.run()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if "val_top1" in row] == [4, 8, 12]
    expected = rates(tmp_path / "other", epochs=3, warmup=0, lr=1e-3)
    assert [row["lr"] for row in rows if row["step"] == 12 and "lr" in row] == [pytest.approx(expected[11])]
    assert read_recipe(tmp_path / "recipe.json").epochs == 3
    with pytest.raises(InputError, match="a run with --epochs 3, not 2"):
        Training(replace(recipe, epochs=2), tmp_path, ALONE, RESUME)


def test_a_run_is_not_overwritten_or_resumed_as_another(trained):
    recipe = read_recipe(trained / "recipe.json")
    with pytest.raises(InputError, match="already holds a run"):
        Training(recipe, trained, ALONE)
    with pytest.raises(InputError, match="--lr 0.003, not 0.1"):
        Training(replace(recipe, lr=0.1), trained, ALONE, RESUME)
    with pytest.raises(InputError, match="processes=1, not 2"):
        Training(recipe, trained, Processes(0, 2, torch.device("cpu")), RESUME)


def test_a_damaged_state_is_refused(tmp_path, trained):
    recipe = read_recipe(trained / "recipe.json")
    whole = (trained / "state.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"nonsense" * 10):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            Training(recipe, tmp_path, ALONE, RESUME)
    state = torch.load(trained / "state.pt", weights_only=True)
    for entry, content in (("recipe", [1]), ("trained", {}), ("optimizer", {"state": {}, "param_groups": []})):
        torch.save({**state, entry: content}, tmp_path / "state.pt")
        with pytest.raises(CheckpointError, match="state.pt is (not )?the state of"):
            Training(recipe, tmp_path, ALONE, RESUME)


@pytest.mark.parametrize("step, kept", [(6, "the state before is in .*state.pt"), (2, "no state had been saved yet")])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_good_state(tmp_path, step, kept):
    recipe = Recipe("digits", **VIT, epochs=2, batch=360, lr=1e-3, warmup=0)
    training = Training(recipe, tmp_path, ALONE, Run(log_every=100))
    take_step = training.take_step

    def poison(batches):
        if training.step == step:
            with torch.no_grad():
                training.bare.head.weight.fill_(float("nan"))
        take_step(batches)

    training.take_step = poison
    with pytest.raises(Diverged, match=f"loss is nan after step {4 * (step // 4) + 4};.*{kept}"):
        training.run()
    assert (tmp_path / "state.pt").exists() == (step > 4)
    if step > 4:
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["step"] == 4
        assert all(v.isfinite().all() for v in state["trained"].values())


def test_broken_images_are_left_out_and_named(images, tmp_path, capsys):
    (images / "circle" / "3.png").write_bytes(b"broken")
    (images / "square" / "[5].png").write_bytes(b"")
    recipe = Recipe(str(images), **VIT, epochs=1, batch=8, augment="standard", holdout=0.5)
    training = Training(recipe, tmp_path / "run", ALONE)
    training.run()
    said = capsys.readouterr().err
    assert said.count("circle/3.png: ") == said.count("square/[5].png: ") == 1
    assert training.broken == {line.removeprefix("left out ") for line in said.splitlines() if "left out" in line}


def test_one_broken_image_does_not_stop_batches_of_one(images, tmp_path, capsys):
    for i in range(3):
        (images / "circle" / f"{i}.png").write_bytes(b"broken")
    Training(Recipe(str(images), **VIT, epochs=1, batch=1), tmp_path / "run", ALONE).run()
    assert "circle/1.png" in capsys.readouterr().err
    good = shutil.copytree(images, tmp_path / "good")
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 24 training samples can be read"):
        Training(Recipe(str(images), val=str(good), **VIT, epochs=1, batch=4), tmp_path / "other", ALONE).run()
    with pytest.raises(InputError, match="none of the 24 held-out samples can be read; the first: .*circle/0.png"):
        Training(Recipe(str(good), val=str(images), **VIT, epochs=1, batch=4), tmp_path / "third", ALONE)


def test_a_norm_of_a_single_value_is_one_line(images, tmp_path):
    recipe = Recipe(str(images), model="resnet18", model_args={"img_size": 32}, epochs=1, batch=1)
    with pytest.raises(InputError, match="a norm over the batch sees a single value .*; a larger --batch"):
        Training(recipe, tmp_path / "run", ALONE).run()


def test_fine_tuning_keeps_the_features_and_not_the_classifier(tmp_path, trained, images):
    """From a card: neither the model nor its arguments are named again; a resumed run needs the file no more."""
    checkpoint = tmp_path / "from.safetensors"
    checkpoint.write_bytes((trained / "model.safetensors").read_bytes())
    recipe = Recipe(str(images), epochs=1, checkpoint=str(checkpoint), model_args={"in_chans": 1})
    training = Training(recipe, tmp_path / "run", ALONE)
    before, _ = restore(checkpoint=checkpoint)
    assert torch.equal(training.bare.patch_embed.proj.weight, before.patch_embed.proj.weight)
    assert training.bare.head.weight.shape == (3, 24)
    training.run()
    checkpoint.unlink()
    again = Training(recipe, tmp_path / "run", ALONE, RESUME)
    assert again.step == training.step and same(again.bare.state_dict(), training.bare.state_dict())
    with pytest.raises(CheckpointError, match="of vit_tiny_patch16_224, not of vim_tiny"):
        Training(Recipe(str(images), checkpoint=str(trained / "model.safetensors"), **VIM), tmp_path / "x", ALONE)


@pytest.mark.parametrize("task", RECIPES)
def test_nothing_is_fetched_before_all_else_is_accepted(task, tmp_path, monkeypatch):
    """Published weights: neither for data that are not there nor, of the loop, for options that cannot be used."""
    for module, name in ((zoo, "_fetch"), (cards, "_reach")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("it is fetched first"))
    teacher = {"teacher": "vit_tiny_patch16_224"} if task in ("distill", "distill-encoder") else {}
    recipe = RECIPES[task](data=str(tmp_path / "nowhere"), pretrained=True, **teacher)
    with pytest.raises(InputError, match="nowhere"):
        Training(recipe, tmp_path / "run", ALONE)
    assert not (tmp_path / "run").exists()


def test_options_folders_and_held_out_samples_are_looked_at_before_weights_are_fetched(images, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_fetch", lambda *args: pytest.fail("it is fetched first"))
    recipe = Recipe(str(images), pretrained=True, **VIM)
    with pytest.raises(InputError, match="--optimizer must be one of timm's"):
        Training(replace(recipe, optimizer="adamv"), tmp_path / "run", ALONE)
    with pytest.raises(InputError, match="0.png is a file; --out needs a folder there"):
        Training(recipe, images / "circle" / "0.png" / "run", ALONE)
    for name in ("circle", "square", "stripe"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 3 held-out samples can be read"):
        Training(replace(recipe, val=str(tmp_path / "val")), tmp_path / "run", ALONE)


def test_the_weights_in_a_state_are_those_for_use(tmp_path):
    recipe = Recipe("digits", **VIT, epochs=1, batch=360, ema=0.5, lr=1e-2, warmup=0)
    training = Training(recipe, tmp_path, ALONE)
    training.run()
    weights = read_state_dict(tmp_path / "state.pt")
    assert same(weights, load_file(tmp_path / "model.safetensors")) and same(weights, training.ema.module.state_dict())
    plain = sum(p.numel() for p in training.bare.parameters()) * 4
    assert (tmp_path / "state.pt").stat().st_size < 4.5 * plain + 2**16  # weights, average, two moments: each once


def test_half_precision_and_checkpointing_compute_nearly_the_same(tmp_path):
    losses = []
    for options in ({}, {"bf16": True}, {"grad_checkpointing": True}):
        training, batches = start(tmp_path, **options)
        training.take_step(batches)
        losses.append(training.losses.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_clipping_bounds_the_gradient(tmp_path):
    """With plain SGD, the step is the learning rate times the clipped gradient."""
    training, batches = start(tmp_path, optimizer="momentum", momentum=0.0, lr=1.0, min_lr=1.0, warmup=0,
                              weight_decay=0.0, clip_grad=1e-2)  # fmt: skip
    before = [p.detach().clone() for p in training.bare.parameters()]
    training.take_step(batches)
    moved = sum((p - b).square().sum() for p, b in zip(training.bare.parameters(), before)).sqrt()
    assert moved.item() == pytest.approx(1e-2, rel=1e-3)


def test_the_number_of_classes_must_be_that_of_the_data(tmp_path):
    with pytest.raises(InputError, match="num_classes=7, but the data have 10 classes"):
        start(tmp_path, model_args={**VIT["model_args"], "num_classes": 7})


def test_defaults_follow_the_channels(images, tmp_path):
    """One channel asked for, no augmentation named: trained without one that needs colours."""
    recipe = Recipe(str(images), model=VIT["model"], model_args={**VIT["model_args"], "in_chans": 1}, epochs=1)
    assert Training(recipe, tmp_path / "run", ALONE).run()["loss"] > 0
    with pytest.raises(InputError, match="--augment rand-m9 is for RGB"):
        Training(replace(recipe, augment="rand-m9"), tmp_path / "other", ALONE)


def test_devices_that_compute_nothing():
    for name in ("meta", "abacus", "cuda:99"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used here: ."):
            pick_device(name)
