"""The recipes in configs/: each is one of a published run, and `linescan train --recipe` takes it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from linescan import zoo
from linescan.cli.options import words_of
from linescan.cli.train import recipe_of, training_of, with_recipe
from linescan.engine.configs import find_config, list_configs
from linescan.engine.recipe import Run
from linescan.engine.training import train
from linescan.errors import InputError
from linescan.tasks.recipes import RECIPES, read_options, read_recipe

NAMES = list_configs(".toml")


def by_command_line(*args: str):
    """The recipe that `linescan train ARGS` would run."""
    args = with_recipe([*args, "--out", "run"])
    task = args[1]
    options = training_of(task).make_context("train", args).params
    own = ("task", "to", "recipe", "config", "cfg_options", *Run.__dataclass_fields__)
    return recipe_of(task, {name: value for name, value in options.items() if name not in own})


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_of_a_model_of_its_task(name):
    recipe = read_recipe(name, data="photos")
    folder, _, file = name.partition("/")
    assert recipe.task == folder and file.startswith(recipe.model)
    assert zoo.find(recipe.model).task == folder
    assert recipe == by_command_line("--recipe", name, "--data", "photos"), "the command line has the same options"
    if recipe.checkpoint:
        assert find_config(recipe.checkpoint.split("/")[1], ".toml"), "of the run that it starts from"


def test_there_is_a_recipe_for_each_published_run():
    recipes = [read_recipe(name, data="photos") for name in NAMES]
    models = {model for task in ("restoration", "anomaly", "change") for model in zoo.list_models(task=task)}
    models |= set(zoo.list_models("mhsvm*"))
    unpublished = {"mambair_real_x4", "mambafcs_base_binary"}
    assert {recipe.model for recipe in recipes} == models - unpublished
    denoise = {r.degrade for r in recipes if r.model == "mambair_color_dn"}
    assert denoise == {f"noise {entry.tag.removeprefix('sigma')}" for entry in zoo.tags("mambair_color_dn")}


def test_the_command_line_counts_before_the_file(tmp_path):
    name = "segmentation/mhsvm_vmunet_4h_isic18"
    recipe = by_command_line("--recipe", name, "-d", "isic", "--lr", "0.1", "--model-arg", "d_state=4", "--size=64")
    assert recipe.lr == 0.1 and recipe.size == "64" and recipe.epochs == 300
    assert recipe.model_args == {"threshold": 0.5, "d_state": 4}
    finished = replace(recipe, model_args={"dims": [8, 16], "heads": "CX"}, bf16=True, betas=(0.5, 0.75))
    (tmp_path / "recipe.json").write_text(json.dumps(finished.as_dict()))
    assert by_command_line("--recipe", str(tmp_path / "recipe.json")) == finished, "of a run"
    assert words_of({"bf16": False, "lr": None, "ema": 0.5}) == ["--ema", "0.5"]


def test_files_that_are_no_recipe(tmp_path):
    path = tmp_path / "own.toml"
    for text, said in (
        ("lr = 1", "task must be one of classify, "),
        ('task = "paint"', "task must be one of classify, "),
        ('task = "change"\nlrr = 1', "'lrr' is no option; near it: lr"),
        ('task = "change"\nlr = "high"', "--lr must be a number, not 'high'"),
        ('task = "change"\nbatch = 1.5', "--batch must be a whole number, not 1.5"),
        ('task = "change"\nlr = ', "own.toml cannot be used as a recipe"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said) as error:
            read_options(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="near it: .*mambair_x2"):
        read_options("mambair_x22")
    with pytest.raises(InputError, match="mambair_x2 is one of --task restoration, not of change"):
        with_recipe(["--recipe", "mambair_x2", "--task", "change"])
    with pytest.raises(InputError, match="has no data"):
        read_recipe("mambair_x2")


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A few images for each task."""
    root, dice = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for i in range(4):
        photo = dice.integers(0, 256, (40, 36, 3), np.uint8)
        mask = (np.indices((40, 36)).sum(0) % 16 < 8).astype(np.uint8)
        for folder in ("restoration", "anomaly", "change/im1", "change/im2", "segmentation/images"):
            write(root / folder / f"{i}.png", photo)
        for folder in ("change/label1", "change/label2", "segmentation/masks"):
            write(root / folder / f"{i}.png", mask)
        for side in ("high", "low"):
            write(root / "sidd" / side / f"{i}.png", photo)
    return root


IR = dict(depths=[1], embed_dim=12, d_state=2)
SHRUNK = {
    "mambair_x3": dict(model_args=IR, patch=8, batch=2, checkpoint=None),
    "mambair_v2_jpeg_40": dict(
        model_args=IR | dict(num_heads=2, window_size=4, num_tokens=4, inner_rank=4), patch=8, batch=2
    ),
    "mambair_unet_dn": dict(
        model_args=dict(dim=16, depths=[1] * 4, refinement=1, d_state=2), patch=16, batch=2, stages="8x2:1, 16x1:1",
        hold=1,
    ),
    "mhsvm_vmunet_4h_isic17": dict(
        model_args=dict(dims=[8, 16, 32, 64], depths=[1] * 4, depths_decoder=[1] * 4), size="32", batch=2, period=2
    ),
    "mambafcs_base_second": dict(model_args=dict(dims=16, depths=[1] * 4), encoder_checkpoint=None, crop=32, batch=2),
    "mambaad_resnet34_visa": dict(
        model_args=dict(teacher="resnet18", directions=2, depths=[1] * 4, d_state=1), teacher_checkpoint="random",
        size=64, batch=2, epochs=1, evaluate_every=None,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SHRUNK)
def test_a_shrunken_recipe_trains(name, sets, tmp_path):
    task, _ = read_options(name)
    data = sets / ("sidd" if name == "mambair_unet_dn" else task)
    recipe = read_recipe(
        name, data=str(data), holdout=0.25, **SHRUNK[name], **({} if task == "anomaly" else {"steps": 2})
    )
    scores = train(recipe, tmp_path, device="cpu", workers=0)
    assert np.isfinite(list(scores.values())).all() and (tmp_path / "model.safetensors").exists()
    assert RECIPES[task] is type(recipe)
