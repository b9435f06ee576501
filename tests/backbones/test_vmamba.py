"""VMamba beyond the contract and the golden data: its options, initialisation, checkpoints and dense form."""

import pytest
import timm
import torch

import linescan
from linescan.backbones.feature_maps import DenseBackbone
from linescan.backbones.vmamba import VMamba, parse_forward_type
from linescan.checkpoint import CheckpointError
from linescan.layers.blocks import Block
from linescan.layers.mlp import Mlp
from linescan.layers.ss2d import SS2D
from linescan.layers.stems import ConvDownsample, PatchMerging

SMALL = dict(depths=(1, 2), dims=16, num_classes=5)


def image(*size, batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def build(cls=VMamba, **kwargs):
    torch.manual_seed(0)
    return cls(**{**SMALL, **kwargs}).eval()


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward_type",
    "v0 v01 v05_noz v05_nozact v3_oact v051d_noz v052d v052dc_noz v05_onnone_noz v05_ondwconv3_noz_oact "
    "v05_oncnorm_nozact v05_onsoftmax_noz v05_onsigmoid_noz_no32".split(),
)
def test_every_forward_type_runs_and_every_parameter_matters(forward_type):
    model = build(forward_type=forward_type, d_state=2)
    model(image(20, 24, batch=2)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_mamba2_scans():
    model = build(forward_type="m0_noz", dims=32, d_state=8, act_layer="gelu", ssm_init="v2")
    model(image(20, 24)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert model.stages[1].blocks[0].mixer.ssm.D.shape == (4, 4, 16)


def test_the_versions_of_the_cross_scan_are_one_function():
    x = image(24, 20)
    weights = build(forward_type="v3").state_dict()
    outputs = []
    for version in ("v01", "v02", "v03", "v04", "v05", "v2", "v3", "v2_no32"):
        model = build(forward_type=version)
        model.load_state_dict(weights)
        outputs.append(model(x))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("text", ["v05_noz_onnone", "xv1a", "v06", "v05_noz_noz", "", "v05_bn"])
def test_forward_types_that_do_not_exist_are_named(text):
    with pytest.raises(ValueError, match="unknown forward_type") as caught:
        parse_forward_type(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(forward_type="m0"), "m0_noz"),
        (dict(patch_embed="v3"), "patch_embed is one of"),
        (dict(downsample="v4"), "downsample is one of"),
        (dict(dims=(16, 32, 64)), "dims gives 3 stages"),
        (dict(routes=["row", "col"]), "routes are given for 2 blocks, depths has 3"),
        (dict(ssm_init="v3"), "init is one of"),
        (dict(routes="rwo"), "unknown route"),
    ],
)
def test_unknown_options_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_other_routes_for_all_blocks_or_for_each():
    x = image(32, 32)
    cross, curves = filled(1), filled(1, routes="hilbert, -hilbert, zorder, -zorder")
    tokens = torch.randn(1, 8, 8, 16)
    assert (cross.stages[0](tokens) - curves.stages[0](tokens)).abs().max() > 1e-3
    model = build(routes=["row", "col, -col", "w2, -w2, snake"])
    assert [len(b.mixer.ssm.D) for s in model.stages for b in s.blocks] == [1, 2, 3]
    assert model(x).isfinite().all()


