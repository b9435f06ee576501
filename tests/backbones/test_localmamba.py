"""LocalMamba beyond the contract and the golden data: padding, the search, initialisation, checkpoints."""

import json
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F

import linescan
from linescan.backbones.feature_maps import DenseBackbone, dense_backbone
from linescan.backbones.localmamba import (
    CANDIDATES,
    LOCAL_VIM,
    LOCAL_VMAMBA_SMALL,
    LOCAL_VMAMBA_TINY,
    DirectionSearch,
    LocalScan,
    LocalVim,
    LocalVMamba,
    searched_directions,
)
from linescan.checkpoint import CheckpointError
from linescan.layers.mamba import MambaMixer
from linescan.scans import MultiRoute, routes, selective_scan
from tests.parity import recipe

DATA = Path(__file__).parents[1] / "parity" / "data"
VIM = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, d_state=4, num_classes=5)
VMAMBA = dict(depths=(1, 2), dims=8, d_state=2, num_classes=5)


def image(*size, batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def filled(model, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# -- directions ------------------------------------------------------------------------------------------------------


def test_searched_tables():
    assert [len(t) for t in (LOCAL_VIM, LOCAL_VMAMBA_TINY, LOCAL_VMAMBA_SMALL)] == [20, 15, 33]
    order = list(CANDIDATES)
    for table in (LOCAL_VIM, LOCAL_VMAMBA_TINY, LOCAL_VMAMBA_SMALL):
        assert all(len(row) == 4 and row == sorted(row, key=order.index) for row in table)
    assert LOCAL_VIM[0] == ["h", "v_flip", "w7", "w7_flip"] and LOCAL_VIM[19] == ["v", "v_flip", "w2", "w2_flip"]
    assert LOCAL_VMAMBA_TINY[8] == ["h", "v_flip", "w7", "w7_flip"]
    assert LOCAL_VMAMBA_SMALL[28] == ["h", "v_flip", "w2", "w7"]


def test_directions_by_name_by_spec_and_for_each_block():
    x = image(32, 32)
    one = filled(LocalVim(directions=["h", "w2_flip"], **VIM))
    other = filled(LocalVim(directions="row, -w2", **VIM))
    each = filled(LocalVim(directions=[["h", "w2_flip"], "row, -w2", ["v"]], **VIM))
    assert torch.equal(one(x), other(x)) and torch.equal(one(x), each(x))
    with pytest.raises(ValueError, match="directions are given for 1 blocks, the model has 2"):
        LocalVim(directions=[["h", "v"]], **VIM)
    with pytest.raises(ValueError, match="unknown route"):
        LocalVim(directions=[["h", "w"]] * 2, **VIM)


def test_padding_of_a_window_is_convolved_and_scanned():
    """The mixer along padded windows against the plain computation on a padded and permuted sequence."""
    torch.manual_seed(0)
    mixer = filled(MambaMixer(6, "-w2", d_state=3)).double()
    x = torch.randn(2, 15, 6, dtype=torch.float64)  # 3 x 5, so 2x2 windows make 24 steps
    route = routes.table("-w2", (3, 5))
    steps = route[0].tolist()
    got = mixer(x, (3, 5))
    assert torch.equal(got, mixer(x, route=route))

    xz = mixer.in_proj(x)
    xz = torch.stack([xz[:, t] if t >= 0 else torch.zeros_like(xz[:, 0]) for t in steps], 1)
    u, z = xz.chunk(2, -1)
    u = F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv_weight[0, :, None], mixer.conv_bias[0], groups=12).mT
    u = F.silu(u)
    dt, B, C = (u @ mixer.x_proj[0].T).split(mixer.split, -1)
    delta = F.softplus(dt @ mixer.dt_proj[0].T + mixer.dt_bias[0])
    y = selective_scan(u[:, None], delta[:, None], -mixer.A_log.exp(), B[:, None], C[:, None], mixer.D)[:, 0]
    y = y * F.silu(z)
    want = mixer.out_proj(torch.stack([y[:, steps.index(t)] for t in range(15)], 1))
    assert torch.allclose(got, want, atol=1e-10)
    skipping = mixer(x, route=route[:, route[0] >= 0])
    assert (skipping - want).abs().max() > 1e-3


def test_columns_come_back_as_published():
    """Right on square maps; on others the sequence is put back as if height and width were exchanged."""
    torch.manual_seed(0)
    plain = LocalScan(16, "row, -col", d_state=2, merge="concat")
    u = torch.randn(1, 3, 5, 16)
    y = plain(u.flatten(1, 2), route=routes.table("row, -col", (3, 5)))  # without a grid nothing is exchanged
    first, second = y.chunk(2, -1)
    steps = second.unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)  # the columns in order of reading
    second = steps.unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)
    got = plain(u).flatten(1, 2)
    assert torch.allclose(got, torch.cat([first, second], -1), atol=1e-6)
    square = torch.randn(1, 4, 4, 16)
    assert torch.equal(
        plain(square).flatten(1, 2), plain(square.flatten(1, 2), route=routes.table("row, -col", (4, 4)))
    )


