"""Before anything is rounded, a transformed model computes what it did, to 1e-9 in float64, at published widths."""

import copy

import pytest
import torch

import linescan
from linescan.quantise.convert import transform
from linescan.quantise.layers import Turned
from linescan.quantise.recipes import METHODS, TRANSFORMS, Recipe

# The published widths of each family, one or two blocks of each kind, at a size that is quick.
MODELS = {
    "vim_tiny": ("vim_tiny_patch16_224", {"img_size": 32, "depth": 2}, (2, 3, 32, 48)),
    "vim_small": ("vim_small_patch16_224", {"img_size": 32, "depth": 1, "init_layer_scale": 0.1}, (1, 3, 32, 32)),
    "vim_base": ("vim_base_patch16_224", {"img_size": 32, "depth": 1}, (1, 3, 32, 32)),
    "vim_first_release": (
        "vim_tiny_patch16_224",
        {"img_size": 32, "depth": 2, "class_token": "none", "rope": True, "bimamba_type": "v1"},
        (1, 3, 32, 32),
    ),
    "local_vim_tiny": ("local_vim_tiny", {"img_size": 32, "depth": 2}, (1, 3, 48, 32)),
    "local_vim_small": ("local_vim_small", {"img_size": 32, "depth": 1}, (1, 3, 32, 32)),
    "local_vim_class_token": ("local_vim_tiny_middle_cls_token", {"img_size": 32, "depth": 2}, (1, 3, 32, 32)),
    "local_vim_search": ("local_vim_tiny_search", {"img_size": 32, "depth": 1}, (1, 3, 32, 32)),
    "mamband_small": ("mamband_small_patch8_224", {"img_size": 16, "depths": (2, 1)}, (1, 3, 16, 24)),
    "mamband_base": ("mamband_base_patch8_224", {"img_size": 16, "depths": (1,)}, (1, 3, 16, 16)),
    "mamband_video": (
        "mamband_video_small_patch16_224", {"img_size": 32, "depth": 3, "num_frames": 4}, (1, 3, 4, 32, 32),
    ),
    "vmamba": ("vmamba_tiny_s1l8", {"depths": (1, 1, 1, 1)}, (1, 3, 32, 32)),
    "vmamba_base": ("vmamba_base_s2l15", {"depths": (1, 1)}, (1, 3, 32, 32)),
    "vmamba_gated": ("vmamba_tiny_0220", {"depths": (1, 1)}, (1, 3, 32, 32)),
    "vmamba_vanilla": ("vmamba_vanilla_tiny", {"depths": (1,)}, (1, 3, 16, 32)),
    "local_vmamba": ("local_vssm_tiny", {"depths": (1, 1)}, (1, 3, 24, 32)),
}  # fmt: skip


def made(key: str):
    """A model whose every parameter is away from its initial value, and an input."""
    name, args, shape = MODELS[key]
    torch.manual_seed(0)
    if "depths" in args and name.startswith(("vmamba", "local_vssm")):
        args = {
            **args,
            "dims": [linescan.zoo.find(name).args.get("dims", 96) * 2**i for i in range(len(args["depths"]))],
        }
    model = linescan.create_model(name, num_classes=10, **args).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < 10_000:
                parameter += 0.2 * torch.randn_like(parameter)
        model.head.weight.normal_()
    return model, torch.randn(shape, dtype=torch.float64)


def largest_difference(model, transforms, x) -> float:
    """Of logits and features, before and after the transforms, relative to the largest of each."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        transform(changed, Recipe("mambaquant", changes={"transforms": transforms}), [x])
        pairs = [(model(x), changed(x)), (model.forward_features(x), changed.forward_features(x))]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("key", MODELS)
def test_all_transforms_together_leave_the_function_as_it_is(key):
    model, x = made(key)
    assert largest_difference(model, TRANSFORMS, x) < 1e-9


@pytest.mark.parametrize("key", ["vim_tiny", "vmamba_vanilla"])
def test_each_transform_changes_weights_and_not_the_function(key):
    model, x = made(key)
    plain = weights(transform(copy.deepcopy(model), Recipe(changes={"transforms": ()})))
    for transforms in [(name,) for name in TRANSFORMS if name != "klt"] + [METHODS["mambaquant"].transforms]:
        changed = copy.deepcopy(model)
        assert largest_difference(changed, transforms, x) < 1e-9, transforms
        changed = weights(transform(changed, Recipe(changes={"transforms": transforms}), [x]))
        online = transforms == ("R3",)
        assert online or len(changed) != len(plain) or not torch.equal(changed, plain), transforms


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_the_stream_turns_where_it_can():
    for key, turns in {"vim_tiny": True, "local_vim_class_token": True, "vim_first_release": False,
                       "local_vim_tiny": False, "mamband_small": False}.items():  # fmt: skip
        model, x = made(key)
        transform(model, Recipe(), [x])
        assert any(isinstance(m, Turned) for m in model.modules()) == turns
        assert all(m.in_proj.turned != turns for m in model.modules() if hasattr(m, "in_proj"))


def test_channels_of_the_stream_have_equal_variance():
    """What R1 and the Karhunen-Loeve basis are for: the input of the last in_proj."""
    model, _ = made("vim_tiny")
    x, seen = torch.randn(40, 3, 32, 32, dtype=torch.float64), []
    transform(model, Recipe(), [x])
    model.blocks[-1].mixer.in_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    variance = seen[0].flatten(0, 1).var(0)
    assert variance.std() / variance.mean() < 1e-9
