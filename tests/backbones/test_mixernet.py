"""The comparison backbones: every mixer, with routes and merges, in both shapes."""

import pytest
import timm
import torch

from linescan.layers.mixers import MIXERS, Attention, Mixer

from ..conftest import REPOSITORY

BLIND = [name for name, core in MIXERS.items() if issubclass(core, Attention)]  # to the order of tokens
BOTH_SIDES = ["bi_wkv4", "bi_wkv6", "sliding"]  # of a token on a route
SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, head_dim=8, num_classes=5)


MERGES = ["sum", "mean", "gate", "concat", "channel_attention", "path_activation"]
# Every mixer with a merge that has parameters per route and channel; every merge with heads, without, and blind.
TRAINED = [(m, "gate") for m in MIXERS] + [(m, merge) for m in ("gla", "s6", "hgrn", "softmax") for merge in MERGES]


@pytest.mark.parametrize("mixer, merge", dict.fromkeys(TRAINED))
def test_mixers_train_with_merges(mixer, merge):
    torch.manual_seed(0)
    model = timm.create_model("scan_tiny", mixer=mixer, routes=("row", "-row", "col", "-col"), merge=merge, **SMALL)
    logits = model(torch.randn(2, 3, 32, 40))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        one_route = mixer in BLIND and name.endswith(("merge.logits", "merge.gate.weight"))
        if not one_route:  # its weight is always 1
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mixer", MIXERS)
def test_routes_decide_what_a_token_sees(mixer):
    torch.manual_seed(0)
    one_way = Mixer(32, mixer, routes="row", head_dim=8, window=5).eval()
    x = torch.randn(1, 6, 6, 32)
    y = x.clone()
    y[:, 5, 5] += 1.0
    with torch.no_grad():
        changed = (one_way(x) != one_way(y)).any(-1)[0]
    # The convolution reaches one token; anything farther before the change must come through the mixer.
    assert bool(changed[:4].any()) is (mixer in BLIND + BOTH_SIDES)
    if mixer in ("softmax", "global_linear", "global_hedgehog", "vittt_glu", *BOTH_SIDES[:2]):
        assert changed.all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_take_half_precision_and_any_grid(mixer):
    torch.manual_seed(0)
    module = Mixer(32, mixer, head_dim=8)
    for grid in ((1, 7), (5, 3)):
        x = torch.randn(2, *grid, 32)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.shape == x.shape and y.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_finite_however_strong_the_gates_are(mixer):
    torch.manual_seed(0)
    core = Mixer(32, mixer, routes="row", head_dim=16, window=3).core
    x = 300 * torch.randn(1, 4, 6, 32)
    x[:, 1, :4] = 0  # keys, too
    y = core(x.requires_grad_())
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_hierarchical_shape_takes_the_same_options():
    model = timm.create_model("scanh_tiny", mixer="gla", routes="hilbert,-hilbert", merge="gate", depths=(1, 1, 1, 1))
    maps = model.forward_intermediates(torch.randn(1, 3, 64, 96), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]


def test_wrong_names_list_what_exists():
    with pytest.raises(ValueError, match="mixer is one of 's6', 'ssd'"):
        timm.create_model("scan_tiny", mixer="lstm", depth=1)
    with pytest.raises(ValueError, match="unknown merge"):
        timm.create_model("scan_tiny", merge="max", depth=1)
    with pytest.raises(ValueError, match="head_dim divides"):
        timm.create_model("scan_tiny", mixer="gla", head_dim=7, depth=1)


def names(model):
    blocks = [b for s in model.stages for b in s.blocks] if hasattr(model, "stages") else model.blocks
    classes = {cls: name for name, cls in MIXERS.items()}
    return [classes[type(block.mixer.core)] for block in blocks]


def test_blocks_may_have_different_mixers():
    x = torch.randn(1, 3, 32, 40)
    model = timm.create_model("scan_tiny", mixer=("s6", "gla", "window"), **SMALL | {"depth": 5})
    assert names(model) == ["s6", "gla", "window", "s6", "gla"] and model(x).shape == (1, 5)
    hierarchical = dict(dims=(32, 32, 64, 64), depths=(1, 2, 3, 1), head_dim=16)
    model = timm.create_model("scanh_tiny", mixer=("s6", "s6", "window"), **hierarchical)
    assert names(model) == ["s6", "s6", "window", "s6", "s6", "window", "s6"] and model(x).shape == (1, 1000)
    model = timm.create_model("scanh_tiny", mixer=("s6", "ssd", ("gla", "softmax"), "neighborhood"), **hierarchical)
    assert names(model) == ["s6", "ssd", "ssd", "gla", "softmax", "gla", "neighborhood"]
    assert model(x).isfinite().all()


@pytest.mark.parametrize("kwargs, message", [
    (dict(mixer=("s6", "lstm")), "mixer is one of 's6', 'ssd', .* not 'lstm'"),
    (dict(mixer=()), "mixer gives 0 names for the model, which has 2 blocks"),
    (dict(mixer=("s6", "s6", "s6")), "mixer gives 3 names for the model, which has 2 blocks"),
    (dict(mixer="window", window=4), "windows are odd, got 4"),
])  # fmt: skip
def test_impossible_hybrids_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("scan_tiny", **SMALL | kwargs)
    with pytest.raises(ValueError, match="mixer gives 2 names for stage 3, which has 1 blocks"):
        timm.create_model("scanh_tiny", depths=(1, 1, 2, 1), mixer=("s6", "s6", "s6", ("s6", "gla")))


def test_the_page_lists_every_mixer():
    text = (REPOSITORY / "docs" / "mixers.md").read_text()
    assert not [name for name in MIXERS if f"`{name}`" not in text]
