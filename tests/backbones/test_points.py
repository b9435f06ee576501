"""Backbones of point clouds: what every registered one must do, and what makes each of them the one it is."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import linescan
from linescan.backbones.points.mamba3d import LocalNormPool
from linescan.backbones.points.pointmamba import in_turn
from linescan.engine.cards import measure_inputs
from linescan.errors import CheckpointError, InputError
from linescan.layers.points import Patches, chamfer, pack
from linescan.zoo import find, list_models

MODELS = list_models(task="point-classification")
KINDS = ("pointmamba_modelnet40", "pointmamba_old_modelnet40", "mamba3d_modelnet40")
SMALL = dict(embed_dim=32, depth=2, groups=16, group_size=8)


def small(name, **kwargs):
    torch.manual_seed(0)
    return linescan.create_model(name, **{**SMALL, **kwargs}).eval()


def clouds(batch=2, points=128, channels=3, seed=1):
    x = torch.randn(batch, points, channels, generator=torch.Generator().manual_seed(seed))
    return torch.cat([F.normalize(x[..., :3], dim=-1) * x[..., :1].abs().clamp(0.2, 1), x[..., 3:]], -1)


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_classifies_clouds_of_any_size(name):
    model = small(name, together=False) if "old" not in name else small(name)
    count = find(name).args.get("num_classes", 40)
    for points in (96, 200):
        x = clouds(3, points)
        logits = model(x)
        assert logits.shape == (3, count) and logits.isfinite().all()
        assert torch.equal(logits, model.forward_head(model.forward_features(x)))
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), logits)
        assert not torch.allclose(logits[0], logits[1])
        torch.testing.assert_close(model(model.group(x)), logits)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_padded_packed_and_alone_are_the_same(name):
    model = small(name, together=False) if "old" not in name else small(name)
    sizes = [128, 60, 97]
    x = clouds(3)
    logits = torch.cat([model(cloud[None, :n]) for cloud, n in zip(x, sizes)])
    torch.testing.assert_close(model(x, sizes), logits)
    torch.testing.assert_close(model(pack(x, sizes), sizes), logits)
    x[1, 60:] = float("nan")  # neither is what is no point
    torch.testing.assert_close(model(x), model(x, sizes) * torch.tensor([[1], [0], [0]]), atol=9, rtol=0)
    torch.testing.assert_close(model(x)[1], logits[1])


@pytest.mark.parametrize("name", KINDS)
def test_features_and_heads(name):
    model = small(name)
    x = clouds()
    whole, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(whole, model.forward_features(x))
    tokens = 16 * getattr(model, "copies", 1)
    assert [tuple(m.shape) for m in maps] == [(2, tokens, 32)] * 2
    assert torch.equal(maps[-1], model.patch_tokens(whole))
    early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(model.norm(early[0]), maps[0])
    assert [info["num_chs"] for info in model.feature_info] == [32, 32]
    assert all(dict(model.named_modules()).get(info["module"]) for info in model.feature_info)

    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier()[-1].out_features == 3
    pooled = model.forward_head(whole, pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), whole)
    with pytest.raises(InputError, match="global_pool"):
        model.reset_classifier(2, "median")
    assert model.prune_intermediate_layers([0]) == [0] and len(model.blocks) == 1


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_trained(name):
    """In training mode, with stochastic depth, recomputed activations, and other channels beside the coordinates."""
    model = small(name, in_chans=6, drop_path_rate=0.0, num_classes=4, drop_rate=0.0).train()
    x, gradients = clouds(4, channels=6), []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.momentum = 0.0
        F.cross_entropy(model(x), torch.arange(4)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(g.abs().sum() > 0 or n.endswith("0.bias") or "second_conv" in n for n, g in gradients[0].items())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    decayed = {n for n, p in model.named_parameters() if p.ndim > 1} - model.no_weight_decay()
    assert not any(word in n for n in decayed for word in ("dt_bias", "conv_bias", ".D", "order_", "cls_token"))
    assert any("A_log" in n for n in decayed) and any(n.endswith("in_proj.weight") for n in decayed)


@pytest.mark.parametrize("name", KINDS)
def test_weights_shapes_and_files(name, tmp_path):
    model = small(name, num_classes=5)
    path = tmp_path / "own.pth"
    torch.save({"base_model": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    other = linescan.load_checkpoint(small(name, num_classes=5, drop_path_rate=0.1), path)
    assert torch.equal(other(clouds()), model(clouds()))
    with pytest.raises(CheckpointError, match="head"):
        linescan.load_checkpoint(small(name, num_classes=7), path)
    assert linescan.load_checkpoint(small(name, num_classes=7), path, adapt=True).num_classes == 7
    with torch.device("meta"):
        meta = small(name)
    assert meta(torch.zeros(2, 64, 3, device="meta")).shape == (2, 40)
    assert measure_inputs(meta, [(64, 3)]) == measure_inputs(small(name), [(64, 3)])


@pytest.mark.parametrize("name", [pytest.param(KINDS[0], marks=pytest.mark.slow), *KINDS[1:]])
@torch.no_grad()
def test_exports_from_patches(name):
    """Sampling and grouping stay outside: what depends on values. Any number of clouds can be asked."""
    model = small(name)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (model.group(clouds()),), dynamic_shapes=(Patches(batch, batch, batch),))
    found = model.group(clouds(5, seed=2))
    torch.testing.assert_close(program.module()(found), model(found))


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_weights_of_half_precision(name):
    """Points may keep their precision, which decides what is near."""
    model, x = small(name, in_chans=4), clouds(channels=4)
    logits = model(x)
    model.bfloat16()
    assert model(x).dtype == torch.bfloat16 and model.forward_features(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x).float(), logits, atol=0.1 * logits.abs().max().item(), rtol=0)
    assert model(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_what_cannot_be_read_is_one_line(name):
    model = small(name)
    cls = type(model).__name__
    for bad, said in (
        (torch.zeros(2, 3, 128), r"expects clouds \(B, N, 3\).*got float32 \(2, 3, 128\)"),
        (torch.zeros(2, 64, 4), "got float32 .2, 64, 4"),
        (torch.zeros(2, 64, 3, dtype=torch.int64), "of floats; got int64"),
        (clouds(2, 7), "a cloud has 7 points, fewer than a group of 8"),
        (torch.full((1, 64, 3), float("nan")), "a cloud has 0 points"),
    ):
        with pytest.raises(InputError, match=f"{cls}.*{said}"):
            model(bad)
    for args, said in (
        (dict(groups=0), "groups is at least 1, not 0"),
        (dict(in_chans=2), "at least 3 channels"),
        (dict(sampling="random"), "sampling"),
        (dict(global_pool="token+token"), "global_pool"),
    ):
        with pytest.raises(InputError, match=said):
            small(name, **args)


# -- PointMamba -------------------------------------------------------------------------------------------------------


def test_copies_are_read_in_turn():
    tables = torch.tensor([[[2, 0, 1], [1, 2, 0]]])
    assert in_turn(tables).tolist() == [[[2, 0, 1, 4, 5, 3]]]


@torch.no_grad()
def test_a_large_mate_can_turn_the_curve():
    """The curve's depth is that of the batch, as published; with together=False each cloud keeps its own."""
    model = small("pointmamba_modelnet40")
    small_cloud, large = clouds(1), 3 * clouds(1, seed=2)
    alone = model.routes(model.group(small_cloud).centres)
    both = model.group(torch.cat([small_cloud, large])).centres
    assert not torch.equal(model.routes(both)[:1], alone)
    model.together = False
    assert torch.equal(model.routes(both)[:1], alone)


