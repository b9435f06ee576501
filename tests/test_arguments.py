"""Values for a model's arguments: what the class cannot take is refused in one line that names the argument."""

import pytest
import timm

import linescan
from linescan import zoo
from linescan.arguments import MAY_BE_ZERO, parameters
from linescan.errors import InputError

NAN = float("nan")
PLAIN, STAGES = "vim_tiny_patch16_224", "vmamba_tiny_s1l8"
REFUSED = [
    (PLAIN, {"patch_size": 0}, "patch_size is at least 1, not 0"),
    (PLAIN, {"patch_size": (16,)}, r"patch_size is a whole number, not \(16,\)"),
    (PLAIN, {"img_size": "abc"}, "img_size is a whole number or a pair of whole numbers, not 'abc'"),
    (PLAIN, {"img_size": (64, 64, 64)}, "img_size is a whole number or a pair"),
    (PLAIN, {"img_size": (0, 64)}, r"img_size is at least 1, not \(0, 64\)"),
    (PLAIN, {"in_chans": True}, "in_chans is a whole number, not True"),
    (PLAIN, {"num_classes": -1}, "num_classes is at least 0, not -1"),
    (PLAIN, {"drop_path_rate": NAN}, "drop_path_rate is finite, not nan"),
    (PLAIN, {"drop_path_rate": 1.5}, "drop_path_rate is between 0 and 1, not 1.5"),
    (PLAIN, {"rope": "yes"}, "rope is True or False, not 'yes'"),
    (PLAIN, {"class_token": 3}, "class_token is a word or None, not 3"),
    (STAGES, {"depths": 2}, "depths is a list of whole numbers, not 2"),
    (STAGES, {"depths": [1, 1, 0, 1]}, r"depths is at least 1, not \[1, 1, 0, 1\]"),
    (STAGES, {"mlp_ratio": float("inf")}, "mlp_ratio is finite, not inf"),
    ("mambair_light_x2", {"upscale": 0}, "upscale is at least 1, not 0"),
]


@pytest.mark.parametrize("name, args, line", REFUSED, ids=[str(args) for _, args, _ in REFUSED])
def test_a_bad_value_names_its_argument(name, args, line):
    with pytest.raises(InputError, match=line):
        linescan.create_model(name, **args)


@pytest.mark.parametrize("cls", sorted({entry.cls for entry in zoo.entries()}, key=lambda cls: cls.__name__))
def test_every_count_of_every_class_is_checked(cls):
    entry = next(entry for entry in zoo.entries() if entry.cls is cls)
    assert entry.arguments({}) is not None, "what is registered passes"
    counts = [name for name, parameter in parameters(cls).items() if parameter.annotation is int]
    for name in counts:
        for value in (-1, "x", NAN, None, *(() if name in MAY_BE_ZERO else (0,))):
            with pytest.raises(InputError, match=f"^{name} is "):
                entry.arguments({name: value})


def test_values_are_checked_before_weights_are_fetched():
    with pytest.raises(InputError, match="^patch_size is at least 1, not 0$"):
        timm.create_model(PLAIN, pretrained=True, patch_size=0)


def test_right_values_are_taken_in_any_form():
    assert zoo.find(PLAIN).arguments({"class_token": "none", "drop_rate": 0})["class_token"] is None
    assert timm.create_model(STAGES, depths=[1, 1, 1, 1], img_size=[64, 96], drop_path_rate=0).default_cfg
    with pytest.raises(TypeError, match="unexpected keyword argument 'depht'"):
        timm.create_model(PLAIN, depht=2)
