"""Vim beyond the contract and the golden data: its variants, initialisation and position embedding."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import linescan
from linescan.backbones.feature_maps import dense_backbone
from linescan.backbones.vim import Vim
from tests.parity import recipe

DATA = Path(__file__).parents[1] / "parity" / "data"
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=5)


def test_pos_embed_resize_as_the_original_finetuning_does_it():
    manifest = json.loads((DATA / "vim__pos_embed_resize.json").read_text())
    table = torch.from_numpy(recipe.state_dict(manifest)["pos_embed"])
    model = Vim(stride=8, class_token="head", embed_dim=table.shape[-1], depth=1)
    state = model.checkpoint_filter({"pos_embed": table, "cls_token": torch.zeros(1, 1, table.shape[-1])})
    assert state["pos_embed"].shape[1:3] == (27, 27)
    got = torch.cat([state["cls_pos_embed"], state["pos_embed"].flatten(1, 2)], 1)  # its class row is the first
    with np.load(DATA / "vim__pos_embed_resize.npz") as golden:
        want = golden[golden.files[0]].reshape(-1)
    have = recipe.sample(got.numpy()) if got.numel() != want.size else got.numpy().reshape(-1)
    assert np.abs(have - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("class_token, rows", [("middle", [8]), ("double", [0, 17]), ("head", [0])])
def test_class_rows_of_a_file_are_not_resized(class_token, rows):
    table = torch.randn(1, 16 + len(rows), 32)
    model = Vim(class_token=class_token, **SMALL | {"img_size": (48, 40)})
    state = model.checkpoint_filter({"pos_embed": table, "cls_token": torch.zeros(1, len(rows), 32)})
    assert torch.equal(state["cls_pos_embed"], table[:, rows]) and state["pos_embed"].shape == (1, 6, 5, 32)
    patches = table[:, [i for i in range(table.shape[1]) if i not in rows]].mT.unflatten(2, (4, 4))
    want = torch.nn.functional.interpolate(patches, (6, 5), mode="bicubic")
    assert torch.allclose(state["pos_embed"], want.permute(0, 2, 3, 1))


@pytest.mark.parametrize("class_token", ["middle", "head", "double", None])
@pytest.mark.parametrize("bimamba_type", ["v2", "v1", "none"])
def test_variants_run_at_any_size_and_every_parameter_matters(class_token, bimamba_type):
    torch.manual_seed(0)
    model = Vim(class_token=class_token, bimamba_type=bimamba_type, init_layer_scale=0.5, **SMALL)
    for size in ((32, 32), (40, 27)):
        logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5)
    logits.square().sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a class token at the head hears nothing from a forward-only scan but itself
    if (class_token, bimamba_type) != ("head", "none"):
        assert not unused


def test_official_keys_round_trip_through_a_file(tmp_path):
    torch.manual_seed(0)
    model = Vim(class_token="double", **SMALL)
    official = {}
    for key, value in model.state_dict().items():
        official[key] = value
    path = tmp_path / "own.pth"
    torch.save({"model": official, "epoch": 3}, path)
    other = linescan.load_checkpoint(Vim(class_token="double", **SMALL), path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_published_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", depth=4)
    mixer = model.blocks[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.9e-4 <= steps[0].min() and steps[0].max() <= 0.11
    assert torch.all(mixer.dt_bias[1] == 0)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand_as(mixer.A_log))
    assert torch.all(mixer.D == 1)
    bound = (1 / 384) ** 0.5 / 4**0.5
    assert mixer.out_proj.weight.abs().max() <= bound and mixer.out_proj.weight.abs().max() > 0.95 * bound
    assert abs(model.pos_embed.std().item() - 0.02) < 0.001


def test_stacked_biases_escape_weight_decay():
    model = Vim(**SMALL)
    skipped = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "cls_pos_embed", "blocks.0.mixer.D", "blocks.1.mixer.dt_bias"} <= skipped
    assert "blocks.0.mixer.A_log" not in skipped  # decayed, as the authors trained it


def test_rotary_first_release_needs_no_class_token():
    with pytest.raises(ValueError, match="class_token=None"):
        Vim(rope=True, **SMALL)
    model = Vim(rope=True, class_token=None, divide_out=False, **SMALL).eval()
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(model(x), model(x.flip(-1)), atol=1e-4)


@pytest.mark.parametrize(
    "neck, strides", [("rescaled", (4, 8, 16, 32)), ("simple", (4, 8, 16, 32, 64)), (None, (16,) * 4)]
)
def test_dense_strides(neck, strides):
    kwargs = dict(img_size=64, embed_dim=32, depth=4, out_indices=(0, 1, 2, 3), neck=neck)
    model = dense_backbone("vim_tiny_patch16_224", **kwargs).eval()
    maps = model(torch.randn(1, 3, 128, 64))
    assert model.strides == list(strides) and model.out_channels == [m.shape[1] for m in maps]
    assert [tuple(m.shape[-2:]) for m in maps] == [(128 // s, 64 // s) for s in strides]


def test_dense_patch8_pyramid():
    kwargs = dict(img_size=64, patch_size=8, embed_dim=32, depth=4, out_indices=(0, 1, 2, 3))
    model = dense_backbone("vim_tiny_patch16_224", **kwargs).eval()
    maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


@pytest.mark.parametrize("kwargs, message", [
    (dict(class_token="tail"), "class_token is"),
    (dict(bimamba_type="v3"), "bimamba_type is"),
])  # fmt: skip
def test_unknown_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Vim(**SMALL, **kwargs)
