"""SegMAN's decoder and the whole model; and the same decoder in mmseg, where that is installed."""

import json
from pathlib import Path

import pytest
import torch

import linescan
from linescan.heads.segman import SegMAN, SegMANDecoder
from tests.parity import recipe

DATA = Path(__file__).parents[1] / "parity" / "data"
ENCODER = dict(
    img_size=96, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), windows=(7, 5, 3, 3),
    mlp_ratios=(4, 4, 3.4, 3.4), init_layer_scale=(0, 0, 1e-6, 1e-6),
)  # fmt: skip
HEAD = dict(channels=16, feat_proj_dim=24, num_classes=7)


def write_official(path):
    manifest = json.loads((DATA / "segman__tiny_seg.json").read_text())
    state = {key: torch.from_numpy(value) for key, value in recipe.state_dict(manifest).items()}
    state |= {key: torch.tensor(value) for key, value in manifest["constants"].items()}
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("segman") / "tiny_seg.pth")


def test_every_parameter_takes_part_in_training():
    torch.manual_seed(0)
    model = SegMAN(ENCODER, **HEAD).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    logits = model(torch.randn(2, 3, 96, 128))
    assert logits.shape == (2, 7, 96, 128)
    torch.nn.functional.cross_entropy(logits, torch.randint(7, (2, 96, 128))).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_bfloat16_training_step():
    torch.manual_seed(0)
    model = SegMAN(ENCODER, **HEAD).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 96, 96)).float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_own_files_load_again(file, tmp_path):
    model = linescan.load_checkpoint(SegMAN(ENCODER, **HEAD), file).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pth")
    other = linescan.load_checkpoint(SegMAN(ENCODER, **HEAD), tmp_path / "own.pth").eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_a_key_that_belongs_nowhere_is_an_error(file, tmp_path):
    content = torch.load(file)
    for key in ("auxiliary_head.conv_seg.bias", "decode_head.linear_c1.proj.bias"):
        torch.save({"state_dict": content["state_dict"] | {key: torch.zeros(7)}}, tmp_path / "more.pth")
        with pytest.raises(linescan.CheckpointError, match=f"1 unexpected .first: {key}"):
            linescan.load_checkpoint(SegMAN(ENCODER, **HEAD), tmp_path / "more.pth")


def test_sides_that_32_does_not_divide():
    model = SegMAN(ENCODER, **HEAD).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 97, 113)).shape == (1, 7, 97, 113)
        maps = [torch.randn(1, c, -(-70 // s), -(-90 // s)) for c, s in zip((16, 32, 48, 64), (4, 8, 16, 32))]
        decoder = SegMANDecoder((16, 32, 48, 64), **HEAD).eval()
        assert decoder(maps).shape == (1, 7, 9, 12)


def test_images_that_do_not_fit_get_one_clear_line():
    model = SegMAN(ENCODER, **HEAD).eval()
    with pytest.raises(ValueError, match="at least 65x65 pixels, got 64x64") as caught:
        model(torch.randn(1, 3, 64, 64))
    assert "\n" not in str(caught.value)
    maps = [torch.randn(1, c, 8 * s, 9 * s) for c, s in zip((16, 32, 48, 64), (8, 4, 2, 1))]
    decoder = SegMANDecoder((16, 32, 48, 64), **HEAD).eval()
    assert decoder(maps).shape == (1, 7, 32, 36)
    with pytest.raises(ValueError, match="expects four maps"):
        decoder(maps[1:])


@pytest.mark.parametrize("name, params", [
    ("segman_seg_tiny", 6.397), ("segman_seg_small", 29.425), ("segman_seg_base", 51.803), ("segman_seg_large", 92.336),
])  # fmt: skip
def test_published_models_have_the_published_size(name, params):
    with torch.device("meta"):
        model = linescan.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params


def test_mmseg_builds_the_model_and_loads_the_official_file(file):
    pytest.importorskip("mmseg.models.segmentors")
    from mmengine.registry import MODELS, DefaultScope

    import linescan.openmmlab  # noqa: F401
    import linescan.openmmlab.segman  # noqa: F401

    head = dict(type="SegMANDecoder", in_channels=[16, 32, 48, 64], norm_cfg=dict(type="SyncBN"), **HEAD)
    backbone = dict(type="LinescanBackbone", model="segman_tiny", **ENCODER)
    config = dict(type="mmseg.EncoderDecoder", backbone=backbone, decode_head=head, test_cfg=dict(mode="whole"))
    with DefaultScope.overwrite_default_scope("mmseg"):  # as a runner's, whatever was built before in this process
        segmentor = MODELS.build(config).eval()
    assert isinstance(segmentor.decode_head.cat.bn, torch.nn.SyncBatchNorm)
    segmentor.load_state_dict(torch.load(file)["state_dict"])
    model = linescan.load_checkpoint(SegMAN(ENCODER, **HEAD), file).eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        maps = model.forward_features(x)
        assert torch.equal(segmentor(x), model.decode_head(maps))
    assert sum(p.numel() for p in segmentor.parameters()) == sum(p.numel() for p in model.parameters())

    for wrong, message in (
        ({"norm_cfg": dict(type="GN")}, "norm_cfg's type is 'BN' or 'SyncBN', not 'GN'"),
        ({"in_channels": [16, 32]}, "reads four maps"),
    ):
        with pytest.raises(ValueError, match=message):
            MODELS.build(head | wrong)
