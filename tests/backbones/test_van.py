"""VAN beyond the contract and the golden data: its mixer by definition, its files, sizes and initialisation."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import linescan
from linescan.backbones.feature_maps import dense_backbone
from linescan.backbones.van import VAN, LargeKernelAttention
from tests.parity import recipe

DATA = Path(recipe.__file__).parent / "data"
GOLDEN = dict(num_classes=10, dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2))


def test_the_mixer_gates_by_three_convolutions_and_adds_its_input():
    torch.manual_seed(0)
    mixer = LargeKernelAttention(6).double()
    x = torch.randn(2, 30, 33, 6, dtype=torch.float64)
    y = F.gelu(mixer.proj1(x))
    gate = F.conv2d(y.movedim(-1, 1), mixer.conv.weight, mixer.conv.bias, padding=2, groups=6)
    gate = F.conv2d(gate, mixer.dilated.weight, mixer.dilated.bias, padding=9, dilation=3, groups=6).movedim(1, -1)
    want = mixer.proj2(y * mixer.gate(gate)) + x
    assert torch.allclose(mixer(x), want, rtol=1e-12, atol=1e-12)
    pixel = torch.zeros(1, 41, 41, 6, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(mixer.dilated(mixer.conv(pixel))[0, 20, 20].sum(), pixel)
    rows, columns = seen[0].abs().sum(-1).nonzero().unbind(1)
    assert rows.min() == columns.min() == 20 - 11 and rows.max() == columns.max() == 20 + 11


def test_every_stage_ends_with_its_norm_which_the_next_one_reads(tmp_path):
    manifest = recipe.load_manifest(DATA / "van__tiny.json")
    official = {k: torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}
    torch.save({"state_dict": official, "epoch": 309}, tmp_path / "van.pth.tar")
    model = linescan.load_checkpoint(VAN(**GOLDEN), tmp_path / "van.pth.tar").eval()
    assert torch.equal(model.stages[2].norm.weight, official["norm3.weight"])
    assert torch.equal(model.stages[1].downsample[1].running_var, official["patch_embed2.norm.running_var"])
    # The authors' segmentors keep the same names below "backbone.", without the classifier.
    inner = {f"backbone.{k}": v for k, v in official.items() if not k.startswith("head.")}
    torch.save({"state_dict": inner | {"decode_head.conv_seg.bias": torch.zeros(3)}}, tmp_path / "segmentor.pth")
    dense = linescan.load_checkpoint(dense_backbone("van_b0", **GOLDEN), tmp_path / "segmentor.pth").eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert all(map(torch.equal, maps, dense(x)))
        assert torch.allclose(model.forward_features(x), maps[-1].movedim(1, -1))
    for y, stage, stride in zip(maps, model.stages, (4, 8, 16, 32)):
        assert y.shape[-2:] == (-(-65 // stride), -(-97 // stride))
        plain = (y.movedim(1, -1) - stage.norm.bias) / stage.norm.weight
        assert plain.mean(-1).abs().max() < 1e-4 and torch.allclose(plain.var(-1, correction=0).mean(), torch.ones(()))
    del official["norm2.weight"]
    torch.save(official, tmp_path / "van.pth.tar")
    with pytest.raises(linescan.CheckpointError, match=r"1 keys missing \(first: stages.1.norm.weight\)"):
        linescan.load_checkpoint(model, tmp_path / "van.pth.tar")


def test_published_initialisation():
    torch.manual_seed(0)
    model = VAN(dims=(64, 64), depths=(1, 1), mlp_ratios=(8, 4))
    block = model.stages[0].blocks[0]
    for layer, reached in (
        (model.patch_embed[0], 49 * 64), (block.mixer.conv, 25), (block.mixer.dilated, 49), (block.mixer.proj1, 64),
        (block.mlp.fc1, 512), (block.mlp.dwconv, 9), (model.stages[1].downsample[0], 9 * 64),
    ):  # fmt: skip
        assert layer.weight.std().item() == pytest.approx((2 / reached) ** 0.5, rel=0.06)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert torch.all(block.scale1.gamma == 0.01) and torch.all(block.scale2.gamma == 0.01)
    assert model.stages[0].norm.eps == 1e-6 and block.norm1[0].eps == 1e-5


def test_images_are_normalised_as_the_authors_train():
    for name in linescan.list_models("van_b*"):
        how = timm.get_pretrained_cfg(name)
        assert how.mean == how.std == (0.5, 0.5, 0.5) and how.crop_pct == 0.9


def test_dropout_in_the_mlps_and_stages_of_other_counts():
    model = VAN(**GOLDEN, proj_drop_rate=0.5)
    assert {block.mlp.drop.p for stage in model.stages for block in stage.blocks} == {0.5} and model.head_drop.p == 0
    with pytest.raises(linescan.InputError, match="are for the same stages"):
        VAN(dims=(8, 16))