@torch.no_grad()
def test_a_patch_is_read_along_its_curve():
    """What comes later on a curve does not reach back; between the two copies it does."""
    model = small("pointmamba_modelnet40", global_pool="", num_classes=0).double()
    found = model.group(clouds(1).double())
    x, _, (route,) = model.embed(found)
    for step in (4, 15, 20):  # on the first curve, its end, on the second curve
        changed = x.clone()
        changed[0, route[0, 0, step]] += 1
        differs = model.run_unit(model.blocks[0], changed, (route,)) != model.run_unit(model.blocks[0], x, (route,))
        moved = differs.any(-1)[0][route[0, 0].long()]
        assert not moved[:step].any() and moved[step : step + 4].all()


# -- Mamba3D ----------------------------------------------------------------------------------------------------------


def test_local_pooling_is_the_formula():
    torch.manual_seed(0)
    pool = LocalNormPool(8, together=True)
    for p in (pool.weight, pool.bias):
        torch.nn.init.normal_(p)
    x, near = torch.randn(2, 6, 8), torch.randint(5, (2, 5, 3))
    features = x[:, 1:]
    more = torch.stack([features[b][near[b]] for b in range(2)]) - features[:, :, None]
    u = torch.cat([more / (more.std() + 1e-5), features[:, :, None].expand_as(more)], -1)
    u = u * pool.weight.flatten() + pool.bias.flatten()
    pooled = (u * u.exp()).sum(2) / u.exp().sum(2)
    expected = F.silu(pool.proj(pool.norm(pooled)))
    torch.testing.assert_close(pool(x, near), torch.cat([x[:, :1], expected], 1))
    assert pool(100 * x, near).isfinite().all()  # the original overflows


@torch.no_grad()
def test_mates_change_an_answer_only_as_published():
    model, x = small("mamba3d_modelnet40"), clouds(2)
    assert not torch.allclose(model(x)[:1], model(x[:1]))
    model = small("mamba3d_modelnet40", together=False)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


# -- whole networks ---------------------------------------------------------------------------------------------------


def segmenter(**kwargs):
    torch.manual_seed(0)
    args = dict(num_classes=5, num_categories=2, taps=(0, 1), widths=(32, 24, 16, 8), backbone_args=SMALL)
    return linescan.create_model("pointmamba_old_shapenetpart", **{**args, **kwargs}).eval()


