"""timm's contract, held against every registered linescan model.

Models are built with one or two blocks a stage, and less wide where they are wide (`small`), so that all of them fit a
test run; the full-size models are held against golden data in tests/parity. Of models that differ in their size
alone, the narrowest is held against what takes time (`DISTINCT`); what is the same for all models of a class, against
its narrowest (`KINDS`).
"""

import math
from collections import Counter
from contextlib import nullcontext
from functools import cache
from inspect import signature

import pytest
import timm
import timm.optim
import torch
from timm.layers import get_graph_node_names
from timm.models import group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import linescan
from linescan.backbones.contract import architecture
from linescan.scans import visits
from linescan.zoo import list_models

from ..building import uninitialised
from .test_distributed import options

MODELS = list_models(task="classification")
FAMILIES = sorted({timm.model_entrypoint(m).__module__.rpartition(".")[2] for m in MODELS})
POOLS = {
    "avg": lambda x: x.mean(1),
    "fast": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "fastmax": lambda x: x.amax(1),
    "avgmax": lambda x: (x.mean(1) + x.amax(1)) / 2,
    "catavgmax": lambda x: torch.cat([x.mean(1), x.amax(1)], 1),
}


def family(name):
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def narrow(name):
    """Arguments for a half, a quarter or an eighth of the registered width, where a model is wide."""
    if name.startswith("segman"):  # whose heads do not divide narrower maps, and whose windows need large ones
        return {"windows": (3, 3, 3, 1)}
    factor = 1
    while parameters(name)[1] > 2.5e6 * factor**2 and name != "care_s2":  # as segman's
        factor *= 2
    if factor == 1:
        return {}
    cls, args = architecture(name)
    width = "dims" if "dims" in signature(cls).parameters else "embed_dim"
    now = args.get(width, signature(cls).parameters[width].default)
    return {width: now // factor if isinstance(now, int) else tuple([n // factor for n in now])}


def small(name, registered=False, **kwargs):
    """A shallow copy of a registered model, `narrow` unless it is to have its own width; clips have two frames."""
    torch.manual_seed(0)
    if "_video_" in name:
        kwargs = {"num_frames": 2, **kwargs}
    if not registered:
        kwargs = {**narrow(name), **kwargs}
    for shallow in ({"depth": 2}, {"depths": (1, 1, 1, 1)}):
        try:
            with uninitialised() if kwargs.get("device") == "meta" else nullcontext():
                return timm.create_model(name, **{**shallow, **kwargs})
        except TypeError as error:
            if "depth" not in str(error):
                raise
    raise AssertionError(f"{name} takes neither depth nor depths")


@cache
def parameters(name):
    model = small(name, registered=True, device="meta")
    return type(model).__name__, sum(p.numel() for p in model.parameters())


def one_of_each_kind():
    """The narrowest model of each class of each family, and those with parts of their own."""
    kinds = {}
    for name in MODELS:
        cls, size = parameters(name)
        key = family(name), cls, name.split("_")[0]
        kinds[key] = min(kinds.get(key, (size, name)), (size, name))
    extra = {"local_vim_tiny_middle_cls_token", "vmamba_tiny_s1l8", "vim_tiny_patch16_stride8_224"}
    return sorted({name for _, name in kinds.values()} | extra)


KINDS = one_of_each_kind()


def one_of_each_variant():
    """The narrowest of the models that differ in more than their depth and width."""
    size = {"depth", "depths", "dims", "stem_dim", "embed_dim", "num_heads", "num_classes", "img_size", "directions"}
    variants = {}
    for name in MODELS:
        cls, args = architecture(name)
        key = cls, repr(sorted((key, value) for key, value in args.items() if key not in size))
        variants[key] = min(variants.get(key, (parameters(name)[1], name)), (parameters(name)[1], name))
    return sorted({name for _, name in variants.values()} | set(KINDS))


DISTINCT = one_of_each_variant()


def image(model, *size, channels=3, batch=1):
    """Images, or clips of as many frames as the model is built for; larger ones where 64 pixels are too few for it."""
    model = getattr(model, "model", model)
    frames = getattr(model, "num_frames", 0)
    size = [math.ceil(n * max(1, model.min_size / 64)) for n in size]
    shape = (batch, channels, frames, *size) if frames else (batch, channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def blocks_of(model):
    return [b for stage in model.stages for b in stage.blocks] if hasattr(model, "stages") else list(model.blocks)


def five_blocks(name):
    return {"depth": 5} if architecture(name)[0].unit_name == "blocks" else {"depths": (1, 2, 1, 1)}


def least(name):
    """One block, or the two or three stages of one that have every kind of block."""
    return {"depth": 1} if architecture(name)[0].unit_name == "blocks" else options(name)


def tokens_of(model, stream):
    """The stream of a model as tokens (B, H * W, C) of the grid."""
    return model.patch_tokens(stream) if hasattr(model, "blocks") else stream.flatten(1, 2)


def shaken(model, seed=3):
    """The model with no parameter at a constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_second_forward_inspects_no_table(name, monkeypatch):
    """Route tables and views of them are checked once: looking through one costs a tenth of the time of Vim's block."""
    model = small(name).eval()
    model(image(model, 64, 64))
    monkeypatch.setattr(visits, "_inspect", lambda op, table, length: pytest.fail(f"{op} inspects a table again"))
    model(image(model, 64, 64))


# -- classifier -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTINCT)
def test_classifies_at_two_sizes(name):
    model = small(name).eval()
    for size in ((64, 64), (96, 80)):
        with torch.no_grad():
            x = image(model, *size, batch=2)
            logits = model(x)
            assert logits.shape == (2, model.num_classes) and logits.isfinite().all()
            assert torch.allclose(logits, model.forward_head(model.forward_features(x)), atol=1e-5)
            assert torch.allclose(logits[1:], model(x[1:]), atol=1e-4)
            assert not torch.allclose(logits[0], logits[1])
    classifiers = (
        model.get_classifier() if isinstance(model.get_classifier(), nn.ModuleList) else [model.get_classifier()]
    )
    assert {layer.weight.shape[0] for layer in classifiers} == {model.num_classes} and model.num_classes >= 10
    assert model.pretrained_cfg["input_size"][0] == 3 and model.pretrained_cfg["mean"]


@pytest.mark.parametrize("name", DISTINCT)
def test_features_classifier_and_channels(name):
    model = small(name, features_only=True).eval()
    images = image(model, 64, 96)
    maps = model(images)
    assert len(maps) == len(model.feature_info.channels())
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert x.shape[1] == channels
        gaps = [abs(have - whole / reduction) for have, whole in zip(x.shape[-2:], images.shape[-2:])]
        assert max(gaps) <= ("stride8" in name) or max(gaps) < 1, "rounded, or less a patch that overlaps"
    del model

    model = small(name, in_chans=1, num_classes=7).eval()
    x = image(model, 64, 64, channels=1)
    assert model(x).shape == (1, 7)
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.num_classes == 3
    model.reset_classifier(0)
    pooled = model(x)
    assert pooled.shape == (1, model.num_features)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("name", KINDS)
def test_every_pooling_of_timm_is_right_or_an_error(name):
    model = shaken(small(name, num_classes=5)).eval()
    x = image(model, 64, 96, batch=2)
    tokens = model.forward_features(x).detach()
    for kind, pool in POOLS.items():
        model.reset_classifier(5, kind)
        want = model.fc_norm(pool(tokens.flatten(1, -2)))
        with torch.no_grad():
            assert torch.allclose(model.forward_head(tokens, pre_logits=True), want, atol=1e-5), kind
            assert model.head_hidden_size == want.shape[1] and model.forward_head(tokens).shape == (2, 5)
        built = small(name, num_classes=5, global_pool=kind, device="meta")
        assert built.head.weight.shape == model.head.weight.shape and built.global_pool == kind
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)
    assert small(name, num_classes=0, global_pool="").eval()(x).shape == tokens.shape
    for wrong in ("map", "mean", "avg_max") if model.has_class_token else ("map", "mean", "token"):
        with pytest.raises(ValueError, match=f"global_pool of this .* not '{wrong}'"):
            model.reset_classifier(5, wrong)
        with pytest.raises(ValueError, match="global_pool of this"):
            small(name, global_pool=wrong, device="meta")
    if model.has_class_token:
        model.reset_classifier(5, "token")
        (_, token) = model.forward_intermediates(x, [-1], return_prefix_tokens=True, norm=True)[1][0]
        assert torch.allclose(model.forward_head(tokens, pre_logits=True), token.mean(1), atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_dropout_before_the_classifier(name):
    model = small(name, num_classes=5, drop_rate=0.5).train()
    tokens = torch.ones_like(model.eval().forward_features(image(model, 64, 64)))
    if not isinstance(model.fc_norm, nn.Identity):
        nn.init.zeros_(model.fc_norm.weight), nn.init.ones_(model.fc_norm.bias)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert torch.all(pooled == 1)
    dropped = model.train().forward_head(tokens, pre_logits=True)
    assert 0.2 < (dropped == 0).float().mean() < 0.8 and set(dropped.unique().tolist()) == {0.0, 2.0}


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_intermediates(name):
    model = shaken(small(name)).eval()
    x = image(model, 64, 96)
    count = len(model.feature_info)
    with torch.no_grad():
        final, every = model.forward_intermediates(x)
        assert len(every) == count and torch.allclose(final, model.forward_features(x), atol=1e-5)
        last = model.forward_intermediates(x, indices=[-1], intermediates_only=True, stop_early=True)
        assert torch.equal(last[0], every[-1])
        first = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
        assert torch.equal(first[0], every[0])
        assert all(map(torch.equal, model.forward_intermediates(x, 2, intermediates_only=True), every[-2:]))
        short, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
        if hasattr(model, "stages"):  # the final norm is for the last stage's channels
            assert torch.equal(short, every[0].movedim(1, -1))
        else:
            assert torch.allclose(model.patch_tokens(short), model.norm(every[0].flatten(2).mT), atol=1e-5)

        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        for i, (raw, y) in enumerate(zip(every, normed)):
            if model.fits_norm(i):
                want = model.norm(raw.movedim(1, -1)).movedim(-1, 1)
                assert torch.allclose(y, want, atol=1e-5)
                has_norm = not isinstance(model.norm, nn.Identity)
                assert y.shape != raw.shape or torch.allclose(y, raw, atol=1e-2) != has_norm
                assert y.shape[1] == model.feature_info[i].get("num_chs_norm", raw.shape[1])
            else:
                assert torch.equal(y, raw)
        assert model.fits_norm(count - 1)

        maps = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        for raw, y, z in zip(every, maps, tokens):
            assert torch.equal(raw.movedim(1, -1), y) and torch.equal(y.flatten(1, -2), z)
        with pytest.raises(ValueError, match="output_fmt is one of"):
            model.forward_intermediates(x, output_fmt="NCL")
        for wrong in ([count], [-count - 1], [], [0, -count], count + 1, 0):
            for method in (lambda i: model.forward_intermediates(x, indices=i), model.prune_intermediate_layers):
                with pytest.raises(ValueError, match="out of range"):
                    method(wrong)
        assert model.prune_intermediate_layers([-count]) == [0]
        pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)
        assert torch.equal(pruned[0], every[0])
    assert len(model.units) == 1 and isinstance(model.head, nn.Identity)


@pytest.mark.parametrize("name", KINDS)
def test_out_indices_of_features_follow_one_rule(name):
    count = len(small(name, device="meta").feature_info)
    model = small(name, features_only=True, out_indices=(1, -count)).eval()
    maps = model(image(model, 64, 64))
    assert model.feature_info.out_indices == (0, 1)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for wrong in ((count,), (), (0, 0)):
        with pytest.raises(ValueError, match="out of range"):
            small(name, features_only=True, out_indices=wrong, device="meta")


@pytest.mark.parametrize("name", KINDS)
def test_hooks_on_the_modules_of_feature_info_fire_with_the_feature(name):
    model = small(name).eval()
    x, seen = image(model, 64, 96), {}
    for i, info in enumerate(model.feature_info):
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda module, args, output, i=i: seen.setdefault(i, output))
    with torch.no_grad():
        model(x)
        maps = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert all(torch.equal(tokens_of(model, seen[i]), want) for i, want in enumerate(maps))
        if hasattr(model, "stages"):
            assert all(torch.equal(stage(seen[i]), seen[i + 1]) for i, stage in enumerate(model.stages[1:]))