def test_small_images_are_padded_to_whole_patches():
    model = filled(LocalVim(directions="row, -w7", **VIM))
    x = image(35, 26)
    assert torch.allclose(model(x), model(F.pad(x, (0, 6, 0, 5))), atol=1e-6)
    assert model.forward_intermediates(x, intermediates_only=True)[0].shape == (1, 16, 5, 4)


@pytest.mark.parametrize("class_token", [False, True])
def test_sizes_other_than_the_native(class_token):
    model = filled(LocalVim(directions="row, -row, col, w7", class_token=class_token, **VIM))
    logits = model(image(40, 72, batch=2))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    assert model.forward_intermediates(image(40, 72), intermediates_only=True)[1].shape == (1, 16, 5, 9)


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
@pytest.mark.parametrize(
    "build", [lambda: LocalVim(directions=None, **VIM), lambda: LocalVMamba(directions=None, **VMAMBA)]
)
def test_every_parameter_of_a_super_net_matters(build, size):
    model = filled(build())
    model(image(*size, batch=2)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


# -- search ----------------------------------------------------------------------------------------------------------


def test_search_weighs_normalised_routes():
    torch.manual_seed(0)
    merge = filled(DirectionSearch(16, 3))
    y = torch.randn(2, 3, 10, 16)
    want = 0
    for k, weight in enumerate(merge.weights.flatten().softmax(0)):
        gate = merge.channel_select(F.gelu(merge.global_reduce(merge.norm(y[:, k]).mean(1)))).sigmoid()
        want = want + weight * F.layer_norm(y[:, k] * gate[:, None], (16,))
    assert torch.allclose(merge(y), want, atol=1e-6)


@pytest.mark.parametrize(
    "stem, build, changes, width",
    [
        (
            "micro_vim_search",
            lambda: LocalVim(embed_dim=32, depth=3, num_classes=10, directions=None),
            {"embed_dim": 48},
            48,
        ),
        (
            "micro_vssm_search",
            lambda: LocalVMamba(dims=(16, 32), depths=(2, 2), d_state=4, num_classes=10, directions=None),
            {"dims": (24, 48)},
            24,
        ),
    ],
)
def test_a_search_ends_in_the_originals_table(stem, build, changes, width, tmp_path, capsys):
    manifest = json.loads((DATA / f"LocalMamba__{stem}.json").read_text())
    torch.save({k: torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}, tmp_path / "net.pth")
    supernet = linescan.load_checkpoint(build(), tmp_path / "net.pth")
    table, model = searched_directions(supernet, **changes)
    assert table == manifest["discretised_top4"]
    assert capsys.readouterr().out.splitlines()[1] == f"1: {' '.join(table[1])}"
    assert type(model) is type(supernet) and model(image(64, 96)).shape == (1, 10)
    scans = [m for m in model.modules() if isinstance(m, MultiRoute)]
    assert [[str(r) for r in scan.routes] for scan in scans] == [[CANDIDATES[name] for name in row] for row in table]
    assert not any(isinstance(m, DirectionSearch) for m in model.modules())
    assert model.feature_info[0]["num_chs"] == width
    with pytest.raises(ValueError, match="directions=None"):
        searched_directions(model)


def test_the_search_is_decayed_as_published():
    model = LocalVim(directions=None, **VIM)
    groups = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in groups[1]["params"]}
    mixer = model.blocks[0].mixer
    assert {id(mixer.along.merge.weights), id(mixer.A_log)} <= decayed
    assert not {id(mixer.D), id(mixer.dt_bias), id(mixer.conv_bias), id(model.pos_embed)} & decayed