@pytest.mark.parametrize("backbone", KINDS)
def test_segments_points(backbone):
    model = segmenter(backbone=backbone, neighbours=3, backbone_args={**SMALL, "in_chans": 6})
    if hasattr(model.trunk, "together"):
        model.trunk.together = False
        for module in model.modules():
            if isinstance(module, LocalNormPool):
                module.together = False
    x, category, sizes = clouds(2, channels=6), torch.tensor([0, 1]), [128, 70]
    with torch.no_grad():
        logits = model(x, category, sizes)
        assert logits.shape == (2, 128, 5) and logits[1, 70:].eq(0).all()
        torch.testing.assert_close(model(pack(x, sizes), category, sizes), pack(logits, sizes))
        torch.testing.assert_close(model(x[1:, :70], category[1:]), logits[1:, :70])
        torch.testing.assert_close(model(x, F.one_hot(category).float(), sizes), logits)
        assert not torch.allclose(model(x, 1 - category, sizes), logits)
    model.train()
    F.cross_entropy(model(x, category).flatten(0, 1), torch.arange(256) % 5).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError, match="which are not given"):
        model(x)
    with pytest.raises(InputError, match="from 0 to 1, got"):
        model(x, category + 1)


def test_segments_without_categories_and_starts_from_a_classifier(tmp_path):
    model = segmenter(num_categories=0)
    assert model(clouds()).shape == (2, 128, 5)
    classifier = small("pointmamba_old_modelnet40")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    linescan.load_checkpoint(model, tmp_path / "classifier.pth", adapt=True)
    own = model.trunk.state_dict()
    theirs = classifier.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    with pytest.raises(InputError, match="which vim_tiny_patch16_224 is not"):
        segmenter(backbone="vim_tiny_patch16_224", backbone_args={"depth": 1})
    with pytest.raises(InputError, match="class token at the end"):
        segmenter(backbone="pointmamba_modelnet40", backbone_args={**SMALL, "class_token": True})


def autoencoder(**kwargs):
    torch.manual_seed(0)
    return linescan.create_model("pointmamba_mae", backbone_args=SMALL, decoder_depth=1, **kwargs).eval()


@pytest.mark.parametrize("curve", [0, 1])
def test_hidden_patches_are_restored_from_the_visible(curve):
    model, x = autoencoder(), clouds()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    found = model.encoder.group(x)
    restored, target = model(found, noise, curve)
    assert restored.shape == target.shape == (2, 9, 8, 3)  # 0.6 * 16, rounded down
    order = model.encoder.routes(found.centres)[:, curve].long()
    hidden = noise.argsort(1, descending=True)[:, :9].sort(1).values
    rows = order.gather(1, hidden)
    assert torch.equal(target[0], found.points[0, rows[0]])
    changed = found._replace(points=found.points.clone())
    changed.points[0, rows[0, 0]] += 1
    torch.testing.assert_close(model(changed, noise, curve)[0], restored)  # hidden
    seen = [g for g in range(16) if g not in rows[0].tolist()]
    changed.points[0, seen[0]] += 1
    assert not torch.allclose(model(changed, noise, curve)[0][0], restored[0])
    model.train()
    chamfer(*(p.flatten(0, 1) for p in model(found, noise, curve))).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_blocks_are_hidden_together_and_wrong_ratios_refused():
    model, x = autoencoder(mask="block"), clouds(1)
    _, target = model(x, torch.rand(1, 16))
    found = model.encoder.group(x)
    hidden = [(found.points[0] == t).all(-1).all(-1).nonzero().item() for t in target[0]]
    distances = torch.cdist(found.centres[0], found.centres[0])
    assert any(set(distances[g].argsort()[:9].tolist()) == set(hidden) for g in hidden)
    for ratio in (0.05, 1.0):
        with pytest.raises(InputError, match="hides"):
            autoencoder(mask_ratio=ratio)
    with pytest.raises(InputError, match="which mamba3d_modelnet40 is not"):
        linescan.create_model("pointmamba_mae", backbone="mamba3d_modelnet40", backbone_args=SMALL)


def test_an_encoder_goes_from_pre_training_to_a_classifier(tmp_path):
    model = autoencoder()
    classifier = small("pointmamba_modelnet40", num_classes=4)
    state = {f"MAE_encoder.{k}": v for k, v in model.encoder.state_dict().items()}
    torch.save(state | {"mask_token": model.mask_token}, tmp_path / "mae.pth")
    linescan.load_checkpoint(classifier, tmp_path / "mae.pth", adapt=True)
    assert torch.equal(classifier.forward_features(clouds()), model.encoder.forward_features(clouds()))


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linescan.create_model("mamba3d_modelnet40").eval()(clouds(1, 1024))
    assert counter.get_total_flops() / 2e9 == pytest.approx(3.9, rel=0.1)  # as the paper says
