"""ViG beyond the contract and the golden data: its mixer by definition, variants, files and initialisation."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import linescan
from linescan import CheckpointError
from linescan.backbones.feature_maps import DenseBackbone
from linescan.backbones.vig import HierViG, ViG
from linescan.layers.gla import BiGLA

PLAIN = dict(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5)
HIERARCHICAL = dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))


def seeded(cls, *args, **kwargs):
    """A module of which no parameter stands at a constant."""
    torch.manual_seed(0)
    module = cls(*args, **kwargs).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def test_the_mixer_is_the_pairwise_sum_of_the_paper():
    mixer = seeded(BiGLA, 16, 2, conv_act=True, out_act=True).double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    local = F.silu(mixer.conv(x)).flatten(1, 2)
    q, k, v = (t.unflatten(-1, (2, -1)) for t in mixer.qkv(local).split((8, 8, 16), -1))
    ahead, back = (F.logsigmoid(mixer.forget(local)) / 16).unflatten(-1, (2, 2, 4)).unbind(2)
    through, before = ahead.cumsum(1), back.cumsum(1) - back
    past = torch.ones(15, 15, dtype=torch.float64).tril()[..., None, None]
    decay = past * (through[:, :, None] - through[:, None]).exp()  # gates over (j, t]
    decay = decay + past.transpose(0, 1) * (before[:, None] - before[:, :, None]).exp()  # over [t, j)
    mixed = torch.einsum("bthc,bjhc,btjhc,bjhd->bthd", q, k, decay, v) * 4**-0.5 / 2
    gate = torch.sigmoid(mixer.gate(local)).unflatten(-1, (2, 8))
    blend = gate * mixer.norm(mixed) + (1 - gate) * mixer.local_norm(local.unflatten(-1, (2, 8)))
    want = mixer.proj(F.silu(blend).flatten(2)).unflatten(1, (3, 5))
    assert torch.allclose(mixer(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "cls, variant",
    [
        (ViG, {}),
        (ViG, dict(scan="zigzag", gated_mlp=False, conv_bias=True, init_values=1.0)),
        (HierViG, {}),
        (HierViG, dict(downsample="merge", gated_mlp=False, conv_bias=True, conv_act=True, out_act=True)),
    ],
)
def test_variants_run_at_any_size_and_every_parameter_matters(cls, variant):
    model = seeded(cls, **(PLAIN if cls is ViG else HIERARCHICAL), **variant)
    for size in ((64, 64), (72, 41)):
        model(torch.randn(2, 3, *size)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_zigzag_reads_odd_rows_backwards_and_gives_maps_in_their_place():
    model = seeded(ViG, scan="zigzag", **PLAIN)
    x = torch.randn(1, 3, 64, 64)
    turned = model.patch_embed(x)
    turned[:, 1::2] = turned[:, 1::2].flip(2)
    tokens, _, _ = model.embed(x)
    assert torch.equal(tokens, turned + model.pos_embed)
    want = model.blocks[0](tokens)
    want[:, 1::2] = want[:, 1::2].flip(2)
    got = model.forward_intermediates(x, [0], intermediates_only=True)[0]
    assert torch.equal(got, want.permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (225, 31), (7, 100)])
def test_the_grid_of_an_image_is_known_ahead(size):
    model = ViG(**PLAIN)
    assert model.patch_embed(torch.randn(1, 3, *size)).shape[1:3] == model.grid_of(*size)
    maps = HierViG(**HIERARCHICAL).forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    assert [m.shape[2:] for m in maps] == [tuple(-(-n // 2 ** (i + 2)) for n in size) for i in range(4)]


def test_a_dense_backbone_starts_from_a_classification_file(tmp_path):
    classifier = seeded(HierViG, **HIERARCHICAL)
    torch.save({"model": classifier.state_dict()}, tmp_path / "model.pth")
    dense = DenseBackbone(HierViG(num_classes=0, **HIERARCHICAL), (1, 3), norms="each")
    linescan.load_checkpoint(dense, tmp_path / "model.pth").eval()
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        maps = classifier.forward_intermediates(x, [1, 3], intermediates_only=True)
        for got, want in zip(dense(x), maps):
            want = F.layer_norm(want.permute(0, 2, 3, 1), want.shape[1:2]).permute(0, 3, 1, 2)
            assert torch.allclose(got, want, atol=1e-5)


def test_files_load_strictly_and_positions_are_resampled(tmp_path):
    state = seeded(ViG, **PLAIN).state_dict()
    path = tmp_path / "model.pth"
    torch.save(state, path)
    other = linescan.load_checkpoint(ViG(**{**PLAIN, "img_size": (96, 64)}), path)
    want = F.interpolate(state["pos_embed"].permute(0, 3, 1, 2), (6, 4), mode="bicubic")
    assert torch.allclose(other.pos_embed, want.permute(0, 2, 3, 1))
    torch.save({**state, "blocks.0.attn.extra": state["norm.weight"]}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(first: blocks.0.mixer.extra\)"):
        linescan.load_checkpoint(ViG(**PLAIN), path)
    del state["blocks.1.mixer.gate.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 keys missing \(first: blocks.1.mixer.gate.bias\)"):
        linescan.load_checkpoint(ViG(**PLAIN), path)


def test_published_initialisation():
    torch.manual_seed(0)
    plain, hierarchical = timm.create_model("vig_tiny", depth=1), timm.create_model("vig_h_tiny", depths=(1, 1, 1, 1))

    def xavier(fan):
        return 2**-2.5 * math.sqrt(6 / fan)

    mixer = plain.blocks[0].mixer
    for weight, bound in ((mixer.qkv.weight, xavier(192 + 384)), (mixer.conv.weight, xavier(9 + 9 * 192))):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert plain.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert plain.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    decay = torch.exp(F.logsigmoid(mixer.forget[1].bias) / 16)
    assert torch.allclose(decay, torch.tensor(0.5 ** (1 / 16)))

    mixer = hierarchical.stages[3].blocks[0].mixer
    assert mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.conv.weight.abs().max() <= xavier(9 + 9 * 768)
    biases = [m.bias for m in hierarchical.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    assert len(biases) == 9 and not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ViG(scan="spiral"), "scan is one of 'row', 'zigzag', not 'spiral'"),
        (lambda: ViG(embed_dim=192, num_heads=5), "num_heads has to divide dim 192 and the keys' 96, got 5"),
        (lambda: HierViG(downsample="pool"), "downsample is one of 'conv', 'merge', not 'pool'"),
        (lambda: HierViG(depths=(1, 1)), "are for the same stages"),
    ],
)
def test_impossible_models_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
