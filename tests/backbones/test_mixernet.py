"""The comparison backbones: every mixer, with routes and merges, in both shapes."""

import pytest
import timm
import torch

from linescan.layers.mixers import MIXERS, Mixer

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, head_dim=8, num_classes=5)


@pytest.mark.parametrize("merge", ["sum", "mean", "gate", "concat", "channel_attention"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_with_every_merge(mixer, merge):
    torch.manual_seed(0)
    model = timm.create_model("scan_tiny", mixer=mixer, routes=("row", "-row", "col", "-col"), merge=merge, **SMALL)
    logits = model(torch.randn(2, 3, 32, 40))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not (mixer == "softmax" and name.endswith("merge.logits")):  # one route: its weight is always 1
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mixer", MIXERS)
def test_routes_decide_what_a_token_sees(mixer):
    torch.manual_seed(0)
    one_way = Mixer(32, mixer, routes="row", head_dim=8).eval()
    x = torch.randn(1, 6, 6, 32)
    y = x.clone()
    y[:, 5, 5] += 1.0
    with torch.no_grad():
        changed = (one_way(x) != one_way(y)).any(-1)[0]
    causal = MIXERS[mixer].ordered and mixer != "bi_wkv4"
    # the convolution reaches one token; anything farther before the change must come through the mixer
    assert bool(changed[:4].any()) is not causal


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_take_half_precision_and_any_grid(mixer):
    torch.manual_seed(0)
    module = Mixer(32, mixer, head_dim=8)
    for grid in ((1, 7), (5, 3)):
        x = torch.randn(2, *grid, 32)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.shape == x.shape and y.isfinite().all()


def test_hierarchical_shape_takes_the_same_options():
    model = timm.create_model("scanh_tiny", mixer="gla", routes="hilbert,-hilbert", merge="gate", depths=(1, 1, 1, 1))
    maps = model.forward_intermediates(torch.randn(1, 3, 64, 96), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]


def test_wrong_names_list_what_exists():
    with pytest.raises(ValueError, match="unknown mixer 'lstm'; there are: s6, ssd"):
        timm.create_model("scan_tiny", mixer="lstm", depth=1)
    with pytest.raises(ValueError, match="unknown merge"):
        timm.create_model("scan_tiny", merge="max", depth=1)
    with pytest.raises(ValueError, match="head_dim divides"):
        timm.create_model("scan_tiny", mixer="gla", head_dim=7, depth=1)