@pytest.mark.parametrize("patch_embed, stem", [("v1", (9, 13)), ("v2", (10, 14))])
@pytest.mark.parametrize("downsample, half", [("v1", "up"), ("v2", "down"), ("v3", "up")])
def test_odd_sizes(patch_embed, stem, downsample, half):
    model = build(patch_embed=patch_embed, downsample=downsample, depths=(1, 1, 1))
    maps = model.forward_intermediates(image(39, 53), intermediates_only=True)
    sizes = [stem]
    for _ in range(2):
        sizes.append(tuple((n + 1) // 2 if half == "up" else n // 2 for n in sizes[-1]))
    assert [tuple(m.shape[2:]) for m in maps] == sizes


def test_patch_merging_pads_odd_sides_with_zeros_at_the_end():
    torch.manual_seed(0)
    layer, x = PatchMerging(4, 6), torch.randn(2, 5, 7, 4)
    padded = torch.zeros(2, 6, 8, 4)
    padded[:, :5, :7] = x
    assert torch.equal(layer(x), layer(padded))
    with torch.no_grad():  # the order of the four neighbours, seen through the norm's weight
        layer.reduction.weight.copy_(torch.eye(6, 16))
    patch = padded[0, 2:4, 4:6]
    want = layer.norm(torch.cat([patch[0, 0], patch[1, 0], patch[0, 1], patch[1, 1]]))[:6]
    assert torch.allclose(layer(x)[0, 1, 2], want, atol=1e-6)


def test_convolutions_round_odd_sides_down_or_up():
    assert ConvDownsample(4, 8, 2)(torch.randn(1, 5, 7, 4)).shape == (1, 2, 3, 8)
    assert ConvDownsample(4, 8, 3)(torch.randn(1, 5, 7, 4)).shape == (1, 3, 4, 8)


def test_post_norm_normalises_what_a_branch_adds():
    torch.manual_seed(0)
    block = Block(8, SS2D(8, d_state=2), Mlp(8, 16), post_norm=True)
    x = torch.randn(1, 4, 5, 8)
    after = x + block.norm1(block.mixer(x))
    assert torch.allclose(block(x), after + block.norm2(block.mlp(after)))


def test_merges_other_than_the_sum():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 5, 8)
    mixer = SS2D(8, d_state=2)
    halved = SS2D(8, d_state=2, merge="mean", out_norm="none")
    halved.load_state_dict({k: v for k, v in mixer.state_dict().items() if "out_norm" not in k})
    u = x @ torch.ones(8, 16)
    assert torch.allclose(mixer.ssm(u), 4 * halved.ssm(u), atol=1e-5)


def test_a_mirrored_image_exchanges_routes():
    """Reading the transposed map with row and column parameters exchanged gives the transposed output."""
    torch.manual_seed(0)
    one, other = SS2D(8, d_conv=0), SS2D(8, "col, row, -col, -row", d_conv=0)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 5, 7, 8)
    assert torch.allclose(one(x).transpose(1, 2), other(x.transpose(1, 2)), atol=1e-6)


# -- initialisation, weight decay ------------------------------------------------------------------------------------


def test_published_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("vmamba_vanilla_tiny", depths=(1, 1, 1, 1))
    mixer = model.stages[2].blocks[0].mixer
    steps = torch.nn.functional.softplus(mixer.ssm.dt_bias)
    assert 0.9e-4 <= steps.min() < 2e-3 and 0.08 < steps.max() <= 0.11
    assert torch.allclose(mixer.ssm.A_log.exp(), torch.arange(1.0, 17).expand_as(mixer.ssm.A_log))
    assert torch.all(mixer.ssm.D == 1)
    assert 0.95 * 24**-0.5 < mixer.ssm.dt_proj.abs().max() <= 24**-0.5
    assert abs(mixer.in_proj.weight.std().item() - 0.02) < 1e-3
    assert 0.9 / 3 < mixer.conv.weight.abs().max() <= 1 / 3  # torch's own
    assert torch.all(model.head.bias == 0)


@pytest.mark.parametrize("init, low", [("v1", -0.5), ("v2", 0.0)])
def test_other_initialisations(init, low):
    ssm = build(ssm_init=init, d_state=2).stages[0].blocks[0].mixer.ssm
    assert (ssm.A_log.abs().max() == 0) == (init == "v2")
    assert ssm.dt_bias.min() >= low and ssm.dt_bias.max() < 0.5 and ssm.dt_proj.abs().sum() > 0


def test_of_the_scans_only_the_skip_escapes_weight_decay():
    skipped = build(pos_embed=True).no_weight_decay()
    assert {"pos_embed", "stages.0.blocks.0.mixer.ssm.D"} <= skipped
    assert not [name for name in skipped if name.endswith(("A_log", "dt_bias", "dt_proj"))]


# -- checkpoints -----------------------------------------------------------------------------------------------------


