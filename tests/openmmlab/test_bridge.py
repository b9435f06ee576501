"""LinescanBackbone, its weights, and the learning rates, as a user of mmseg and mmdet meets them."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import tomllib
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.runner.checkpoint import load_checkpoint  # noqa: E402

from linescan import CheckpointError, list_models  # noqa: E402
from linescan.backbones.contract import architecture  # noqa: E402
from linescan.openmmlab import find_config, list_configs  # noqa: E402
from tests.parity import check, recipe  # noqa: E402

DATA = Path(check.__file__).parent / "data"
CASES = tomllib.loads((DATA.parent / "cases.toml").read_text())

SMALL = {
    "vmamba": {"model": "vmamba_tiny_s1l8", "depths": [1, 1, 2, 1], "dims": 8},
    "vim": {"model": "vim_tiny_patch16_224", "img_size": 64, "embed_dim": 32, "depth": 4, "out_indices": [0, 1, 2, 3]},
    "vrwkv": {
        "model": "vrwkv_tiny",
        "embed_dim": 32,
        "depth": 4,
        "neck": {"type": "adapter", "num_heads": 4, "width": 8},
    },
    "vig": {"model": "vig_tiny", "embed_dim": 48, "depth": 4, "num_heads": 3},
}


def build(family, **kwargs):
    torch.manual_seed(0)
    return MODELS.build({"type": "LinescanBackbone", **SMALL[family], **kwargs})


def of_every_class():
    """One registered name of each class that reads images."""
    names = [name for name in reversed(list_models(task="classification")) if "_video_" not in name]
    return sorted({architecture(name)[0]: name for name in names}.values())


# -- maps -------------------------------------------------------------------------------------------------------------


def test_mmseg_and_mmdet_see_it():
    for package in ("mmseg", "mmdet"):
        registry = pytest.importorskip(f"{package}.registry").MODELS
        assert registry.get("LinescanBackbone") is MODELS.get("LinescanBackbone")


@pytest.mark.parametrize("name", of_every_class())
def test_every_class_gives_the_maps_that_it_promises(name):
    cls, args = architecture(name)
    if cls.unit_name == "stages":
        short = {"depths": [1] * len(args.get("depths", (1, 1, 1, 1)))}
    else:
        short = {"depth": 4, "out_indices": [0, 1, 2, 3]} if not name.startswith("vrwkv") else {"depth": 4}
    backbone = MODELS.build({"type": "LinescanBackbone", "model": name, **short}).eval()
    height, width = (64, 128) if backbone.trunk.min_size <= 64 else (256, 320)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, height, width))
    assert len(maps) == len(backbone.out_channels) == len(backbone.strides) == (3 if name.startswith("rwkvsam") else 4)
    for y, channels, stride, info in zip(maps, backbone.out_channels, backbone.strides, backbone.feature_info):
        assert y.shape[1:] == (channels, height // stride, width // stride) and torch.isfinite(y).all()
        assert (info["num_chs"], info["reduction"]) == (channels, stride)
    layers = backbone.layer_ids()
    assert set(layers) == {name for name, _ in backbone.named_parameters()}
    assert set(layers.values()) == set(range(max(layers.values()) + 1))
    backbone.freeze(1)
    still = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert still >= {name for name, layer in layers.items() if layer == 0} and still < set(layers)


def test_out_indices_and_necks():
    x = torch.randn(1, 3, 64, 64)
    assert [tuple(y.shape[1:]) for y in build("vmamba", out_indices=[3, 1]).eval()(x)] == [(16, 8, 8), (64, 2, 2)]
    assert [y.shape[-1] for y in build("vig").eval()(x)] == [16, 8, 4, 2]
    assert [y.shape[-1] for y in build("vig", neck=None, out_indices=[-1]).eval()(x)] == [4]
    simple = build("vig", neck={"type": "simple", "out_channels": 8}, out_indices=[3]).eval()
    assert [tuple(y.shape[1:]) for y in simple(x)] == [(8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, 1)]
    assert len(build("vrwkv", out_indices=[0, 2]).eval()(x)) == 2


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"model": "vig_h_tyni"}, "unknown model 'vig_h_tyni'"),
        ({"model": "resnet18"}, "unknown model 'resnet18'"),
        ({"model": "videomamba_video_tiny_patch16_224", "depth": 1}, "reads clips"),
        ({**SMALL["vmamba"], "out_indices": [4]}, "they are different numbers from 0 to 3"),
        ({**SMALL["vmamba"], "out_indices": []}, "they are different numbers from 0 to 3"),
        ({**SMALL["vmamba"], "out_indices": [1, -3]}, "they are different numbers from 0 to 3"),
        ({**SMALL["vmamba"], "tap": "mixer"}, "tap='mixer' is for plain backbones"),
        ({**SMALL["vig"], "neck": "fpn"}, "neck is one of 'auto', 'rescaled', 'simple', 'adapter', None"),
        ({**SMALL["vig"], "out_indices": [1, 2]}, "neck 'rescaled' is for four maps"),
        ({**SMALL["vig"], "init_cfg": {"type": "Kaiming"}}, "init_cfg is dict"),
        ({**SMALL["vig"], "pretrained": "open-mmlab://resnet50_v1c"}, "unset it with model=dict(pretrained=None, ...)"),
        (
            {**SMALL["vig"], "pretrained": "x.pth", "init_cfg": {"type": "Pretrained", "checkpoint": "y.pth"}},
            "unset it with model=dict(pretrained=None, ...)",
        ),
    ],
)
def test_what_is_wrong_is_said(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        MODELS.build({"type": "LinescanBackbone", **wrong})


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL)
def test_frozen_stages_stay_as_they_are(family):
    backbone = build(family, frozen_stages=2, drop_path_rate=0.5)
    backbone.train()
    trunk = backbone.trunk
    units = trunk.stages if hasattr(trunk, "stages") else trunk.blocks
    for part in (trunk.patch_embed, *units[:2]):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert units[2].training and all(p.requires_grad for p in units[2].parameters())
    assert build(family, frozen_stages=-1).trunk.patch_embed.training
    stem_only = build(family, frozen_stages=0)
    assert not any(p.requires_grad for p in stem_only.trunk.patch_embed.parameters())
    units = stem_only.trunk.stages if hasattr(stem_only.trunk, "stages") else stem_only.trunk.blocks
    assert all(p.requires_grad for p in units[0].parameters())
    if hasattr(trunk, "pos_embed") and trunk.pos_embed is not None:
        assert not trunk.pos_embed.requires_grad


def test_norm_eval_keeps_batch_norms_still():
    backbone = build("vrwkv", norm_eval=True)
    backbone.train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and backbone.trunk.blocks[0].training


@pytest.mark.parametrize("family", SMALL)
def test_gradient_checkpointing_changes_no_gradient(family):
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        backbone = build(family, with_cp=with_cp).train()
        calls = []
        blocks = [m for m in backbone.trunk.modules() if m is not backbone.trunk and hasattr(m, "mixer")]
        for block in blocks[:1]:
            block.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
        sum(y.square().mean() for y in backbone(x)).backward()
        assert not blocks or len(calls) == 1 + with_cp  # recomputed in the backward pass
        grads.append([p.grad for p in backbone.parameters()])
    for plain, again in zip(*grads):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SMALL)
def test_layer_decay(family):
    model = nn.ModuleDict({"backbone": build(family), "decode_head": nn.Conv2d(8, 2, 1)})
    wrapper = build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1},
            "constructor": "LayerDecayOptimWrapperConstructor",
            "paramwise_cfg": {"decay_rate": 0.5, "custom_keys": {"decode_head": {"lr_mult": 10}}},
        },
    )
    named = dict(model.named_parameters())
    of = {p: group for group in wrapper.param_groups for p in group["params"]}
    assert set(of) >= set(named.values()) and len(wrapper.param_groups) < len(named) / 2
    backbone = model["backbone"]
    trunk, prefix = backbone.trunk, "backbone.trunk."
    blocks = [b for s in trunk.stages for b in s.blocks] if hasattr(trunk, "stages") else list(trunk.blocks)
    for i, block in enumerate(blocks):
        assert {of[p]["lr"] for p in block.parameters()} == {0.5 ** (len(blocks) - i)}
    assert {of[p]["lr"] for p in trunk.patch_embed.parameters()} == {0.5 ** (len(blocks) + 1)}
    assert of[named["decode_head.weight"]]["lr"] == 10
    new = [n for n in named if n.startswith(("backbone.norms.", "backbone.neck."))]
    assert new and {of[named[n]]["lr"] for n in new} == {1.0}
    for name, parameter in named.items():
        skipped = name.removeprefix(prefix) in trunk.no_weight_decay() or parameter.ndim == 1 or name.endswith(".bias")
        assert of[parameter]["weight_decay"] == (0.0 if skipped and "decode_head" not in name else 0.1), name


def test_layer_decay_says_what_it_lacks():
    cfg = {"optimizer": {"type": "SGD", "lr": 1.0}, "constructor": "LayerDecayOptimWrapperConstructor"}
    for model, paramwise in ((nn.Linear(2, 2), {"decay_rate": 0.9}), (build("vmamba"), {"norm_decay_mult": 0.0})):
        if "norm_decay_mult" in paramwise:
            cfg["optimizer"]["weight_decay"] = 0.1
        with pytest.raises(ValueError, match="layer decay needs"):
            build_optim_wrapper(model, {**cfg, "paramwise_cfg": paramwise})


# -- weights ----------------------------------------------------------------------------------------------------------


def classifier_of(stem, tmp_path):
    """The official file of a golden case, and the classifier that it fills."""
    path = check.golden_file(recipe.load_manifest(DATA / f"{stem}.json"), tmp_path)
    return path, check.build(CASES[stem], path).eval()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("class_token", [None, "middle"])
def test_official_classifier_of_vim_fills_the_dense_form(tmp_path, class_token, size):
    path, classifier = classifier_of("vim__unit", tmp_path)
    backbone = MODELS.build(
        {
            "type": "LinescanBackbone", "model": "vim_tiny_patch16_224", "img_size": size, "patch_size": 8,
            "embed_dim": 32, "depth": 2, "d_state": 8, "out_indices": [0, 1], "class_token": class_token, "neck": None,
            "init_cfg": {"type": "Pretrained", "checkpoint": path},
        }
    )  # fmt: skip
    backbone.init_weights()
    own, theirs = backbone.trunk.state_dict(), classifier.state_dict()
    assert all(torch.equal(own[k], v) for k, v in theirs.items() if k.startswith(("blocks.", "patch_embed.")))
    if size == 32:  # the class token stands in the middle of the file, and so does its position
        assert torch.equal(own["pos_embed"], theirs["pos_embed"])
        assert not class_token or torch.equal(own["cls_pos_embed"], theirs["cls_pos_embed"])
    if class_token:
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():  # with its class token the backbone sees what the classifier sees
            wanted = classifier.forward_intermediates(x, [0, 1], intermediates_only=True)
            got = backbone.eval()(x)
        assert size != 32 or torch.allclose(got[-1], wanted[-1], atol=1e-5)
    dropped, new = backbone.load_pretrained(path)
    assert all(k.startswith(("trunk.head.", "trunk.norm.", "trunk.cls_")) for k in dropped) and not new


def test_official_classifier_of_vmamba_leaves_the_output_norms(tmp_path):
    path, classifier = classifier_of("VMamba__micro_gmlp", tmp_path)
    cfg = {"type": "LinescanBackbone", "model": "vmamba_tiny_s1l8", "depths": [1, 2], "dims": [16, 32], "gmlp": True}
    backbone = MODELS.build({**cfg, "out_indices": [0, 1], "pretrained": path})
    backbone.init_weights()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = classifier.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        for y, z in zip(backbone.eval()(x), wanted):
            assert torch.allclose(y.permute(0, 2, 3, 1), nn.functional.layer_norm(z, z.shape[-1:]), atol=1e-4)


def test_families_without_a_dense_form_take_their_classifiers_file(tmp_path):
    classifier = timm.create_model(SMALL["vig"]["model"], num_classes=7, embed_dim=48, depth=4, num_heads=3).eval()
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    backbone = build("vig", neck=None, out_indices=[1, 2]).eval()
    dropped, new = backbone.load_pretrained(tmp_path / "classifier.pth")
    assert {k.rpartition(".")[2] for k in dropped} == {"weight", "bias"} and all(k.startswith("norms.") for k in new)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for y, z in zip(backbone(x), classifier.forward_intermediates(x, [1, 2], intermediates_only=True)):
            normed = nn.functional.layer_norm(z.permute(0, 2, 3, 1), z.shape[1:2]).permute(0, 3, 1, 2)
            assert torch.allclose(y, normed, atol=1e-5)


@pytest.mark.parametrize("family", ["vim", "vrwkv", "vig"])
def test_positions_are_resampled(tmp_path, family):
    small, large = build(family, img_size=64), build(family, img_size=128)
    torch.save(small.trunk.state_dict(), tmp_path / "small.pth")
    large.load_pretrained(tmp_path / "small.pth")
    assert large.trunk.native_grid == tuple(2 * side for side in small.trunk.native_grid)
    means = (model.trunk.pos_embed.mean((1, 2)) for model in (large, small))
    assert torch.allclose(*means, atol=0.02)


def test_a_segmentor_of_the_authors_loads_as_it_is(tmp_path):
    """mmengine's `load_from` with official keys below `backbone.`, and other modules' as they are."""
    manifest = recipe.load_manifest(DATA / "VMamba__micro_dense_v0_idx13.json")
    official = {k: torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}
    head = nn.Conv2d(8, 2, 1)
    state = {f"backbone.{k}": v for k, v in official.items()}
    state |= {f"decode_head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "segmentor.pth")
    case = CASES["VMamba__micro_dense_v0_idx13"]
    backbone = MODELS.build({"type": "LinescanBackbone", "model": "vmamba_tiny_s1l8", **case["kwargs"]})
    model = nn.ModuleDict({"backbone": backbone, "decode_head": nn.Conv2d(8, 2, 1)})
    load_checkpoint(model, str(tmp_path / "segmentor.pth"), map_location="cpu", strict=True)
    assert torch.equal(model["decode_head"].weight, head.weight)
    again = MODELS.build({"type": "LinescanBackbone", "model": "vmamba_tiny_s1l8", **case["kwargs"]})
    again.load_pretrained(tmp_path / "segmentor.pth")
    for (name, a), b in zip(backbone.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", SMALL)
def test_a_training_here_can_be_the_start_of_another(tmp_path, family):
    first, second = build(family), build(family)
    for parameter in first.parameters():
        nn.init.normal_(parameter)
    model = nn.ModuleDict({"backbone": first, "decode_head": nn.Conv2d(8, 2, 1)})
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "iter_1.pth")
    second.init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "iter_1.pth")}
    second.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_a_file_of_another_model_is_refused_in_one_line(tmp_path):
    torch.save({"state_dict": build("vig").state_dict()}, tmp_path / "vig.pth")
    for family in ("vmamba", "vim", "vrwkv"):
        with pytest.raises(CheckpointError, match="is not a checkpoint of") as error:
            build(family).load_pretrained(tmp_path / "vig.pth")
        assert "\n" not in str(error.value)


# -- configs ----------------------------------------------------------------------------------------------------------


def test_configs_are_found_by_name(tmp_path):
    name = "segmentation/vmamba_tiny_upernet_ade20k"
    assert name in list_configs()
    path = find_config(name)
    assert path.is_file() and "linescan" in path.parts
    for other in (path, f"{name}.py", "vmamba_tiny_upernet_ade20k", f"configs/{name}.py"):
        assert find_config(other).samefile(path)
    with pytest.raises(ValueError, match="near it: .*vmamba_tiny_upernet_ade20k"):
        find_config("segmentation/vmamba_tinny_upernet_ade20k")


def test_a_config_over_a_base_of_mmseg_reads_images_of_any_sides(tmp_path):
    (tmp_path / "own.py").write_text("""
_base_ = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
custom_imports = dict(imports=['linescan.openmmlab'])
model = dict(
    backbone=dict(_delete_=True, type='LinescanBackbone', model='vrwkv_tiny', embed_dim=32, depth=4,
                  neck=dict(type='adapter', num_heads=4, width=8)),
    decode_head=dict(in_channels=[32] * 4, channels=8), auxiliary_head=dict(in_channels=32, channels=8))
""")
    model = Config.fromfile(tmp_path / "own.py").model
    with DefaultScope.overwrite_default_scope("mmseg"):
        with pytest.raises(ValueError, match="from a _base_ of this config: unset it with model=dict.pretrained=None"):
            MODELS.build(deepcopy(model))
        segmentor = MODELS.build({**model, "pretrained": None}).eval()
    with torch.no_grad():
        logits = segmentor.encode_decode(torch.randn(1, 3, 65, 97), [{"img_shape": (65, 97)}])
    assert logits.shape == (1, 150, 65, 97)
