"""Options: every field of every recipe has a type and, if it is a number, a range that is kept."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

import pytest

from linescan.engine.recipe import NATURAL, POSITIVE, SHARE, Range, Recipe, Run, flag, option
from linescan.errors import InputError
from linescan.tasks.recipes import RECIPES, ClassificationRecipe, read_recipe

from ..conftest import ENVIRONMENT

TEACHER = {"teacher": "vit_tiny_patch16_224"}
NEEDED = {"distill": TEACHER, "distill-encoder": TEACHER}


def make(task: str, **values) -> Recipe:
    return RECIPES[task](**{"data": "digits", **NEEDED.get(task, {}), **values})


def numbers(cls) -> list[tuple[str, Range]]:
    """The numeric fields of a recipe and their ranges."""
    hints = get_type_hints(cls)
    kinds = {f.name: set(get_args(hints[f.name]) or (hints[f.name],)) for f in fields(cls)}
    return [(f.name, f.metadata["inside"]) for f in fields(cls) if kinds[f.name] & {int, float, tuple[float, float]}]


@pytest.mark.parametrize("task", RECIPES)
def test_every_number_has_a_range_and_every_option_a_help(task):
    for name, inside in numbers(RECIPES[task]) + numbers(Run):
        assert inside is not None, f"{name} has no range"
    for f in fields(RECIPES[task]) + fields(Run):
        assert f.metadata["help"].endswith((".", ")")) and f.metadata["panel"], f.name


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 1e400])
def test_no_number_is_nan_infinite_or_negative(task, value):
    for name, _ in numbers(RECIPES[task]):
        is_pair = name == "betas"
        with pytest.raises(InputError, match=f"^{flag(name)} must be .*, not ") as error:
            make(task, **{name: (value, 0.9) if is_pair else value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(epochs=0), "--epochs must be at least 1, not 0"),
        (dict(epochs=1.5), "--epochs must be a whole number, not 1.5"),
        (dict(epochs=True), "--epochs must be a whole number, not True"),
        (dict(ema=1.0), "--ema must be at least 0 and below 1, not 1.0"),
        (dict(clip_grad=0), "--clip-grad must be above 0, not 0"),
        (dict(clip_grad=-1.0), "--clip-grad must be above 0, not -1.0"),
        (dict(layer_decay=-1), "--layer-decay must be above 0 and at most 1, not -1"),
        (dict(lr=math.nan), "--lr must be above 0, not nan"),
        (dict(lr="high"), "--lr must be a number, not 'high'"),
        (dict(mixup=math.nan), "--mixup must be at least 0, not nan"),
        (dict(warmup=math.nan), "--warmup must be at least 0, not nan"),
        (dict(min_lr=5), "--min-lr must be at most --lr, 0.0005, not 5"),
        (dict(betas=(0.9,)), "--betas must be 2 numbers"),
        (dict(betas=(0.9, 1.0)), "--betas must be at least 0 and below 1, not 1.0"),
        (dict(schedule="linear"), "--schedule must be one of cosine, constant, .*, not 'linear'"),
        (dict(schedule="multistep"), "--schedule multistep needs --milestones"),
        (dict(schedule="poly", period=2), "--period is for --schedule cosine without --hold"),
        (dict(schedule="step", hold=2), "--hold is for cosine, poly, tanh and wsd, not for --schedule step"),
        (dict(schedule="multistep", milestones="1,x"), "--milestones must be numbers above 0 with commas"),
        (dict(schedule="multistep", milestones="-1"), "--milestones must be numbers above 0 with commas"),
        (dict(batch=7, mixup=0.5), "--batch must be even, not 7"),
        (dict(data=None), "--data must be a word, not None"),
        (dict(model_args=["a=b"]), "--model-arg must be names with values"),
    ],
)
def test_what_makes_no_sense(wrong, said):
    with pytest.raises(InputError, match=said):
        make("classify", **wrong)


def test_ranges():
    assert 0 not in POSITIVE and 0 in NATURAL and 0 in SHARE and 1 not in SHARE
    assert math.inf not in POSITIVE and math.nan not in Range()
    assert str(Range(above=0, most=1)) == "above 0 and at most 1" and str(Range()) == "a number"


def test_the_default_of_the_lowest_rate_follows_the_highest():
    assert make("classify").lowest_lr == 1e-5 and make("classify", lr=1e-6).lowest_lr == 1e-6
    assert make("classify", min_lr=0.0).lowest_lr == 0


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_comes_back_from_json(task, tmp_path):
    recipe = make(task, betas=(0.9, 0.95), model_args={"depth": 2}, lr=1e-3)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.as_dict()))
    assert read_recipe(tmp_path / "recipe.json") == recipe
    for content in ("", "{}", '{"task": "unknown"}', '{"task": "classify", "data": "digits", "no_such": 1}'):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(InputError, match="recipe.json cannot be used as a recipe"):
            read_recipe(tmp_path / "recipe.json")


def test_a_task_adds_options_and_changes_defaults():
    @dataclass(frozen=True)
    class Other(ClassificationRecipe):
        lr: float = option(1e-2, "Another default.", "Optimiser", POSITIVE)
        depth: int = option(3, "One more option.", "Model", NATURAL)

    assert Other("digits").lr == 1e-2 and Other("digits", depth=1).depth == 1
    with pytest.raises(InputError, match="--depth"):
        Other("digits", depth=-1)
    names = [f.name for f in fields(ClassificationRecipe)]
    assert [f.name for f in fields(Other)] == [*names, "depth"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Other("digits").lr = 1


def test_recipes_need_no_torch():
    code = (
        "import sys, types; root = types.ModuleType('linescan'); root.__path__ = ['linescan']; "
        "sys.modules['linescan'] = root; import linescan.tasks.recipes; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ENVIRONMENT["PYTHONPATH"], check=True)
