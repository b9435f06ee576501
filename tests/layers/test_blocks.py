"""Blocks and stages: what they compute, and what acts on them."""

from functools import partial

import pytest
import torch
from timm.layers import LayerScale
from torch import nn

from linescan.layers.blocks import Block, Stage
from linescan.layers.mlp import ConvMlp, GatedMlp, Mlp
from linescan.layers.pos_embed import axial_rope, rotate_pairs
from linescan.layers.ss2d import SS2D
from linescan.layers.stems import ConvDownsample, ImageStem, depthwise, plus_depthwise


def block(**kwargs):
    torch.manual_seed(0)
    made = Block(8, SS2D(8, "row", d_state=2), Mlp(8, 16), **kwargs)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def test_a_block_adds_its_branches():
    x = torch.randn(2, 3, 4, 8)
    plain = block()
    mixed = plain.mixer(plain.norm1(x))
    after = x + mixed
    want = after + plain.mlp(plain.norm2(after))
    assert torch.allclose(plain(x), want, atol=1e-6)
    got, branch = plain(x, with_mixed=True)
    assert torch.equal(got, plain(x)) and torch.allclose(branch, mixed, atol=1e-6)
    plain.without_mlp()
    assert torch.allclose(plain(x), after, atol=1e-6)
    assert {name.partition(".")[0] for name, _ in plain.named_parameters()} == {"norm1", "mixer"}

    full = block(scale_layer=partial(LayerScale, init_values=0.5), cpe_layer=partial(depthwise, kernel_size=3))
    first = x + full.cpe1(x)
    first = first + full.scale1(full.mixer(full.norm1(first)))
    second = first + full.cpe2(first)
    want = second + full.scale2(full.mlp(full.norm2(second)))
    assert torch.allclose(full(x), want, atol=1e-5)


def test_a_stage_downsamples_then_runs_its_blocks():
    torch.manual_seed(0)
    stage, x = Stage(ConvDownsample(4, 8), [block(), block()]), torch.randn(1, 6, 8, 4)
    want = stage.blocks[1](stage.blocks[0](stage.downsample(x)))
    assert torch.equal(stage(x), want) and want.shape == (1, 3, 4, 8)
    first = Stage(None, [block()])
    assert torch.equal(first(want), first.blocks[0](want))


def test_a_context_is_made_once_and_read_by_all_blocks():
    class Reads(nn.Module):
        def forward(self, x, table):
            seen.append(table)
            return x + table

    class Tabled(Stage):
        def context(self, x):
            return (x.mean(),)

    seen = []
    stage, x = Tabled(None, [Reads(), Reads()]), torch.randn(3)
    for checkpointing in (False, True):
        stage.grad_checkpointing = checkpointing
        assert torch.equal(stage(x.requires_grad_()), x + x.mean() + x.mean())
    assert len(seen) == 4 and seen[0] is seen[1]


def test_mlps():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8)
    gated = GatedMlp(8, 6, nn.SiLU, bias=False)
    a, b = gated.fc1(x).chunk(2, -1)
    assert torch.allclose(gated(x), gated.fc2(a * nn.functional.silu(b)), atol=1e-6)
    gated.gate_first = True
    assert torch.allclose(gated(x), gated.fc2(nn.functional.silu(a) * b), atol=1e-6)
    conv = ConvMlp(8, 6)
    y = nn.functional.gelu(conv.fc1(x))
    want = conv.fc2(y + conv.dwconv(y))
    assert torch.allclose(conv(x), want, atol=1e-6)
    dropping = Mlp(8, 512, drop=0.5).train()
    assert not torch.equal(dropping(x), dropping(x)) and torch.equal(dropping.eval()(x), dropping(x))


@pytest.mark.parametrize("side, dilation", [(1, 1), ((3, 5), 1), (3, 2)])
def test_a_depthwise_convolution_takes_its_input_along(side, dilation):
    conv, x = depthwise(6, side, dilation=dilation), torch.randn(2, 7, 8, 6, requires_grad=True)
    got, want = plus_depthwise(conv, x), x + conv(x)
    assert torch.allclose(got, want, atol=1e-6) and got.grad_fn.name() != want.grad_fn.name()
    leaves, upstream = (x, conv.weight, conv.bias), torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want))):
        assert torch.allclose(a, b, atol=1e-4)


def test_what_is_observed_replaced_or_half_is_called():
    conv, x, seen = depthwise(6, 3), torch.randn(1, 4, 4, 6), []
    want = x + conv(x)
    handle = conv.register_forward_hook(lambda *args: seen.append(args))
    assert torch.equal(plus_depthwise(conv, x), want) and len(seen) == 1
    handle.remove()
    assert torch.equal(plus_depthwise(nn.Identity(), x), 2 * x)
    half, y = conv.bfloat16(), x.bfloat16()
    assert torch.equal(plus_depthwise(half, y), y + half(y))


def test_rotations_in_one_pass():
    cos, sin = (table.unsqueeze(2) for table in axial_rope(torch.arange(3.0), torch.arange(4.0), torch.rand(4)))
    x = torch.randn(2, 3, 4, 51)[..., 1:49].unflatten(-1, (3, 16)).requires_grad_()  # pairs that begin at odd places
    a, b = x[..., ::2], x[..., 1::2]
    c, s = cos[..., ::2], sin[..., ::2]
    want = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    in_torch = torch.func.vmap(lambda x: rotate_pairs(x, cos, sin))(x)
    with torch.no_grad():
        by_kernel = rotate_pairs(x, cos, sin)
        assert torch.allclose(rotate_pairs(x[..., 1, :], cos[:, :, 0], sin[:, :, 0]), want[..., 1, :], atol=1e-6)
        assert torch.allclose(rotate_pairs(x, cos[:, :1], sin[:, :1])[:, :, 0], want[:, :, 0], atol=1e-6)
    for got in (rotate_pairs(x, cos, sin), by_kernel, in_torch, rotate_pairs(x.double(), cos, sin)):
        assert torch.allclose(got.float(), want, atol=1e-6)
    upstream = torch.randn_like(want)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (rotate_pairs(x, cos, sin), want)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_stem_makes_maps_as_the_next_layers_read_them():
    stem, x = ImageStem(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU()).eval(), torch.randn(2, 3, 9, 12)
    got, want = stem(x), nn.Sequential(*stem)(x).permute(0, 2, 3, 1)
    assert got.is_contiguous() and not want.is_contiguous() and torch.allclose(got, want, atol=1e-6)
