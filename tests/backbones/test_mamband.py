"""Mamba-ND beyond the contract and the golden data: its block, orders, sizes, and files for images read for clips."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import linescan
from linescan.backbones.feature_maps import dense_maps
from linescan.backbones.mamband import MambaND, MambaND3D, MambaNDBlock
from linescan.errors import InputError
from linescan.layers.mamba import MambaMixer
from linescan.layers.pos_embed import resample_volume

from .test_contract import shaken

FLAT = dict(img_size=32, patch_size=4, dims=(16, 24), depths=(4, 2), num_classes=5)
SOLID = dict(img_size=32, patch_size=8, num_frames=4, tubelet_size=2, embed_dim=16, depth=6, num_classes=5)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_residual_is_the_normed_input():
    torch.manual_seed(0)
    block, x = shaken(MambaNDBlock(8, MambaMixer(8, "row", d_state=4))), noise(2, 3, 4, 8)
    normed = block.norm1(x)
    assert torch.equal(block(x), normed + block.mixer(normed))
    y, mixed = block(x, with_mixed=True)
    assert torch.equal(y, normed + mixed)


@pytest.mark.parametrize("model, orders", [
    (MambaND(**FLAT), ["row", "-row", "col", "-col", "row", "-row"]),
    (MambaND3D(**SOLID), ["thw", "-thw", "twh", "-twh", "wht", "-wht"]),
])  # fmt: skip
def test_layers_take_the_orders_in_turn(model, orders):
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    assert [mixer.along.routes[0].spec for mixer in mixers] == [order.replace("thw", "row") for order in orders]


def test_every_parameter_matters_at_any_size():
    torch.manual_seed(0)
    for model, sizes in ((MambaND(**FLAT), [(32, 32), (45, 27)]), (MambaND3D(**SOLID), [(4, 32, 32), (6, 40, 24)])):
        for size in sizes:
            logits = model(noise(2, 3, *size))
            assert logits.shape == (2, 5)
        logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_odd_sides_are_padded_to_whole_patches():
    model, x = MambaND(**FLAT), noise(1, 3, 30, 21)
    nn.init.zeros_(model.pos_embed)
    stream, grid, _ = model.embed(x)
    assert grid == (8, 6) == model.grid_of(30, 21)
    want = model.patch_embed(F.pad(x, (0, 3, 0, 2))).permute(0, 2, 3, 1)
    assert torch.equal(stream, want)
    infos = timm.create_model("mamband_small_patch8_224", device="meta").feature_info
    assert [(f["reduction"], f["num_chs"]) for f in infos] == 10 * [(8, 384)] + 14 * [(16, 384)]
    assert [(f["module"], f["stride"]) for f in dense_maps("mamband_small_patch8_224")] == [
        ("norms.9", 8), ("norms.23", 16),
    ]  # fmt: skip


def test_volumes_of_positions_are_resampled_axis_by_axis():
    table = noise(1, 2, 3, 4, 5)
    assert resample_volume(table, (2, 3, 4)) is table
    in_space = F.interpolate(table[0].permute(0, 3, 1, 2), (6, 5), mode="bicubic").permute(0, 2, 3, 1)
    assert torch.allclose(resample_volume(table, (2, 6, 5))[0], in_space)
    in_time = resample_volume(table, (4, 3, 4))[0]
    assert torch.allclose(in_time[0], table[0, 0]) and torch.allclose(in_time[-1], table[0, 1])
    assert torch.allclose(in_time[1], 0.75 * table[0, 0] + 0.25 * table[0, 1])
    assert torch.allclose(resample_volume(table[:, :1], (3, 3, 4)), table[:, :1].expand(-1, 3, -1, -1, -1))


def official(model, head):
    """The authors' keys for one of our models."""
    names = {id(m): n for n, m in model.named_modules()}
    blocks = [m for m in model.modules() if isinstance(m, MambaNDBlock)]
    state = {}
    for i, block in enumerate(blocks):
        own, prefix = block.state_dict(), f"layers.{i}"
        for key, name in {
            "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "x_proj": "x_proj.weight",
            "dt_proj": "dt_proj.weight", "dt_bias": "dt_proj.bias", "A_log": "A_log", "D": "D",
        }.items():  # fmt: skip
            value = own[f"mixer.{key}"][0]
            state[f"{prefix}.mixer.{name}"] = value[:, None] if key == "conv_weight" else value
        for key in ("in_proj.weight", "out_proj.weight"):
            state[f"{prefix}.mixer.{key}"] = own[f"mixer.{key}"]
        state |= {f"{prefix}.norm.{part}": own[f"norm1.{part}"] for part in ("weight", "bias")}
        assert names[id(block)]
    for key, value in model.state_dict().items():
        if key.startswith("patch_embed."):
            state[key.replace("patch_embed.", "patch_embed.projection.")] = value
        if key.endswith("pos_embed"):
            state["pos_embed"] = value.flatten(1, -2)
        if key.startswith(("norm.", "fc_norm.")):
            state[key.replace("fc_norm.", "ln2.").replace("norm.", "ln1.")] = value
    state = {f"backbone.{key}": value for key, value in state.items()}
    return state | {f"{head}.{part}": getattr(model.head, part) for part in ("weight", "bias")}


