"""MambaVision beyond the contract and the golden data: mixer and windows by definition, files, licence, errors."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import linescan
from linescan import zoo
from linescan.backbones.feature_maps import dense_backbone
from linescan.backbones.mambavision import MambaVision, MambaVisionMixer, WindowedStage, from_windows, to_windows
from linescan.engine.cards import preprocess_of
from linescan.layers.attention import SelfAttention
from linescan.layers.blocks import Block
from tests.parity import recipe

DATA = Path(recipe.__file__).parent / "data"
GOLDEN = dict(
    stem_dim=8, dims=16, depths=(1, 1, 3, 2), num_heads=(1, 2, 2, 4), windows=(8, 8, 7, 4), init_layer_scale=1e-5
)


def seeded(module, std=0.3):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double()


def official():
    manifest = recipe.load_manifest(DATA / "mambavision__tiny.json")
    return {k: torch.from_numpy(v) for k, v in recipe.state_dict(manifest).items()}


def test_the_mixer_scans_half_of_the_channels_with_the_steps_bias_twice():
    mixer = seeded(MambaVisionMixer(16))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    both = F.conv1d(mixer.in_proj(x).mT, mixer.conv.weight[:, :, 0], padding=1, groups=16).mT
    u, z = F.silu(both).chunk(2, -1)
    dt, B, C = F.linear(u, mixer.x_proj[0]).split([1, 8, 8], -1)
    steps = F.softplus(F.linear(dt, mixer.dt_proj[0]) + 2 * mixer.dt_bias[0])
    state, outputs = torch.zeros(2, 8, 8, dtype=torch.float64), []
    for t in range(9):
        decay = torch.exp(-steps[:, t, :, None] * mixer.A_log[0].exp())
        state = decay * state + (steps[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1) + mixer.D[0] * u[:, t])
    want = mixer.out_proj(torch.cat([torch.stack(outputs, 1), z], -1))
    got, last = mixer(x, return_final_state=True)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10) and torch.allclose(last[:, 0], state)


@pytest.mark.parametrize("grid", [(4, 8), (5, 7), (3, 2), (8, 8)])
def test_windows_are_row_major_and_padded_with_tokens_that_take_part(grid):
    x = torch.arange(2.0 * grid[0] * grid[1]).reshape(2, *grid, 1) + 1
    windows = to_windows(x, 4)
    rows, columns = -(-grid[0] // 4), -(-grid[1] // 4)
    assert windows.shape == (2 * rows * columns, 16, 1)
    padded = F.pad(x, (0, 0, 0, 4 * columns - grid[1], 0, 4 * rows - grid[0]))
    last = windows.view(2, rows, columns, 4, 4)[1, -1, -1]
    assert torch.equal(last, padded[1, -4:, -4:, 0])
    assert torch.equal(from_windows(windows, 4, grid), x)
    assert to_windows(x[:0], 4).shape[0] == 0 and from_windows(windows[:0], 4, grid).shape == (0, *grid, 1)

    block = Block(4, SelfAttention(4, 2))
    stage = seeded(WindowedStage(None, [block], 4))
    x = torch.randn(1, *grid, 4, dtype=torch.float64)
    filled = F.pad(x, (0, 0, 0, 4 * columns - grid[1], 0, 4 * rows - grid[0]))
    corner = block(filled[:, -4:, -4:].flatten(1, 2)).unflatten(1, (4, 4))
    got = stage(x)[:, 4 * rows - 4 :, 4 * columns - 4 :]
    assert torch.allclose(got, corner[:, : got.shape[1], : got.shape[2]])


def test_the_first_half_of_a_stage_scans_and_the_rest_attends():
    model = MambaVision(stem_dim=8, dims=16, depths=(1, 1, 7, 4), num_heads=(1, 1, 2, 2))
    kinds = [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages[2:]]
    assert kinds[0] == ["MambaVisionMixer"] * 4 + ["SelfAttention"] * 3
    assert kinds[1] == ["MambaVisionMixer"] * 2 + ["SelfAttention"] * 2


def test_published_initialisation_and_weight_decay():
    torch.manual_seed(0)
    model = MambaVision(stem_dim=8, dims=64, depths=(1, 1, 2, 1))
    mixer = model.stages[2].blocks[0].mixer
    for weight in (mixer.x_proj, mixer.dt_proj, mixer.in_proj.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not mixer.dt_bias.any() and torch.all(mixer.D == 1)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 9).expand_as(mixer.A_log))
    assert model.patch_embed[1].eps == 1e-4 and model.stages[0].blocks[0].mixer.norm1[0].eps == 1e-5
    skipped = {name.rpartition(".")[2] for name in model.no_weight_decay()}
    assert skipped == {"A_log", "D", "dt_bias"}


def test_a_dense_model_takes_the_classifiers_file_and_the_authors_own(tmp_path):
    state = official()
    torch.save({"state_dict": state}, tmp_path / "classifier.pth.tar")
    model = linescan.load_checkpoint(MambaVision(num_classes=10, **GOLDEN), tmp_path / "classifier.pth.tar").eval()
    dense = dense_backbone("mambavision_tiny", **GOLDEN).eval()
    dropped, new = dense.load_pretrained(tmp_path / "classifier.pth.tar")
    assert {name.split(".")[1] for name in dropped} == {"norm", "head"} and len(new) == 8
    x = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        maps = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        for got, want, side in zip(dense(x), maps, (18, 9, 5, 3)):
            assert got.shape[2] == side and torch.allclose(
                got.movedim(1, -1), F.layer_norm(want, want.shape[-1:]), atol=1e-4
            )
    inner = {f"backbone.{k}": v for k, v in state.items() if not k.startswith(("norm.", "head."))}
    inner |= {f"backbone.outnorm{i}.{n}": torch.full((16 * 2**i,), 2.0) for i in range(4) for n in ("weight", "bias")}
    torch.save({"state_dict": inner}, tmp_path / "segmentor.pth")
    linescan.load_checkpoint(dense, tmp_path / "segmentor.pth")
    assert torch.all(dense.norms["3"].bias == 2)
    del state["levels.2.blocks.0.mixer.conv1d_z.weight"]
    torch.save(state, tmp_path / "classifier.pth.tar")
    with pytest.raises(linescan.CheckpointError, match="levels.2.blocks.0.mixer.conv1d_z.weight"):
        linescan.load_checkpoint(model, tmp_path / "classifier.pth.tar")


def test_whoever_fetches_weights_reads_that_they_are_not_for_commercial_use(capsys, tmp_path, monkeypatch):
    names = [name for name in linescan.list_models("mambavision")]
    every = [entry for name in names for entry in zoo.tags(name)]
    assert len(names) == 7 and len(every) == 11
    assert all(entry.terms == "non-commercial" and entry.fetchable for entry in every)
    torch.save({"state_dict": official()}, tmp_path / "mambavision_tiny_1k.pth.tar")
    file = SimpleNamespace(path=tmp_path / "mambavision_tiny_1k.pth.tar", url="")
    monkeypatch.setattr(zoo, "_Hub", lambda entry, cache_dir: file)
    monkeypatch.setattr(zoo, "_said", set())
    model = timm.create_model("mambavision_tiny", pretrained=True, num_classes=10, **GOLDEN)
    assert "licence NVIDIA-NC, for non-commercial use only" in capsys.readouterr().err
    assert torch.equal(model.head.weight, official()["head.weight"])


def test_a_tag_decides_the_windows_and_the_size_of_images():
    large = zoo.find("mambavision_large2.in21k_ft_in1k_512")
    assert large.inputs == ((3, 512, 512),) and large.args["windows"] == (8, 8, 32, 16)
    model = timm.create_model("mambavision_large3.in21k_ft_in1k_512", device="meta")
    assert model.pretrained_cfg["license"] == "nvidia-nc"
    how = preprocess_of(model)
    assert how.size == (3, 512, 512) and how.crop_mode == "squash" and how.crop_pct == 0.93


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(windows=(8, 8)), "windows gives 2 stages, depths 4"),
        (dict(dims=(16, 32)), "dims gives 2 stages, depths 4"),
        (dict(dims=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 5, 1)), "num_heads divides the channels"),
        (dict(dims=(8, 8, 9, 16)), "half of the channels is scanned: 9 is odd"),
    ],
)
def test_impossible_models_are_refused_in_one_line(options, message):
    with pytest.raises(linescan.InputError, match=message):
        MambaVision(**options)