@pytest.mark.parametrize("name", KINDS)
def test_symbolic_traces(name):
    model = small(name, num_classes=5).eval()
    x = image(model, 64, 96)
    _, nodes = get_graph_node_names(model)
    assert "head" in nodes and nodes.index("head") > max(i for i, node in enumerate(nodes) if node.endswith(".mixer"))
    graph = small(name, features_only=True, feature_cls="fx", out_indices=(0, 1)).eval()
    getter = small(name, features_only=True, out_indices=(0, 1)).eval()
    with torch.no_grad():
        for y, want in zip(graph(x), getter(x)):
            assert torch.equal(tokens_of(getter.model, y), want.flatten(2).mT)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_recomputes_every_block_and_changes_no_gradient(name):
    x, gradients = None, []
    for enable in (False, True):
        model = shaken(small(name, num_classes=10)).train()
        x = image(model, 64, 64, batch=2) if x is None else x
        model.set_grad_checkpointing(enable)
        calls, blocks = [], blocks_of(model)
        for i, block in enumerate(blocks):
            block.mixer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        assert sorted(calls) == sorted([*range(len(blocks))] * (1 + enable))
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients):
        assert torch.allclose(plain, again, atol=1e-5 * plain.abs().max().item() + 1e-8)


@pytest.mark.parametrize("name", DISTINCT)
def test_checkpointed_training_step_in_bfloat16(name):
    model = small(name, drop_path_rate=0.1, num_classes=10).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(image(model, 64, 64, batch=2)).float(), torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} takes no part"
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", KINDS)
def test_stochastic_depth_grows_from_block_to_block(name):
    model = small(name, drop_path_rate=0.4, num_classes=5, device="meta", **five_blocks(name))
    rates = [block.drop_path.drop_prob for block in blocks_of(model)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    model = shaken(small(name, drop_path_rate=0.9, num_classes=5)).train()
    block = blocks_of(model)[-1]
    x, context = [], []
    block.register_forward_pre_hook(lambda module, args: (x.append(args[0]), context.append(args[1:])) and None)
    with torch.no_grad():
        model.eval()(image(model, 64, 64))
        many = x[0].expand(64, *x[0].shape[1:])
        after = block.train()(many, *context[0])
        outcomes = Counter(tuple(sample.flatten()[:64].tolist()) for sample in after)
        assert 2 <= len(outcomes) <= (2 if block.mlp is None else 4), "each branch of a sample is dropped or kept"
        assert max(outcomes.values()) >= 32, "most often all are dropped"


@pytest.mark.parametrize("name", MODELS)
def test_parameter_groups(name):
    model = small(name, registered=True, device="meta", **five_blocks(name))
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(names)
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(names)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    of_blocks = []
    for block in blocks_of(model):
        own = {id(p) for p in block.parameters()}
        of_blocks.append({layer[key] for key, p in names.items() if id(p) in own})
    assert all(len(layers) == 1 for layers in of_blocks), "one layer per block"
    numbers = [min(layers) for layers in of_blocks]
    stem = {layer[key] for key in names if key.startswith(("patch_embed.", "pos_embed", "cls_token"))}
    assert [*stem, *numbers] == sorted({*stem, *numbers}) and layer["head.weight"] > numbers[-1]
    assert max(layer[key] for key in names if key.startswith(("stages.", "blocks."))) == numbers[-1]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse) == set(names)


