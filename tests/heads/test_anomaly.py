"""MambaAD: sizes, batches, the frozen teacher, training, files; its outputs are golden data's (tests/parity)."""

import numpy as np
import pytest
import torch

import linescan
from linescan.errors import InputError
from linescan.heads.anomaly.mambaad import HybridStage, MambaAD, routes_of
from linescan.heads.anomaly.maps import distance_map, gaussian_blur

SMALL = dict(teacher="resnet18", directions=2, depths=(1, 2, 1, 1), d_state=2, drop_path_rate=0.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MambaAD(**SMALL)


def images(*size):
    return torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))


def test_sizes_alone_and_in_a_batch(model):
    model.eval()
    x = images(2, 64, 96)
    with torch.no_grad():
        targets, rebuilt = model(x)
        maps = model.anomaly_maps(x)
        shapes = [(2, 64, 16, 24), (2, 128, 8, 12), (2, 256, 4, 6)]
        assert [tuple(t.shape) for t in targets] == [tuple(t.shape) for t in rebuilt] == shapes
        assert maps.shape == (2, 64, 96)
        assert torch.allclose(maps, gaussian_blur(distance_map(targets, rebuilt, (64, 96)), 4.0), atol=1e-6)
        for i in range(2):
            assert torch.allclose(model.anomaly_maps(x[i : i + 1]), maps[i : i + 1], atol=1e-5)
    for size in ((64, 80), (32, 64)):
        with pytest.raises(InputError, match="multiples of 32, from 64 on, not {}x{}".format(*size)):
            model(images(1, *size))


def test_only_what_rebuilds_is_trained_and_checkpointing_changes_nothing(model):
    x, grads = images(2, 64, 64), []
    teacher = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        targets, rebuilt = model.train()(x)
        assert not model.teacher.training and not any(t.requires_grad for t in targets)
        sum((a - b).square().mean() for a, b in zip(targets, rebuilt)).backward()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if not n.startswith("teacher.")}
        assert not [n for n in trained if model.get_parameter(n).grad is None]
        grads.append([model.get_parameter(n).grad.clone() for n in sorted(trained)])
    model.set_grad_checkpointing(False)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads[0])
    assert all(torch.equal(teacher[name], value) for name, value in model.teacher.state_dict().items())


def test_drop_paths_fall_from_the_first_stage_to_the_last():
    torch.manual_seed(0)
    decoder = MambaAD(teacher="resnet18", directions=2, depths=(3, 4, 6, 3), d_state=1).decoder
    stages = [stage for level in decoder.levels for stage in level.blocks]
    assert [len(stage.scans.blocks) for stage in stages] == [3, 2, 2, 3, 3, 3]
    rates = np.linspace(0.2, 0, 16)
    expected = [rates[i] for i in (0, 3, 4, 7, 8, 13)]
    assert np.allclose([stage.scans.blocks[-1].drop_path.drop_prob for stage in stages], expected)


