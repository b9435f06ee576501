"""RWKV-SAM's encoder beyond the contract and the golden data: stages, sizes, initialisation."""

import pytest
import timm
import torch
from torch.nn import functional as F

import linescan
from linescan.backbones.rwkvsam import RWKVSAM, MBConv

TINY = dict(num_classes=0, dims=(8, 16, 32), depths=(1, 1, 2))


def test_a_block_of_convolutions_by_definition():
    torch.manual_seed(0)
    block, x = MBConv(4, 6, 2).double(), torch.randn(2, 7, 10, 4, dtype=torch.float64)
    y = F.gelu(F.linear(F.layer_norm(x, (4,), eps=1e-6), block.mixer.expand.weight, block.mixer.expand.bias))
    y = F.conv2d(y.movedim(-1, 1), block.mixer.conv.weight, block.mixer.conv.bias, 2, 1, groups=24).movedim(1, -1)
    y = block.mixer.project(F.gelu(y))
    ones = torch.ones(1, 1, 7, 10, dtype=torch.float64)
    mean = F.avg_pool2d(x.movedim(-1, 1), 3, 2, 1) / F.avg_pool2d(ones, 3, 2, 1)  # pixels outside do not count
    assert torch.allclose(block(x), block.shortcut.expand(mean.movedim(1, -1)) + y, atol=1e-12)
    plain = MBConv(4, 4, 1).double()
    assert torch.equal(plain(x), x + plain.mixer(plain.norm1(x)))


def test_sizes_positions_and_a_fourth_stage():
    torch.manual_seed(0)
    model = RWKVSAM(**{**TINY, "depths": (1, 1, 2, 1)}, pos_embed=True, img_size=(32, 48)).eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        for y, stride, dim in zip(maps, (4, 8, 16, 32), (8, 16, 32, 64)):
            assert y.shape == (1, dim, -(-65 // stride), -(-97 // stride))
        assert maps[2].mean(1).abs().max() < 1e-5, "the third map is normed"
        assert model.native_grid == (2, 3)
        model.pos_embed[:, 0, 0] += 1 + torch.randn(32)
        moved = model.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(moved[1], maps[1]) and not torch.allclose(moved[2], maps[2], atol=1e-3)
    features = timm.create_model("rwkvsam_tiny", depths=(1, 1, 1), features_only=True)
    assert features.feature_info.reduction() == [4, 8, 16] and features.feature_info.channels() == [32, 64, 192]
    for wrong in ({"depths": (1, 1)}, {"dims": (8, 16)}, {"depths": (1, 0, 1)}):
        with pytest.raises(linescan.InputError, match="of 3 stages and depths of 3 or 4"):
            RWKVSAM(**{**TINY, **wrong})


def test_the_kernel_departs_a_little_from_the_equation():
    torch.manual_seed(0)
    equation = RWKVSAM(**TINY).eval()
    kernel = RWKVSAM(**TINY, kernel=True).eval()
    kernel.load_state_dict(equation.state_dict())
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        a, b = equation.forward_features(x), kernel.forward_features(x)
    assert 0 < (a - b).abs().max() < 1e-2 * a.abs().max()


def test_published_initialisation():
    blocks = RWKVSAM(num_classes=0, dims=(8, 16, 32), depths=(1, 1, 4)).stages[2].blocks
    share = torch.arange(32) / 32
    for i, block in enumerate(blocks):
        near = share ** (1 - i / 4)
        assert torch.allclose(block.mixer.mix_k[0, 0], near) and torch.allclose(block.mlp.mix_r[0, 0], near)
        assert torch.allclose(block.mixer.mix_v[0, 0], near + 0.3 * i / 3)
        decay = -5 + 8 * (torch.arange(32) / 31) ** (0.7 + 1.3 * i / 3)
        assert torch.allclose(block.mixer.decay[0], decay)
        assert torch.all(block.scale1.gamma == 0.01) and block.norm1.eps == 1e-6
    RWKVSAM(num_classes=0, dims=(8, 16, 32), depths=(1, 1, 1))