def official(model):
    """A model's weights as the official code names them."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(("norm.", "head.")):
            key = f"classifier.{key}"
        if ".downsample." in key:
            stage, rest = key.removeprefix("stages.").split(".downsample.")
            key = f"layers.{int(stage) - 1}.downsample.{rest.replace('conv', '1').replace('norm', '3')}"
        key = (
            key.replace("stages", "layers")
            .replace("norm1", "norm")
            .replace("mixer", "op")
            .replace("op.conv", "op.conv2d")
        )
        for ours, theirs in (("conv1", "0"), ("norm", "2"), ("conv2", "5"), ("norm2", "7")):  # norm1 is norm by now
            key = key.replace(f"patch_embed.{ours}.", f"patch_embed.{theirs}.")
        for ours, theirs in (
            ("x_proj", "x_proj_weight"), ("dt_proj", "dt_projs_weight"), ("dt_bias", "dt_projs_bias"),
            ("A_log", "A_logs"), ("D", "Ds"),
        ):  # fmt: skip
            if key.endswith(f"ssm.{ours}"):
                key = key.replace(f"ssm.{ours}", theirs)
                value = value.flatten(0, 1) if ours in ("A_log", "D") else value
        state[key] = value
    return state


def single_file(state, linear_as_conv=False):
    """The same, as the single-file copy keeps it."""
    out = {}
    for key, value in state.items():
        if key.endswith(("x_proj_weight", "dt_projs_weight")):
            key, value = key.replace("_weight", ".weight"), value.flatten(0, 1)
        if linear_as_conv and key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            value = value[..., None, None]
        out[key] = value
    return out


def filled(seed, **kwargs):
    model = build(**kwargs)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("layout", [dict, single_file, lambda state: single_file(state, linear_as_conv=True)])
def test_both_copies_of_the_official_code_load(tmp_path, layout):
    model, x = filled(1), image(32, 32)
    torch.save({"model": layout(official(model)), "epoch": 3}, tmp_path / "file.pth")
    assert torch.equal(linescan.load_checkpoint(filled(2), tmp_path / "file.pth")(x), model(x))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s | {"layers.0.blocks.0.op.extra": torch.zeros(2)}, "1 unexpected"),
        (lambda s: s | {"layers.0.blocks.7.norm.weight": torch.zeros(16)}, "1 unexpected"),
        (lambda s: {k: v for k, v in s.items() if not k.endswith("0.op.Ds")}, "missing"),
        (lambda s: s | {"layers.0.blocks.0.op.A_logs": torch.zeros(64, 3)}, "1 of another shape"),
    ],
)
def test_loading_is_strict(tmp_path, damage, message):
    model = filled(1)
    torch.save({"model": damage(official(model))}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        linescan.load_checkpoint(filled(2), tmp_path / "file.pth")


def test_position_embedding_of_another_grid_is_resampled(tmp_path):
    model = filled(1, pos_embed=True, img_size=32)
    state = official(model)
    state["pos_embed"] = state["pos_embed"].permute(0, 3, 1, 2)
    torch.save({"model": state}, tmp_path / "file.pth")
    same = linescan.load_checkpoint(filled(2, pos_embed=True, img_size=32), tmp_path / "file.pth")
    assert torch.equal(same.pos_embed, model.pos_embed)
    larger = linescan.load_checkpoint(filled(2, pos_embed=True, img_size=(48, 40)), tmp_path / "file.pth")
    assert larger.pos_embed.shape == (1, 12, 10, 16)
    x = image(48, 40)
    assert torch.allclose(model(x), larger(x), atol=1e-5)  # resampled in the forward pass, or on loading


# -- dense -----------------------------------------------------------------------------------------------------------


def test_dense_maps_are_normalised_and_the_stream_is_not():
    dense = DenseBackbone(build(depths=(1, 1, 1, 1), num_classes=0), (1, -1), norms="each")
    x = image(64, 96)
    maps = dense(x)
    assert [tuple(m.shape) for m in maps] == [(1, 32, 8, 12), (1, 128, 2, 3)]
    assert all(m.mean(1).abs().max() < 1e-5 for m in maps)
    raw = dense.trunk.forward_intermediates(x, intermediates_only=True)
    assert torch.allclose(maps[1], dense.norms["3"](raw[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_dense_starts_from_a_classification_file(tmp_path):
    model = filled(1)
    torch.save({"model": official(model)}, tmp_path / "file.pth")
    dense = DenseBackbone(build(num_classes=0), norms="each")
    linescan.load_checkpoint(dense, tmp_path / "file.pth")
    x = image(32, 32)
    want = model.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, dense.trunk.forward_intermediates(x, intermediates_only=True), want))
    assert all((norm.weight == 1).all() for norm in dense.norms.values())
