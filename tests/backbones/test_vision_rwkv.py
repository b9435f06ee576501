"""Vision-RWKV and ViT-Adapter beyond the contract and the golden data: parts by definition, files, initialisation."""

import pytest
import timm
import torch
from torch.nn import functional as F

import linescan
from linescan.backbones.feature_maps import dense_backbone
from linescan.backbones.vision_rwkv import VisionRWKV
from linescan.layers.adapter import MSDeformableAttention, deformable_attention, reference_points
from linescan.layers.rwkv import ChannelMix, Place, QuadShift, SpatialMix, SpatialMix6

TINY = dict(img_size=64, embed_dim=32, depth=4, num_classes=5)
ADAPTER = dict(type="adapter", num_heads=4, ratio=0.5, width=8)
DENSE = dict(model="vrwkv_tiny", img_size=64, embed_dim=32, depth=4, init_values=1.0, neck=ADAPTER)


def seeded(cls, *args, **kwargs):
    """A module of which no parameter stands at a constant."""
    torch.manual_seed(0)
    module = cls(*args, **kwargs).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# -- mixes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (5, 1), (1, 1)])
@pytest.mark.parametrize("heads, gamma, pixels, classes", [(1, 0.25, 1, 0), (2, 0.25, 1, 1), (1, 0.2, 2, 0)])
def test_quad_shift_reads_the_four_neighbours(grid, heads, gamma, pixels, classes):
    height, width = grid
    x = torch.randn(2, height * width + classes, 22)
    got = QuadShift(heads, gamma, pixels)(x, grid)
    assert torch.equal(got[:, height * width :], x[:, height * width :])
    steps = [(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)]
    per_head = 22 // heads
    for channel in range(22):
        ends = [int(per_head * gamma * k) for k in range(1, 5)]
        group = sum(channel % per_head >= end for end in ends)
        for row in range(height):
            for column in range(width):
                down, across = steps[group] if group < 4 else (0, 0)
                y, z = row + down, column + across
                inside = 0 <= y < height and 0 <= z < width
                want = x[:, y * width + z, channel] if inside else torch.zeros(2)
                assert torch.equal(got[:, row * width + column, channel], want)


@pytest.mark.parametrize("mix", [SpatialMix, SpatialMix6, ChannelMix])
def test_a_shift_that_is_observed_is_called(mix):
    mixer, seen = seeded(mix, 64, QuadShift(), Place(1, 3)), []
    mixer.shift.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        mixer(torch.randn(1, 6, 64), (2, 3))
    assert seen == [(1, 6, 64)]


def test_hidden_channels_that_somebody_sees_stay():
    mixer, seen = seeded(ChannelMix, 64, QuadShift(), Place(1, 3)), []
    mixer.key.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        mixer(torch.randn(1, 6, 64), (2, 3))
    assert (seen[0] < 0).any()


@pytest.mark.parametrize("mix", [SpatialMix, SpatialMix6, ChannelMix])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixes_without_a_gradient(mix, dtype):
    """Where kernels serve, and where they do not."""
    mixer = seeded(mix, 64, QuadShift(), Place(1, 3)).to(dtype)
    x = torch.randn(2, 13, 64).to(dtype)
    with torch.no_grad():
        got = mixer(x, (3, 4))
    want = mixer.double()(x.double(), (3, 4))
    assert got.dtype == dtype
    close = (1e-4, 1e-5) if dtype is torch.float32 else (0.05, 0.05)
    torch.testing.assert_close(got.double(), want.detach(), rtol=close[0], atol=close[1])


def test_spatial_mix_is_the_dense_sum_of_the_paper():
    grid, dim = (3, 4), 8
    mix = seeded(SpatialMix, dim, QuadShift(), Place(1, 3), key_norm=True).double()
    x = torch.randn(2, 12, dim, dtype=torch.float64)
    near = mix.shift(x, grid)
    k, v, r = (
        layer(m * x + (1 - m) * near)
        for layer, m in ((mix.key, mix.mix_k), (mix.value, mix.mix_v), (mix.receptance, mix.mix_r))
    )
    steps = (torch.arange(12)[:, None] - torch.arange(12)).abs()[..., None]
    exponent = torch.where(steps == 0, mix.first[0] / 12, -(steps - 1) * mix.decay[0] / 12)
    weights = torch.softmax(exponent + k[:, None], 2)
    want = mix.output(torch.sigmoid(r) * mix.key_norm((weights * v[:, None]).sum(2)))
    assert torch.allclose(mix(x, grid), want, rtol=1e-10, atol=1e-10)