def test_files_for_images_are_inflated(tmp_path):
    image = shaken(MambaND(**FLAT | {"patch_size": 8, "dims": (16,), "depths": (8,)}))
    torch.save({"state_dict": official(image, "head.fc")}, tmp_path / "image.pth")
    same = linescan.load_checkpoint(
        MambaND(**FLAT | {"patch_size": 8, "dims": (16,), "depths": (8,)}), tmp_path / "image.pth"
    )
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in image.state_dict().items())

    clips = shaken(MambaND3D(**SOLID | {"depth": 12}), seed=7)
    before = {k: v.clone() for k, v in clips.state_dict().items()}
    clips.load_pretrained(str(tmp_path / "image.pth"))
    for flat, solid in {0: 0, 3: 3, 4: 6, 7: 9}.items():
        assert torch.equal(clips.blocks[solid].mixer.A_log, image.stages[flat].blocks[0].mixer.A_log)
        assert torch.equal(clips.blocks[solid].norm1.weight, image.stages[flat].blocks[0].norm1.weight)
    for new in (4, 5, 10, 11):
        assert torch.equal(clips.blocks[new].mixer.D, before[f"blocks.{new}.mixer.D"])
    frame = noise(1, 3, 32, 32)
    nn.init.zeros_(clips.volume_pos_embed), nn.init.zeros_(image.pos_embed)
    still = clips.embed(frame[:, :, None].expand(-1, -1, 4, -1, -1))[0].unflatten(1, (2, 4, 4))
    assert torch.allclose(still[:, 1], image.embed(frame)[0], atol=1e-5), "a clip at rest looks as its image"


def test_files_of_clips_fit_other_frames_and_sizes():
    model = shaken(MambaND3D(**SOLID))
    state = official(model, "cls_head.fc_cls")
    for options, grid in (({"num_frames": 8}, (4, 4, 4)), ({"img_size": 64}, (2, 8, 8))):
        other = MambaND3D(**SOLID | options)
        got = other.checkpoint_filter(dict(state))["volume_pos_embed"]
        assert torch.allclose(got, resample_volume(model.volume_pos_embed, grid), atol=1e-6)
    with pytest.raises(ValueError, match="32 positions in the file are no frames of 5x5: give its img_size"):
        MambaND3D(**SOLID | {"img_size": 40, "num_frames": 2}).checkpoint_filter(dict(state))
    told = MambaND3D(**SOLID | {"img_size": 40, "num_frames": 2}).checkpoint_filter(dict(state), img_size=32)
    assert told["volume_pos_embed"].shape == (1, 1, 5, 5, 16)
    with pytest.raises(ValueError, match=r"num_frames \(5\) is a multiple of tubelet_size \(2\)"):
        MambaND3D(**SOLID | {"num_frames": 5})


def test_the_two_published_forms_of_clips():
    one = linescan.create_model("mamband_video_small_patch16_224.hmdb51", depth=1, device="meta")
    other = linescan.create_model("mamband_video_small_patch16_224.k400_f16", depth=1, device="meta")
    assert isinstance(one.fc_norm, nn.Identity) and one.head.weight.shape == (60, 384)
    assert other.fc_norm.eps == 1e-5 and other.head.weight.shape == (400, 384)
    assert tuple(one.volume_pos_embed.shape[1:4]) == tuple(other.volume_pos_embed.shape[1:4]) == (16, 14, 14)
    assert one.patch_embed.weight.shape[2:] == (2, 16, 16) and other.patch_embed.weight.shape[2:] == (1, 16, 16)


def test_features_by_default_are_the_last_three_layers():
    model = timm.create_model("mamband_small_patch16_224", features_only=True, depths=(4,))
    assert model.feature_info.out_indices == (1, 2, 3)
    assert [tuple(y.shape) for y in model(torch.zeros(1, 3, 64, 64))] == 3 * [(1, 384, 4, 4)]


def test_layers_of_an_interval_read_the_same_map():
    torch.manual_seed(0)
    flat = FLAT | dict(dims=16, depths=(5,))
    model, x = shaken(MambaND(**flat, update_interval=2)).eval(), noise(2, 3, 32, 32)
    plain = MambaND(**flat)
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 1] and len(model.feature_info) == 3
    layers = [block for stage in model.stages for block in stage.blocks]
    stream, _, _ = model.embed(x)
    for first in range(0, 5, 2):
        stream = stream + sum(layer.mixer(layer.norm1(stream)) for layer in layers[first : first + 2])
    assert torch.allclose(model.forward_features(x), model.norm(stream), atol=1e-6)
    layers = {key.replace("stages", "layers").replace(".blocks.0.", "."): v for key, v in plain.state_dict().items()}
    found = model.translate({key.replace("norm1", "norm"): v for key, v in layers.items() if "layers" in key})
    assert found.keys() == {key for key in model.state_dict() if key.startswith("stages")}
    for wrong in (dict(update_interval=0), dict(update_interval=2, depths=(4, 2))):
        with pytest.raises(InputError, match="update_interval"):
            MambaND(**flat | wrong)
