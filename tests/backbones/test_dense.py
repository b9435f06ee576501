"""Dense backbones of every class: what they return, hold and train, and what they refuse."""

import pytest
import torch
from torch import nn

import linescan
from linescan.backbones.contract import architecture
from linescan.backbones.feature_maps import dense_backbone
from linescan.zoo import list_models

from ..building import uninitialised
from .test_contract import narrow

NAMES = [name for name in list_models(task="classification") if "_video" not in name]
NARROW_LAST = sorted(NAMES, key=lambda name: "stride" not in name and ("_tiny" in name or "_b0" in name))
NAMES = sorted({architecture(name)[0]: name for name in NARROW_LAST}.values())
PLAIN = [name for name in NAMES if architecture(name)[0].unit_name == "blocks"]


def dense(name, **kwargs):
    """A shallow dense backbone, less wide where it is wide."""
    torch.manual_seed(0)
    cls = architecture(name)[0]
    kwargs = {**narrow(name), **kwargs}
    if cls.unit_name == "blocks":
        kwargs = {"depth": 4, "img_size": 64, **kwargs}
        if cls.dense.neck != "adapter":
            kwargs.setdefault("out_indices", (0, 1, 2, 3))
    else:
        kwargs = {"depths": (1, 1, 1, 1), **kwargs}
    return dense_backbone(name, **kwargs)