def test_spatial_mix_of_version_6_token_by_token():
    grid, dim = (2, 3), 128
    mix = seeded(SpatialMix6, dim, QuadShift(2), Place(1, 3)).double()
    x = torch.randn(1, 6, dim, dtype=torch.float64)
    step = mix.shift(x, grid) - x
    low = torch.tanh((x + step * mix.mix_x) @ mix.mix_w1).split(32, -1)
    w, k, v, r, g = (x + step * (mix.mix[i] + low[i] @ mix.mix_w2[i]) for i in range(5))
    keep = torch.exp(-torch.exp(mix.decay + torch.tanh(w @ mix.decay_w1) @ mix.decay_w2))
    r, k, v, keep = (t[0].unflatten(-1, (2, 64)) for t in (mix.receptance(r), mix.key(k), mix.value(v), keep))
    rows = []
    for t in range(6):
        state = (mix.bonus * k[t])[..., None] * v[t][:, None]
        for j in range(6):
            if j != t:
                between = keep[min(j, t) + 1 : max(j, t)].prod(0)
                state = state + (between * k[j])[..., None] * v[j][:, None]
        rows.append((r[t][:, None] @ state).flatten())
    y = F.group_norm(torch.stack(rows), 2, mix.head_norm.weight, mix.head_norm.bias)
    want = mix.output(y * F.silu(mix.gate(g[0])))
    assert torch.allclose(mix(x, grid)[0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        dict(post_norm=True, key_norm=True, init_values=1.0, shift_gamma=0.2, shift_pixels=2),
        dict(version=6, embed_dim=64, class_token=True, key_norm=True),
    ],
)
def test_variants_run_at_any_size_and_every_parameter_matters(variant):
    model = seeded(VisionRWKV, **{**TINY, **variant})
    for size in ((64, 64), (70, 41)):
        x = torch.randn(2, 3, *size, requires_grad=True)
        model(x).square().sum().backward()
        assert x.grad[:, :, -1, -1].any(), "the last pixel counts where sides are padded"
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert all(m.shape == (2, model.embed_dim, -(-size[0] // 16), -(-size[1] // 16)) for m in maps)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_class_token_is_not_pooled():
    model = seeded(VisionRWKV, **{**TINY, "version": 6, "embed_dim": 64, "class_token": True})
    x = torch.randn(1, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == (1, 17, 64)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, :16].mean(1))


# -- adapter --------------------------------------------------------------------------------------------------------


def test_deformable_attention_reads_bilinearly_and_zero_outside():
    torch.manual_seed(0)
    grids = [(3, 5), (2, 2)]
    value = torch.randn(2, 19, 3, 4, dtype=torch.float64)
    locations = torch.rand(2, 6, 3, 2, 2, 2, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(2, 6, 3, 2, 2, dtype=torch.float64)
    got = deformable_attention(value, grids, locations, weights).unflatten(-1, (3, 4))
    maps = [m.unflatten(1, g) for m, g in zip(value.split([15, 4], 1), grids)]
    want = torch.zeros_like(got)
    for b, q, h, level, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        height, width = grids[level]
        x, y = (locations[b, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in range(height):
            for column in range(width):
                share = max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
                want[b, q, h] += share * weights[b, q, h, level, p] * maps[level][b, row, column, h]
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_reference_points_are_cell_centres_as_x_then_y():
    want = [[1 / 6, 0.25], [0.5, 0.25], [5 / 6, 0.25], [1 / 6, 0.75], [0.5, 0.75], [5 / 6, 0.75], [0.5, 0.5]]
    assert torch.allclose(reference_points([(2, 3), (1, 1)]), torch.tensor(want))


def test_attention_starts_with_equal_weights_in_every_direction():
    layer = MSDeformableAttention(8, num_heads=4, n_levels=2)
    assert torch.equal(layer.attention_weights(torch.randn(3, 8)), torch.zeros(3, 32))
    offsets = layer.sampling_offsets.bias.unflatten(0, (4, 2, 4, 2))
    want = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])[:, None] * torch.arange(1, 5)[:, None]
    assert torch.allclose(offsets, want[:, None].expand(4, 2, 4, 2), atol=1e-6)


@pytest.mark.parametrize("features", ["each", "last"])
def test_an_untrained_adapter_leaves_the_backbone_as_it_is(features):
    torch.manual_seed(0)
    model = dense_backbone(**DENSE | {"neck": ADAPTER | {"features": features}}).eval()
    x = torch.randn(1, 3, 96, 64)
    seen = []
    for interaction in model.neck.interactions:
        interaction.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    maps = model(x)
    assert [tuple(m.shape) for m in maps] == [(1, 32, 96 // s, 64 // s) for s in (4, 8, 16, 32)]
    for got, want in zip(seen, model.trunk.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")):
        assert torch.equal(got, want)


def test_adapters_pad_images_and_cut_the_maps():
    torch.manual_seed(0)
    model = seeded(dense_backbone, **DENSE)
    x = torch.randn(1, 3, 70, 41)
    with torch.no_grad():
        whole = model(F.pad(x, (0, 23, 0, 26)))
        maps = model(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(18, 11), (9, 6), (5, 3), (3, 2)]
    assert all(torch.equal(m, w[..., : m.shape[2], : m.shape[3]]) for m, w in zip(maps, whole))


def test_adapters_train_in_bfloat16():
    model = dense_backbone(drop_path_rate=0.2, **DENSE).train()
    model.set_grad_checkpointing()
    with torch.no_grad():
        for interaction in model.neck.interactions:
            interaction.injector.gamma.fill_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        sum(m.float().square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_adapters_start_from_classification_files_and_read_whole_segmentors(tmp_path):
    classifier = seeded(VisionRWKV, **TINY)
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in classifier.state_dict().items()}}, path)
    first = linescan.load_checkpoint(dense_backbone(**DENSE), path)
    assert torch.equal(first.trunk.blocks[3].mixer.decay, classifier.blocks[3].mixer.decay)
    assert torch.equal(first.trunk.blocks[3].scale1.gamma, torch.ones(32))

    own = seeded(dense_backbone, **DENSE).state_dict()
    segmentor = {f"backbone.{key.partition('.')[2]}": value for key, value in own.items()}
    torch.save({"state_dict": {**segmentor, "decode_head.conv_seg.weight": torch.zeros(3)}}, path)
    second = linescan.load_checkpoint(dense_backbone(**DENSE), path)
    assert torch.equal(second.neck.norm3.weight, segmentor["backbone.norm3.weight"])
    two = linescan.load_checkpoint(dense_backbone(out_indices=(1, 3), **DENSE), path)  # without the others' parts
    assert torch.equal(two.neck.norm4.weight, segmentor["backbone.norm4.weight"]) and two.neck.norm3 is None
    del segmentor["backbone.spm.fc1.bias"]
    torch.save({"state_dict": segmentor}, path)
    with pytest.raises(linescan.CheckpointError, match=r"1 keys missing \(first: neck.spm.fc1.bias\)"):
        linescan.load_checkpoint(second, path)


# -- classifier, initialisation, errors -----------------------------------------------------------------------------


def test_the_large_classifier_has_a_hidden_layer(tmp_path):
    model = timm.create_model("vrwkv_large", depth=2, embed_dim=32, num_classes=7)
    x = torch.randn(1, 3, 64, 64)
    assert model.head_inner[0].weight.shape == (3072, 32) and model.head.weight.shape == (7, 3072)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    want = model.head(torch.tanh(model.head_inner[0](pooled)))
    assert torch.allclose(model(x), want, atol=1e-6)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    options = dict(depth=2, embed_dim=32, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "model.pth")})
    other = timm.create_model("vrwkv_large", num_classes=3, **options)
    assert torch.equal(other.head_inner[0].weight, model.head_inner[0].weight) and other(x).shape == (1, 3)
    features = timm.create_model("vrwkv_large", num_classes=0, **options)
    assert torch.allclose(features(x), pooled, atol=1e-6)
    features.reset_classifier(4)
    assert features(x).shape == (1, 4)


def test_published_initialisation():
    torch.manual_seed(0)
    first, middle, last = timm.create_model("vrwkv_tiny", depth=3).blocks
    channel = torch.arange(192)
    for block, depth, left in ((first, 0.0, 1.0), (middle, 0.5, 2 / 3), (last, 1.0, 1 / 3)):
        mix = block.mixer
        assert torch.allclose(mix.decay[0], -5 + 8 * (channel / 191) ** (0.7 + 1.3 * depth))
        assert torch.allclose(mix.mix_k[0, 0], (channel / 192) ** left)
        assert torch.allclose(mix.mix_v - mix.mix_k, torch.tensor(0.3 * depth))
        assert torch.allclose(mix.mix_r[0, 0], (channel / 192) ** (0.5 * left))
        assert torch.allclose(block.mlp.mix_r, mix.mix_k)
        want = torch.tensor([0.3, 0.3, 0.3]).log() + torch.tensor([0.0, 0.5, -0.5])
        assert torch.allclose(mix.first[0, :3], want)
        assert mix.key.weight.std().item() == pytest.approx(0.02, rel=0.05)
    middle = timm.create_model("vrwkv6_tiny", depth=3).blocks[1].mixer
    assert torch.allclose(middle.mix[:3, 0, 48].flatten(), 1 - 0.25 ** (2 / 3) - torch.tensor([0, 0, 0.15]))
    assert torch.allclose(middle.mix[3:, 0, 48], torch.tensor(1 - 0.25 ** (1 / 3)))
    assert middle.decay[0, 0, 0] == -6 and middle.decay[0, 0, -1] == -1
    assert torch.allclose(middle.bonus[0, :3], 0.5 * (1 - channel[:3] / 191) + torch.tensor([0, 0.1, -0.1]))
    assert 0.9e-4 < middle.decay_w1.abs().max() <= 1e-4


def test_decay_treats_spatial_parameters_as_the_original_does():
    names = dict(VisionRWKV(**TINY).named_parameters())
    assert all(names[f"blocks.0.mixer.{n}"].ndim > 1 for n in ("decay", "first", "mix_k"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VisionRWKV(version=5), "version is one of 4, 6, not 5"),
        (lambda: VisionRWKV(version=6, embed_dim=96), "embed_dim is a multiple, not 96"),
        (lambda: dense_backbone("vrwkv_tiny", depth=6), "a depth that 4 divides"),
        (lambda: dense_backbone("vrwkv_tiny", neck=ADAPTER | {"features": "all"}), "features is one of 'each', 'last'"),
        (lambda: dense_backbone("vrwkv_tiny", neck=ADAPTER | {"heads": 2}), "neck 'adapter' does not take these"),
    ],
)
def test_impossible_models_and_inputs_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
