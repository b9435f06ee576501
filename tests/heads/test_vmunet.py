"""VM-UNet with multi-head scans: sizes, channels, training, files; its outputs are golden data's (tests/parity)."""

import numpy as np
import pytest
import torch

import linescan
from linescan.errors import InputError
from linescan.heads.vmunet import VMUNet, multi_head_ss2d
from linescan.layers.ss2d import ROUTE_FAMILIES, SS2D, MultiHeadScan
from linescan.scans import routes

SMALL = dict(dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), depths_decoder=(1, 1, 1, 1), d_state=2, drop_path_rate=0.0)


@pytest.fixture(scope="module")
def model():
    """With other weights than at the start, where routes agree and their attention is closed."""
    torch.manual_seed(0)
    model = VMUNet(num_classes=2, **SMALL).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return model


def images(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_any_size_and_one_channel(model):
    model.eval()
    with torch.no_grad():
        x = images(2, 3, 45, 70)
        y = model(x)
        assert y.shape == (2, 2, 45, 70)
        assert torch.allclose(model(x[:1]), y[:1], atol=1e-8)
        mirrored = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 19), (0, 26)), "symmetric"))
        assert torch.equal(model(mirrored)[..., :45, :70], y), "mirrored at the bottom and the right, and cut there"
        grey = images(1, 1, 32, 33)
        assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))


def test_every_parameter_takes_part_in_training(model):
    x, grads = images(2, 3, 64, 64), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    model.set_grad_checkpointing(False)
    assert all(torch.allclose(a, b) for a, b in zip(*grads))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads[0])


def official(model):
    """The state under the official names."""
    state = {}
    for key, value in model.state_dict().items():
        for new, old in (
            ("patch_embed.conv", "patch_embed.proj"), ("merges.", "layers.D."), ("encoder.", "layers."),
            ("decoder.", "layers_up."), ("expands.", "layers_up.U."), ("final_expand.", "final_up."),
            (".mixer.", ".self_attention."), (".ssm.", ".mhs."), (".norm1.", ".ln_1."),
            (".mhs.in_proj", ".mhs.x_ssproj"), (".mhs.out_proj", ".mhs.y_proj"),
            (".mhs.norm", ".mhs.cat_norm"), ("attention.conv.", "attention.conv2d."),
        ):  # fmt: skip
            key = key.replace(new, old)
        if key.startswith("layers.D."):
            level, rest = key[9], key[11:]
            key = f"layers.{level}.downsample.{rest}"
        if key.startswith("layers_up.U."):
            key = f"layers_up.{int(key[12]) + 1}.upsample.{key[14:]}"
        if key.startswith("head."):
            key = key.replace("head.", "final_conv.")
        if ".heads." in key:
            before, _, after = key.partition(".heads.")
            number, _, name = after.partition(".")
            names = {"x_proj": "x_proj_weight", "dt_proj": "dt_projs_weight", "dt_bias": "dt_projs_bias",
                     "A_log": "A_logs", "D": "Ds"}  # fmt: skip
            key = f"{before}.scanhead_{'CXSZ'[int(number)]}.mambaeng.{names[name]}"
            value = value.flatten(0, 1) if name in ("A_log", "D") else value
        state[f"vmunet.{key}"] = value
    return state


def test_published_files_load_with_what_they_hold_twice(model, tmp_path):
    state = official(model)
    block = "vmunet.layers.0.blocks.0.self_attention"
    engine = f"{block}.mhs.scanhead_S.mambaeng.dt_projs_bias"
    twice = {
        engine.replace("mambaeng", "scanning.seq2seq_engine"): state[engine],
        f"{block}.mhs.x_ssproj_W": torch.zeros_like(state[f"{block}.mhs.x_ssproj.weight"]),
        f"{block}.total_ops": torch.zeros(1),
        "total_params": torch.zeros(1),
    }
    torch.save({"model_state_dict": state | {engine: torch.zeros_like(state[engine])} | twice}, tmp_path / "latest.pth")
    other = linescan.load_checkpoint(VMUNet(num_classes=2, **SMALL).double(), tmp_path / "latest.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    linescan.load_checkpoint(other, tmp_path / "own.pth")
    torch.save(state | {"vmunet.layers.9.x": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(linescan.CheckpointError, match="1 unexpected .first: encoder.9.x"):
        linescan.load_checkpoint(other, tmp_path / "more.pth")


def test_multi_head_scans_are_a_layer_of_any_backbone():
    torch.manual_seed(0)
    mixer = SS2D(12, list(ROUTE_FAMILIES.values()), d_state=2, scan_layer=MultiHeadScan, merge="mean").double()
    x = images(1, 3, 5, 12)
    y, state = mixer.ssm(mixer.in_proj(x).chunk(2, -1)[0], return_final_state=True)
    assert y.shape == (1, 3, 5, 24) and state.shape == (1, 16, 6, 2)
    assert mixer(x).shape == x.shape
    # Tables given from outside, and states passed on, are those of the heads one after the other.
    u = images(1, 15, 24)
    table = routes.table(", ".join(ROUTE_FAMILIES.values()), (3, 5))
    scan = mixer.ssm
    assert torch.allclose(scan(u, (3, 5)), scan(u, route=table))
    line = torch.arange(15).expand(16, -1)
    whole = scan(u, route=line.int())
    first, state = scan(u[:, :9], route=line[:, :9].int(), return_final_state=True)
    rest = scan(u[:, 9:], route=line[:, :6].int(), initial_state=state)
    assert torch.allclose(torch.cat([first, rest], 1), whole)
    with pytest.raises(InputError, match="10 channels do not divide into 4 heads"):
        MultiHeadScan(10, project=False)
    with pytest.raises(InputError, match="letters of CXSZ, not 'CQ'"):
        multi_head_ss2d(8, "CQ")
    with pytest.raises(InputError, match="SS2D without a projection"):
        SS2D(8, project_out=False)


def test_the_segmenter_takes_it_by_name(tmp_path):
    import numpy as np

    torch.manual_seed(0)
    args = {**SMALL, "drop_path_rate": 0.0}
    network = VMUNet(**args).eval()
    torch.save(network.state_dict(), tmp_path / "binary.pth")
    segment = linescan.Segmenter("mhsvm_vmunet_4h", tmp_path / "binary.pth", device="cpu", **args)
    image = np.random.default_rng(0).integers(50, 90, (40, 60, 3), dtype=np.uint8)
    mask = segment(image)
    assert mask.shape == (40, 60) and len(segment.classes) == 2
    prepared = torch.from_numpy(segment.model.prepare(image)).movedim(-1, 0)[None].float()
    assert prepared.shape == (1, 3, 256, 256)
    stretched = (prepared - prepared.min()) / (prepared.max() - prepared.min()) * 255
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(network(stretched), (40, 60), mode="bilinear")[0, 0]
    agree = (torch.from_numpy(mask) == (wanted > 0)).float().mean()
    assert agree > 0.99