def without_gradient(model, x):
    sum(y.square().sum() for y in model(x)).backward()
    return [key for key, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    x = torch.randn(2, 3, 64, 64)
    model = dense(name).train()
    assert without_gradient(model, x) == []
    for options in ({"norms": "each"}, {"norms": None}, {"norms": "last"}):
        model = dense(name, neck=None, **{"out_indices": (0, 2), **options}).train()
        assert without_gradient(model, x) == [], options
        assert len(model.trunk.units) == 3, "nothing stands behind the last wanted unit"
        assert list(model.norms) == (["0", "2"] if options["norms"] == "each" else [])
        assert isinstance(model.trunk.head, nn.Identity)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("tap", ["stream", "mixer"])
def test_taps(name, tap):
    model = dense(name, neck=None, norms=None, tap=tap, out_indices=(1, 2)).eval()
    x, streams, mixed = torch.randn(1, 3, 64, 64), [], []
    for block in model.trunk.blocks:
        block.register_forward_hook(lambda module, args, output: streams.append(output))
        last = block.scale1 or (block.norm1 if block.post_norm else block.mixer)
        last.register_forward_hook(lambda module, args, output: mixed.append(output))
    with torch.no_grad():
        maps = model(x)
    assert len(streams) == 3, "the blocks' own forward runs, and no more of them than needed"
    for y, i in zip(maps, (1, 2)):
        want = mixed[i] if tap == "mixer" else streams[i]
        assert torch.equal(y.flatten(2).mT, model.trunk.patch_tokens(want))
    model.train()
    assert without_gradient(model, x) == []


@pytest.mark.parametrize(
    "name, options",
    [*((name, {"stride": 16} if "rsmamba" in name else {}) for name in PLAIN), ("vig_tiny", {"scan": "zigzag"})],
)
def test_adapters_take_any_stream_and_any_sides(name, options):
    if name.startswith(("videomamba", "inline_deit")):
        with pytest.raises(ValueError, match="an adapter needs .* no class token"):
            dense(name, neck="adapter")
        return
    neck = {"type": "adapter", "num_heads": 4, "width": 8}
    model = dense(name, neck=neck, out_indices=None, **options).eval()
    assert model.strides == [4, 8, 16, 32]
    x, after = torch.randn(1, 3, 65, 97), []
    for interaction in model.neck.interactions:
        interaction.register_forward_hook(lambda module, args, output: after.append(output[0]))
    with torch.no_grad():
        maps = model(x)
        assert [y.shape[-2:] for y in maps] == [(-(-65 // s), -(-97 // s)) for s in model.strides]
        padded = nn.functional.pad(x, (0, 31, 0, 31))  # an adapter starts without a part in the stream
        want = model.trunk.forward_intermediates(padded, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(after, want, strict=True)), "tokens are row-major on both sides"


@pytest.mark.parametrize("neck", ["rescaled", "simple", "adapter"])
def test_necks_are_for_plain_backbones_of_their_stride(neck):
    with pytest.raises(ValueError, match=f"neck '{neck}' is for plain backbones: a VMamba has maps of several strides"):
        dense("vmamba_tiny_s1l8", neck=neck)
    if neck == "rescaled":
        assert dense("vim_tiny_patch16_224", neck=neck, stride=8).strides == [4, 8, 16, 32]
        with pytest.raises(ValueError, match="images of at least 32x32 pixels"):
            dense("vim_tiny_patch16_224", neck=neck)(torch.zeros(1, 3, 16, 64))
    else:
        with pytest.raises(ValueError, match="pyramid exists for patch size 16, not 8|needs patches of 16 pixels"):
            dense("vim_tiny_patch16_224", neck=neck, stride=8)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_fire_with_the_maps(name):
    model = dense(name).eval()
    x, seen = torch.randn(1, 3, 64, 96), {}
    for i, info in enumerate(model.feature_info):
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda module, args, output, i=i: seen.setdefault(i, output))
    with torch.no_grad():
        maps = model(x)
    for i, (y, channels, stride) in enumerate(zip(maps, model.out_channels, model.strides)):
        assert y.shape == (1, channels, -(-64 // stride), -(-96 // stride))
        assert torch.equal(seen[i] if seen[i].shape == y.shape else seen[i].movedim(-1, 1), y)


@pytest.mark.parametrize("name", NAMES)
def test_own_files_load_strictly_at_another_size(name, tmp_path):
    with uninitialised():
        model, other = dense(name), dense(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    state = model.state_dict()
    torch.save(state, tmp_path / "dense.pth")
    linescan.load_checkpoint(other, tmp_path / "dense.pth")
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key
    if model.trunk.pos_embed is not None:
        with uninitialised():
            larger = dense(name, img_size=(96, 64))
        linescan.load_checkpoint(larger, tmp_path / "dense.pth")
        assert larger.trunk.native_grid == larger.trunk.grid_of(96, 64)
    state.pop(next(iter(state)))
    torch.save(state, tmp_path / "dense.pth")
    with pytest.raises(linescan.CheckpointError, match="1 keys missing"):
        linescan.load_checkpoint(other, tmp_path / "dense.pth")
    torch.save(model.state_dict() | {"trunk.extra": torch.zeros(1)}, tmp_path / "dense.pth")
    with pytest.raises(linescan.CheckpointError, match="1 unexpected .first: trunk.extra"):
        linescan.load_checkpoint(other, tmp_path / "dense.pth")


def test_positions_of_a_file_whose_grid_is_not_square(tmp_path):
    """A file of the authors keeps tokens: their grid has to be told, to a dense backbone as to a classifier."""
    wide, model = dense("vig_tiny", img_size=(64, 128)), dense("vig_tiny", img_size=96)
    nn.init.normal_(wide.trunk.pos_embed)
    state = {key.removeprefix("trunk."): value for key, value in wide.state_dict().items()}
    torch.save(state | {"pos_embed": state["pos_embed"].flatten(1, 2)}, tmp_path / "official.pth")
    with pytest.raises(linescan.CheckpointError, match="make no square: give the img_size"):
        model.load_pretrained(tmp_path / "official.pth")
    model.load_pretrained(tmp_path / "official.pth", img_size=(64, 128))
    table = wide.trunk.pos_embed.permute(0, 3, 1, 2)
    want = nn.functional.interpolate(table, (6, 6), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.trunk.pos_embed, want)


def test_a_model_of_clips_is_refused():
    with pytest.raises(ValueError, match="this VideoMamba reads clips: a dense backbone needs one that reads images"):
        dense_backbone("videomamba_video_tiny_patch16_224", depth=1)
