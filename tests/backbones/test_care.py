"""CARE beyond the contract and the golden data: its mixer by definition, its two classifiers, files and errors."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linescan
from linescan.backbones.care import CARE, CareMixer, MeanKeyAttention
from linescan.backbones.feature_maps import dense_backbone
from tests.parity import recipe

DATA = Path(recipe.__file__).parent / "data"
GOLDEN = dict(
    dims=(16, 32, 32, 64), depths=(1, 1, 2, 2), ratios=((2, 2), (2, 4), (4, 4), (4, 4)), head_dims=(4, 8)
)  # fmt: skip


def seeded(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def official():
    manifest = recipe.load_manifest(DATA / "care__tiny.json")
    return {k: torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}


def test_attention_divides_by_the_mean_key():
    layer = seeded(MeanKeyAttention(6, 3))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    q, k = (F.elu(y) + 1 for y in layer.qk(x.flatten(1, 2)).chunk(2, -1))
    for head in (slice(0, 3), slice(3, 6)):
        weights = q[..., head] @ k[..., head].mT / 15
        want = weights @ x.flatten(1, 2)[..., head] / (weights.sum(-1, keepdim=True) + 1e-6)
        assert torch.allclose(layer(x).flatten(1, 2)[..., head], want, rtol=1e-10, atol=1e-10)
    nn.init.zeros_(layer.qk.weight)
    layer.qk.bias.data = torch.tensor([5.0] * 6 + [-9.0] * 6)  # elu(-9) + 1 is 0 if computed in half precision
    ones = layer.half()(torch.ones(1, 2, 2, 6).half())
    assert ones.dtype == torch.float16 and torch.allclose(ones.float(), torch.ones(1, 2, 2, 6), atol=0.01)


def test_dropout_stands_before_each_classifier():
    model, dropped = seeded(CARE(num_classes=5, drop_rate=0.5, depths=(1, 1, 1, 1))), []
    model.head_drop.register_forward_hook(lambda layer, inputs, output: dropped.append(inputs[0]))
    features = torch.randn(2, 1, 1, model.num_features, dtype=torch.float64)
    model.forward_head(features)
    pooled = F.gelu(features[:, 0, 0])
    for got, norm in zip(dropped, (model.head_norm, model.dist_norm), strict=True):
        assert torch.allclose(got, norm(pooled))


@pytest.mark.parametrize("head_dim", [None, 2])
def test_the_mixer_keeps_a_memory_and_mixes_twice(head_dim):
    mixer = seeded(CareMixer(16, (2, 3), head_dim))
    x = torch.randn(2, 7, 6, 16, dtype=torch.float64)
    memory, wide, near, far = (y.movedim(-1, 1) for y in x.split(4, -1))

    def mlp(part, y):
        y = F.gelu(F.conv2d(part.norm[0](y), part.mlp.fc1.weight[..., None, None], part.mlp.fc1.bias))
        y = F.conv2d(y, part.mlp.dwconv.weight, part.mlp.dwconv.bias, padding=1, groups=y.shape[1])
        return F.conv2d(y, part.mlp.fc2.weight[..., None, None], part.mlp.fc2.bias)

    def conv(layer, y, *padding):
        return F.conv2d(y, layer.weight, layer.bias, padding=padding, groups=4)

    if head_dim is None:
        wide = conv(mixer.wide.column, wide, 5, 0) + conv(mixer.wide.row, wide, 0, 5)
    else:
        wide = mixer.wide(wide.movedim(1, -1)).movedim(-1, 1)
    new = torch.cat([wide, conv(mixer.local[0], near, 1, 1), conv(mixer.local[1], far, 3, 3)], 1)
    both = torch.cat([memory, new + mlp(mixer.inter1, new)], 1)
    assert torch.allclose(mixer(x), (both + mlp(mixer.inter2, both)).movedim(1, -1), rtol=1e-10, atol=1e-10)


def test_the_last_block_takes_the_place_of_the_stream():
    model = seeded(CARE(**GOLDEN, num_classes=3))
    last = model.stages[3].blocks[1]
    x = torch.randn(1, 2, 3, 64, dtype=torch.float64)
    assert last(x).shape == (1, 2, 3, 256) and torch.equal(last(x), last.mixer(x)) and last.scale1 is None
    assert not [name for name, _ in last.named_parameters() if "fc2" in name and "inter2" in name]
    block = model.stages[3].blocks[0]
    assert torch.equal(block(x), x + block.scale1.gamma * block.mixer(x))
    with pytest.raises(linescan.InputError, match="at least 32x32 pixels, got 31x64"):
        model(torch.zeros(1, 3, 31, 64))


def test_two_classifiers_and_what_training_gives(tmp_path):
    state = official()
    torch.save(state, tmp_path / "care.pth.tar")  # as published: the tensors, and nothing around them
    model = linescan.load_checkpoint(CARE(**GOLDEN, num_classes=10), tmp_path / "care.pth.tar").eval()
    model.set_distilled_training()
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(2, 3, 64, 96))
        pooled, pair = F.gelu(tokens.mean((1, 2))), []
        for name in ("head", "dist_head"):
            x = F.layer_norm(pooled, (256,), state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], 1e-6)
            pair.append(F.linear(x, state[f"{name}.fc.weight"], state[f"{name}.fc.bias"]))
        assert torch.allclose(model.forward_head(tokens), sum(pair) / 2, atol=1e-5)
        assert all(map(torch.allclose, model.train().forward_head(tokens), pair))
        model.set_distilled_training(False)
        assert torch.allclose(model.forward_head(tokens), sum(pair) / 2, atol=1e-5)


def test_a_file_for_other_classes_or_poolings_keeps_the_models_own_classifiers(tmp_path):
    torch.save({"state_dict": official()}, tmp_path / "care.pth.tar")
    model = CARE(**GOLDEN, num_classes=3)
    linescan.load_checkpoint(model, tmp_path / "care.pth.tar", adapt=True)
    assert torch.equal(model.head_norm.weight, official()["head.norm.weight"])
    assert model.head.weight.shape == model.dist_head.weight.shape == (3, 256)
    model.reset_classifier(4, "catavgmax")
    assert model.dist_norm.normalized_shape == (512,) and model(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    assert [layer.out_features for layer in model.get_classifier()] == [4, 4]
    linescan.load_checkpoint(CARE(**GOLDEN, num_classes=0), tmp_path / "care.pth.tar", adapt=True)
    dense = dense_backbone("care_s0", **GOLDEN)
    dropped, new = dense.load_pretrained(tmp_path / "care.pth.tar")
    assert {key.split(".")[1] for key in dropped} == {"head", "head_norm", "dist_head", "dist_norm"} and not new
    assert dense.out_channels == [16, 32, 32, 256]


def test_published_initialisation():
    torch.manual_seed(0)
    model = CARE(dims=(64, 128), depths=(1, 2), ratios=((4, 4), (4, 4)), head_dims=(8,))
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02) and not any(layer.bias.any() for layer in layers)
    assert torch.all(model.stages[1].blocks[0].scale1.gamma == 1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dims=(16, 32)), "dims gives 2 stages, depths 4"),
        (dict(dims=(66, 64, 128, 256)), "quarters: 66 is not a multiple of 4"),
        (dict(head_dims=(5, 8)), "head_dims divide a quarter of the channels: 32 is not a multiple of 5"),
        (dict(head_dims=(8,) * 5), "head_dims are for 5 of 4 stages"),
    ],
)
def test_impossible_models_are_refused_in_one_line(options, message):
    with pytest.raises(linescan.InputError, match=message):
        CARE(**options)