def test_bfloat16_training_step_and_export(model):
    x = images(2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        targets, rebuilt = model.train()(x)
        maps = model.anomaly_maps(x)
    assert maps.dtype == torch.float32 and all(y.isfinite().all() for y in rebuilt)
    program = torch.export.export(model.eval(), (x,))
    with torch.no_grad():
        for a, b in zip(program.module()(x)[1], model(x)[1]):
            assert torch.allclose(a, b, atol=1e-4)


def test_maps_are_those_of_scipy():
    from scipy.ndimage import gaussian_filter

    x = torch.rand(2, 9, 40, dtype=torch.float64)
    for sigma in (4.0, 1.4):
        expected = np.stack([gaussian_filter(one, sigma) for one in x.numpy()])
        assert np.abs(gaussian_blur(x, sigma).numpy() - expected).max() < 1e-12
    assert torch.equal(gaussian_blur(x, 0.0), x)
    a, b = torch.rand(2, 1, 3, 4, 5, dtype=torch.float64)
    same = distance_map([a, a], [a, -a], (4, 5))
    assert torch.allclose(same, torch.full_like(same, 2 / 4)), "the sum over levels, over their number squared"
    known = distance_map([a], [b], (7, 9))[0, ::2, ::2]
    assert torch.allclose(known, distance_map([a], [b], (4, 5))[0]), "corners are aligned"


def official_names(model):
    """Our keys -> the official ones, written out the other way round."""
    names = {}
    parts = {"down1": "1", "down2": "2", "lateral1": "21", "lateral2": "31", "fuse": "f"}
    for key in model.state_dict():
        part, _, rest = key.partition(".")
        if part == "teacher":
            names[key] = f"net_t.{rest}"
        elif part == "bottleneck":
            block, _, end = rest.partition(".")
            kind = {"0": "conv", "1": "bn"}.get(end[:1])
            names[key] = f"mff_oce.bn_layer.{end}" if block == "blocks" else f"mff_oce.{kind}{parts[block]}.{end[2:]}"
    return names


@pytest.mark.parametrize("spelling", ["7", "3"])
def test_files_of_the_authors_load_strictly(model, tmp_path, spelling):
    names, state = official_names(model), {}
    for key, value in model.state_dict().items():
        if key in names:
            state[names[key]] = value
            continue
        name = key.replace("decoder.levels", "net_s.layers_up").replace(".downsample.", ".upsample.")
        name = (
            name.replace(".scans.blocks.", ".smm_blocks.")
            .replace(".norm1.", ".ln_1.")
            .replace(".fuse.", ".finalconv11.")
        )
        for old, new in (("0", "conv1b{}.0"), ("3", "conv{}{}.0"), ("6", "conv1a{}.0")):
            for size in "57":
                own = spelling if size == "7" and old != "3" else size
                name = name.replace(f".local{size}.{old}.", f".{new.format(own, own)}.")
        name = name.replace(".mixer.ssm.x_proj", ".self_attention.x_proj_weight")
        name = name.replace(".mixer.ssm.dt_proj", ".self_attention.dt_projs_weight")
        name = name.replace(".mixer.ssm.dt_bias", ".self_attention.dt_projs_bias")
        name = name.replace(".mixer.ssm.A_log", ".self_attention.A_logs").replace(".mixer.ssm.D", ".self_attention.Ds")
        name = name.replace(".mixer.conv.", ".self_attention.conv2d.").replace(".mixer.", ".self_attention.")
        state[name] = value[:, :, None, None] if name.endswith("finalconv11.weight") else value
    first = "net_s.layers_up.0.blocks.0."
    state[f"{first}smm_blocks.0.self_attention.scans.index_flat"] = torch.zeros(1, 1, 4, dtype=torch.long)
    if spelling == "3":
        state[f"{first}conv33.0.weight"] = torch.zeros(1)
    torch.save({"net": state, "optimizer": {}, "epoch": 3}, tmp_path / "ckpt.pth")
    torch.manual_seed(5)
    other = linescan.load_checkpoint(MambaAD(**SMALL), tmp_path / "ckpt.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    linescan.load_checkpoint(other, tmp_path / "own.pth")
    state["net_s.more"] = torch.zeros(1)
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(linescan.CheckpointError, match="1 unexpected .first: decoder.more"):
        linescan.load_checkpoint(other, tmp_path / "more.pth")


def test_what_cannot_be_built():
    assert routes_of("zigzag", 4) == "zigzag, T:zigzag, -zigzag, -T:zigzag"
    assert routes_of("row", 8).split(", ")[3] == "rot90:T:row"
    with pytest.raises(InputError, match="directions.*2, 4, 8"):
        routes_of("hilbert", 3)
    with pytest.raises(InputError, match="vit_tiny_patch16_224 cannot be a teacher"):
        MambaAD("vit_tiny_patch16_224")
    with pytest.raises(InputError, match="no_such_net cannot be a teacher"):
        MambaAD("no_such_net")
    assert HybridStage(8, 1, "hilbert")(torch.rand(1, 3, 5, 8)).shape == (1, 3, 5, 8)