# -- factories, inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_factory_arguments(name):
    size = 256
    model = small(name, registered=True, device="meta", dtype=torch.bfloat16, img_size=(size, size + 32), num_classes=3)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if model.pos_embed is not None:
        assert model.native_grid == model.grid_of(size, size + 32)
    shape = (*image(model, 1, 1).shape[:-2], size, size + 32)  # of which no positions need to be resampled
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    assert model(x).shape == (1, 3), "the parts of the registered width fit each other"
    model.reset_classifier(7)
    assert model.head.weight.is_meta and model.head.weight.dtype == torch.bfloat16
    cfg = model.pretrained_cfg
    assert (cfg["pool_size"] is None) == hasattr(model, "blocks")
    if cfg["pool_size"]:
        stride = 4 * 2 ** (len(architecture(name)[1].get("depths", (1, 1, 1, 1))) - 1)
        if model.first_stride != 4:
            with uninitialised():
                stride = timm.create_model(name, device="meta").feature_info[-1]["reduction"]
        assert cfg["pool_size"] == tuple(side // stride for side in cfg["input_size"][1:])
    if model.min_size > 32:
        with uninitialised():
            wanted = timm.create_model(name, device="meta").min_size
        assert cfg["min_input_size"] == (3, wanted, wanted)


@pytest.mark.parametrize("name", KINDS)
def test_no_images_and_images_without_numbers(name):
    model = small(name, num_classes=3).eval()
    x = image(model, 64, 64)
    with torch.no_grad():
        assert model(x[:0]).shape == (0, 3)
        maps = model.forward_intermediates(x[:0], intermediates_only=True)
        assert all(y.shape[0] == 0 and y.shape[1:] == z.shape[1:] for y, z in zip(
            maps, model.forward_intermediates(x, intermediates_only=True)
        ))  # fmt: skip
        assert model.to("meta")(x.to("meta")).shape == (1, 3)


@pytest.mark.parametrize("name", DISTINCT)
def test_bad_inputs_give_one_clear_line(name):
    model = small(name)
    for bad, message in (
        (image(model, 64, 64, channels=4), "expects 3 input channels, got 4"),
        (torch.randn(3, 64, 64), r"expects (images|clips)"),
        (image(model, 1, 1), "at least"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_double_precision_end_to_end(name):
    model = small(name, num_classes=5).eval()
    x = image(model, 64, 64)
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4 * double.abs().max().item())


# -- tools that go by type --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*quantization")
def test_linear_layers_are_linear_by_type(name):
    model = small(name, num_classes=5).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(layers) > 2 and {type(layer) for layer in layers} == {nn.Linear}
    x, calls = image(model, 64, 64), []
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        want = model(x)
        assert set(calls) == set(layers)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert not [m for m in quantised.modules() if type(m) is nn.Linear]
        assert torch.allclose(quantised(x), want, atol=0.5 * want.abs().max().item())
        assert not torch.equal(quantised(x), want)


@pytest.mark.parametrize("name", KINDS)
def test_operations_are_counted_with_and_without_gradients(name):
    model = small(name, num_classes=5).eval()
    x, counts = image(model, 64, 64), []
    for enable in (False, True):
        with torch.set_grad_enabled(enable), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert 2 * sum(p.numel() for p in model.head.parameters()) < counts[0] <= counts[1]


@pytest.mark.parametrize("name", KINDS)
def test_batch_norms_can_be_synchronised(name):
    model = shaken(small(name, num_classes=5)).eval()
    x = image(model, 64, 96)
    with torch.no_grad():
        want = model(x)
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert not any(type(m) is nn.BatchNorm2d for m in synchronised.modules())
        assert torch.equal(synchronised(x), want)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTINCT)
def test_own_weights_pass_the_filter_as_they_are(name, tmp_path):
    model = shaken(small(name, num_classes=5)).eval()
    state = model.state_dict()
    again = model.checkpoint_filter(state)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    torch.save(state, tmp_path / "model.pth")
    with uninitialised():
        other = small(name, num_classes=5)
    linescan.load_checkpoint(other, tmp_path / "model.pth").eval()
    x = image(model, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


POSITIONED = [name for name in KINDS if small(name, device="meta").pos_embed is not None]


@pytest.mark.parametrize("name", POSITIONED)
def test_positions_stand_where_the_tokens_do(name):
    model = small(name, img_size=(64, 96), num_classes=0).eval()

    def moved(x, table):
        maps = []
        for factor in (0, 1):
            nn.init.zeros_(model.pos_embed)[:] += factor * table
            stream, grid, _ = model.embed(x)
            maps.append(model.to_map(stream, grid))
        difference = (maps[1] - maps[0])[0, ..., 0]
        return difference if difference.ndim == 2 else difference[0]  # of the first frame

    with torch.no_grad():
        one = torch.zeros_like(model.pos_embed)
        one[:, 1, 2] = 1
        assert torch.allclose(moved(image(model, 64, 96), one), one[0, ..., 0], atol=1e-5)
        rows = torch.arange(one.shape[1])[:, None, None].expand_as(one[0])
        down = moved(image(model, 128, 64), rows[None])
        assert down.shape == model.grid_of(128, 64) and torch.allclose(down, down[:, :1].expand_as(down), atol=1e-5)
        assert down[-1, 0] > down[0, 0] + 1


@pytest.mark.parametrize("name", POSITIONED)
def test_positions_are_resampled_from_any_grid(name):
    wide = small(name, img_size=(64, 128), num_classes=0)
    nn.init.normal_(wide.pos_embed)
    state = wide.state_dict()
    grids = {(96, 96): None, (128, 64): None, (64, 128): state["pos_embed"]}  # another count, as many, the same
    for size, want in grids.items():
        model = small(name, img_size=size, num_classes=0)
        got = model.checkpoint_filter(dict(state))["pos_embed"]
        assert got.shape == model.pos_embed.shape
        if want is None:
            old = state["pos_embed"].permute(0, 3, 1, 2)
            want = nn.functional.interpolate(old, model.native_grid, mode="bicubic").permute(0, 2, 3, 1)
        assert torch.allclose(got, want)
        # A file of the authors keeps tokens: their grid is a square, or has to be told.
        tokens = torch.cat([state["cls_pos_embed"], state["pos_embed"].flatten(1, 2)], 1) if "cls_token" in state else (
            state["pos_embed"].flatten(1, 2)
        )  # fmt: skip
        official = {k: v for k, v in state.items() if k != "cls_pos_embed"} | {"pos_embed": tokens}
        if getattr(model, "class_token", None) in (None, "head"):
            told = model.checkpoint_filter(dict(official), img_size=(64, 128))
            assert torch.allclose(told["pos_embed"], want)
            with pytest.raises(ValueError, match="positions in the file, an image of"):
                model.checkpoint_filter(dict(official), img_size=(64, 64))
            if model.native_grid[0] == model.native_grid[1]:
                with pytest.raises(ValueError, match="make no square: give the img_size"):
                    model.checkpoint_filter(dict(official))


def test_scripting_is_refused_in_one_line():
    with pytest.raises(ValueError, match="TorchScript cannot script vim_tiny_patch16_224: trace it"):
        small("vim_tiny_patch16_224", scriptable=True)


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_compiles_and_exports(name):
    model = small(name, num_classes=5, **least(name)).eval()
    x = image(model, 64, 64, batch=2)
    with torch.no_grad():
        eager = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    scale = eager.abs().max().item()
    assert torch.allclose(eager, compiled, atol=1e-5 * scale)
    assert torch.allclose(eager, exported, atol=1e-5 * scale)
