"""Blocks and stages: what they compute, and what acts on them."""

from functools import partial

import torch
from timm.layers import LayerScale
from torch import nn

from linescan.layers.blocks import Block, Stage
from linescan.layers.mlp import ConvMlp, GatedMlp, Mlp
from linescan.layers.ss2d import SS2D
from linescan.layers.stems import ConvDownsample, depthwise


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