# -- initialisation, checkpoints -------------------------------------------------------------------------------------


def test_published_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("local_vim_tiny", depth=4)
    mixer = model.blocks[1].mixer
    assert torch.all(mixer.dt_bias == 0) and torch.all(mixer.D == 1)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand_as(mixer.A_log))
    assert abs(mixer.x_proj.std().item() - 0.02) < 1e-3
    bound = (1 / 384) ** 0.5 / 4**0.5
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    steps = F.softplus(timm.create_model("local_vssm_tiny", depths=(1, 1, 1, 1)).stages[3].blocks[0].mixer.ssm.dt_bias)
    assert 0.9e-4 <= steps.min() and 0.08 < steps.max() <= 0.11


def official_vim():
    manifest = json.loads((DATA / "LocalMamba__micro_vim_rope.json").read_text())
    return {k: torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}


def micro_vim(cls=LocalVim, **kwargs):
    return cls(**{"embed_dim": 32, "depth": 3, "num_classes": 10, "directions": "row, -row, w2, -w7", **kwargs})


def test_the_directions_decays_stay_apart(tmp_path):
    """In the official code they share memory on a CPU, so that the last one loaded overwrites the others (issue 16)."""
    state = official_vim()
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    model = linescan.load_checkpoint(micro_vim(), tmp_path / "net.pth")
    for i in range(4):
        assert torch.equal(model.blocks[1].mixer.A_log[i], state[f"layers.1.mixer.A_log_{i}"])


def test_loading_is_strict(tmp_path):
    state = official_vim() | {"rope.freqs_cos": torch.zeros(196, 32), "rope.freqs_sin": torch.zeros(196, 32)}
    torch.save(state, tmp_path / "net.pth")
    linescan.load_checkpoint(micro_vim(), tmp_path / "net.pth")  # computed tables are no weights
    with pytest.raises(CheckpointError, match="unexpected"):
        linescan.load_checkpoint(micro_vim(directions="row, -row, w2"), tmp_path / "net.pth")
    with pytest.raises(CheckpointError):
        linescan.load_checkpoint(micro_vim(directions=None), tmp_path / "net.pth")
    with pytest.raises(CheckpointError):
        linescan.load_checkpoint(micro_vim(class_token=True), tmp_path / "net.pth")


def test_dense_models_start_from_a_classification_file(tmp_path):
    torch.save({"state_dict": official_vim()}, tmp_path / "net.pth")
    options = dict(embed_dim=32, depth=3, directions="row, -row, w2, -w7", img_size=64, out_indices=(0, -1))
    dense = linescan.load_checkpoint(dense_backbone("local_vim_tiny", **options), tmp_path / "net.pth")
    assert dense.trunk.pos_embed.shape == (1, 4, 4, 32) and torch.all(dense.trunk.blocks[0].norm1.bias == 0)
    assert [m.shape for m in dense.eval()(image(64, 96))] == [(1, 32, 4, 6)] * 2
    with pytest.raises(ValueError, match="norm_layer is one of"):
        micro_vim(norm_layer="batch")


def test_dense_hierarchical_maps():
    trunk = LocalVMamba(directions="row, -col", depths=(1, 1, 1, 1), dims=8, d_state=2, num_classes=0)
    dense = filled(DenseBackbone(trunk, (0, 3), norms="each"))
    assert [tuple(m.shape) for m in dense(image(64, 96))] == [(1, 8, 16, 24), (1, 64, 2, 3)]
    assert isinstance(dense.trunk.stages[0].blocks[0].mixer.ssm, LocalScan)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", [lambda: LocalVim(directions="w7, col", **VIM), lambda: LocalVMamba("w7, col", **VMAMBA)]
)
def test_compiles_and_exports_with_padding_on_maps_that_are_not_square(build):
    model, x = filled(build()), image(40, 56)
    with torch.no_grad():
        eager = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    assert torch.allclose(eager, compiled, atol=1e-5) and torch.allclose(eager, exported, atol=1e-5)
