"""SegMAN's encoder beyond the contract and the golden data: its files, its bias at other sizes, its initialisation."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import linescan
from linescan.backbones.feature_maps import DenseBackbone
from linescan.backbones.segman import SegMANEncoder, pixel_rope
from linescan.layers.ss2d import MapScan
from tests.parity import recipe

DATA = Path(__file__).parents[1] / "parity" / "data"
SMALL = dict(
    img_size=64, num_classes=5, projection=24, dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4),
    windows=(5, 3, 3, 3), mlp_ratios=(2, 2, 2, 2.7),
)  # fmt: skip
GOLDEN = dict(
    img_size=96, num_classes=10, projection=40, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4),
    windows=(7, 5, 3, 3), mlp_ratios=(4, 4, 3.4, 3.4), init_layer_scale=(0, 0, 1e-6, 1e-6),
)  # fmt: skip


def official(stem="segman__tiny"):
    """Manifest and weights of the shrunken encoder, under the names of the published files."""
    manifest = json.loads((DATA / f"{stem}.json").read_text())
    state = {key: torch.from_numpy(value) for key, value in recipe.state_dict(manifest).items()}
    return manifest, state | {key: torch.tensor(value) for key, value in manifest["constants"].items()}


def test_the_average_of_the_weights_is_what_loads(tmp_path):
    _, average = official()
    file = {"epoch": 309, "state_dict": {k: v + 1 for k, v in average.items()}, "state_dict_ema": average}
    torch.save(file, tmp_path / "encoder.pth.tar")
    model = linescan.load_checkpoint(SegMANEncoder(**GOLDEN), tmp_path / "encoder.pth.tar")
    assert torch.equal(model.patch_embed[0].weight, average["patch_embed.0.weight"])
    assert torch.equal(model.head.weight, average["classifier.4.weight"][:, :, 0, 0])
    # and other models go on taking the plain weights
    assert linescan.read_state_dict(tmp_path / "encoder.pth.tar")["patch_embed.0.weight"].equal(
        average["patch_embed.0.weight"] + 1
    )


def test_a_dense_model_takes_the_encoder_of_either_file(tmp_path):
    _, state = official()
    torch.save({"state_dict_ema": state}, tmp_path / "encoder.pth")
    inner = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("classifier.")}
    torch.save({"state_dict": inner | {"decode_head.conv_seg.bias": torch.zeros(3)}}, tmp_path / "segmentor.pth")
    a, b = (
        linescan.load_checkpoint(DenseBackbone(SegMANEncoder(**GOLDEN | {"projection": 0})), tmp_path / name).eval()
        for name in ("encoder.pth", "segmentor.pth")
    )
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for one, other, stride in zip(a(x), b(x), (4, 8, 16, 32)):
            assert torch.equal(one, other) and one.shape[-2:] == (96 // stride, 128 // stride)


def test_a_classifier_without_projection_keeps_its_head(tmp_path):
    model = SegMANEncoder(**SMALL | {"projection": 0})
    torch.save(model.state_dict(), tmp_path / "own.pth")
    other = linescan.load_checkpoint(SegMANEncoder(**SMALL | {"projection": 0}), tmp_path / "own.pth")
    assert other.num_features == 32 and torch.equal(model.head.weight, other.head.weight)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("layers.2.blocks.0.token_mixer.ssm.Ds"), "missing .first: stages.1.blocks.0.mixer.ssm.D"),
    (lambda s: s.update({"layers.7.0.weight": torch.zeros(1)}), "unexpected"),
    (lambda s: s.update({"layers.0.blocks.0.token_mixer.ssm.A_logs": torch.zeros(60, 1)}), "another shape"),
    (lambda s: s.update({"layers.0.blocks.0.token_mixer.rpb.0": torch.zeros(1, 11, 11)}), "another shape"),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    _, state = official()
    change(state)
    torch.save({"state_dict_ema": state}, tmp_path / "file.pth")
    with pytest.raises(linescan.CheckpointError, match=message):
        linescan.load_checkpoint(SegMANEncoder(**GOLDEN), tmp_path / "file.pth")


def test_a_bias_for_another_size_is_resized_on_loading_as_it_is_in_use(tmp_path):
    _, state = official()
    torch.save({"state_dict_ema": state}, tmp_path / "file.pth")
    model = linescan.load_checkpoint(SegMANEncoder(**GOLDEN), tmp_path / "file.pth").eval()
    larger = SegMANEncoder(**GOLDEN | {"img_size": (128, 96)})
    assert larger.stages[3].blocks[0].mixer.global_bias.shape == (4, 12, 12)
    linescan.load_checkpoint(larger, tmp_path / "file.pth").eval()
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        assert torch.allclose(model(x), larger(x), atol=1e-5)


def test_rotary_frequencies_are_the_published_buffers():
    manifest, _ = official("segman__encoder_t")
    model = timm.create_model("segman_tiny")
    for i, stage in enumerate(model.stages):
        dim, heads = model.dims[i], stage.blocks[0].mixer.num_heads
        cos, sin = pixel_rope(torch.zeros(1, 2, 3, dim), heads)
        angle = np.array(manifest["constants"][f"layers.{2 * i}.rope.angle"])
        for row in range(2):
            for column in range(3):
                turns = np.concatenate([row * angle, column * angle])
                assert np.allclose(cos[row, column], np.cos(turns)) and np.allclose(sin[row, column], np.sin(turns))


@pytest.mark.parametrize("options", [
    dict(use_rpb=False),
    dict(ssm_ratio=2.0),
    dict(ssm_ratio=0.5, routes="snake, -snake"),
    dict(init_layer_scale=0.5),
])  # fmt: skip
def test_variants_run_at_odd_sizes_and_every_parameter_matters(options):
    torch.manual_seed(0)
    model = SegMANEncoder(**SMALL | options)
    for parameter in model.parameters():  # away from what starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    logits = model(torch.randn(2, 3, 71, 97))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_published_sizes_need_193_pixels_and_smaller_ones_say_so():
    model = timm.create_model("segman_tiny", depths=(1, 1, 1, 1)).eval()
    assert model.min_size == 193
    with torch.no_grad():
        assert model(torch.randn(1, 3, 193, 200)).shape == (1, 1000)
    with pytest.raises(ValueError, match="at least 193x193 pixels, got 192x224"):
        model(torch.randn(1, 3, 192, 224))
    assert SegMANEncoder(**SMALL).min_size == 65  # a window of 3 at stride 32


def test_the_scan_sees_every_position_from_four_sides():
    torch.manual_seed(0)
    scan = MapScan(8)
    x = torch.randn(1, 4, 5, 8)
    y = x.clone()
    y[:, 1, 2] += 1
    with torch.no_grad():
        assert bool((scan(x) != scan(y)).any(-1).all())


def test_published_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("segman_base", depths=(1, 1, 1, 1))
    block = model.stages[2].blocks[0]
    assert abs(block.mixer.qkv.weight.std().item() - 0.02) < 1e-3 and not block.mixer.qkv.bias.any()
    assert torch.all(block.scale1.weight == 1e-6) and not block.scale2.bias.any()
    assert not block.mixer.local_bias.any() and not model.stages[3].blocks[0].mixer.global_bias.any()
    assert not block.mixer.ssm.A_log.any() and torch.all(block.mixer.ssm.D == 1)
    steps = torch.nn.functional.softplus(block.mixer.ssm.dt_bias)
    assert 0.9e-3 < steps.min() and steps.max() < 0.11
    assert model.patch_embed[0].weight.abs().max() > 0 and abs(model.head.weight.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize("kwargs, message", [
    (dict(windows=(5, 4, 3, 1)), "windows are odd, got 4"),
    (dict(windows=(5, 3, 3)), "windows gives 3 stages, depths 4"),
    (dict(num_heads=(1, 3, 2, 4)), "16 channels do not divide into 3 heads"),
    (dict(init_layer_scale=(1e-6,)), "init_layer_scale gives 1 stages"),
])  # fmt: skip
def test_wrong_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SegMANEncoder(**SMALL | kwargs)
