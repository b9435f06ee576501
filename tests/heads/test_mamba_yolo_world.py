"""Mamba-YOLO-World: sizes, batches, prompts, training, files; its outputs are golden data's (tests/parity)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import linescan
from linescan.errors import InputError
from linescan.heads.detection.mamba_yolo_world import Contrast, GuidedScan, MambaYOLOWorld, as_guide
from linescan.layers.mamba import Mamba2Mixer

SMALL = {
    "width": 0.125, "last_chans": 256, "text_dim": 32, "d_state": 8, "head_dim": 16, "num_classes": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MambaYOLOWorld(**SMALL).eval()


def images(*size):
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))


def prompts(n, batch=()):
    return F.normalize(torch.randn(*batch, n, 32, generator=torch.Generator().manual_seed(2)), dim=-1)


@torch.no_grad()
def test_any_size_alone_or_in_a_batch(model):
    for height, width in ((64, 96), (45, 71)):
        x, text = images(2, 3, height, width), prompts(4, (2,))
        levels = model(x, text)
        sizes = [(-(-height // s), -(-width // s)) for s in model.strides]
        assert [tuple(y.shape) for y in levels.logits] == [(2, 4, *size) for size in sizes]
        assert [tuple(y.shape) for y in levels.distances] == [(2, 4, *size) for size in sizes]
        for i in range(2):
            alone = model(x[i : i + 1], text[i : i + 1])
            for ours, theirs in zip([*alone.logits, *alone.bins], [*levels.logits, *levels.bins]):
                torch.testing.assert_close(ours, theirs[i : i + 1], rtol=1e-4, atol=1e-4)
    same = model(x, text[0])
    torch.testing.assert_close(same.logits[0][0], levels.logits[0][0], rtol=1e-4, atol=1e-4)
    assert all(0 <= d.min() and d.max() <= 15 for d in levels.distances)


@torch.no_grad()
def test_prompts_are_scanned_in_order_and_change_the_boxes(model):
    model = copy.deepcopy(model).double()  # as initialised, little of a guide reaches the boxes
    x, text = images(1, 3, 64, 64).double(), prompts(3).double()
    levels, turned = model(x, text), model(x, text.flip(0))
    assert not torch.allclose(levels.logits[0], turned.logits[0].flip(1), atol=1e-5)
    assert not torch.allclose(levels.bins[0], model(x, text[:2]).bins[0], rtol=0, atol=1e-10)
    assert model(x, text[:1]).logits[0].shape[1] == 1 and model(x, prompts(200).double()).logits[2].shape[1] == 200
    for wrong in (text[:, :-1], text[:0], prompts(3, (2,)), text[0]):
        with pytest.raises(InputError, match=r"embeddings of prompts are \(prompts, 32\)"):
            model(x, wrong)
    with pytest.raises(InputError, match="keeps no vocabulary"):
        model(x)


def test_scores_do_not_follow_the_length_of_embeddings():
    torch.manual_seed(0)
    contrast, x, text = Contrast(8, -1.0).eval(), torch.randn(1, 8, 3, 3), torch.randn(1, 2, 8)
    torch.testing.assert_close(contrast(x, 7 * text), contrast(x, text))
    assert not torch.allclose(contrast(7 * x, text), contrast(x, text)), "but that of an image's features"


@torch.no_grad()
def test_a_guide_is_read_first_on_every_route():
    torch.manual_seed(0)
    scan, x, guide = GuidedScan(8, d_state=3, dt_rank=2).double(), images(1, 2, 3, 8).double(), images(1, 2, 8).double()
    torch.nn.init.normal_(scan.D)
    y, state = scan(x, None, guide, return_final_state=True)
    tokens, expected = x.flatten(1, 2)[0], torch.zeros(6, 8).double()
    for k, order in enumerate(([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0])):
        h = torch.zeros(2, 4, 3).double()
        steps = [(guide[0, i], scan.guide_proj[k], None) for i in range(2)]
        for u, weight, place in steps + [(tokens[i], scan.x_proj[k], i) for i in order]:
            dt, B, C = (weight @ u).split([2, 3, 3])
            dt = F.softplus(dt + scan.dt_bias[k])
            decay = torch.exp(-scan.A_log[k].exp() * dt)[:, None, None]
            h = decay * h + dt[:, None, None] * u.view(2, 4, 1) * B
            if place is not None:
                expected[place] += (h @ C + scan.D[k] * u.view(2, 4)).flatten()
        torch.testing.assert_close(state[0, k].mT, h)
    torch.testing.assert_close(y.flatten(1, 2)[0], expected)


def test_guides_pass_no_gradient_on():
    state = torch.randn(2, 4, 3, 5, 7, requires_grad=True)  # (B, routes, heads, N, P)
    guide = as_guide(state)
    assert guide.shape == (2, 4 * 3 * 7, 5) and not guide.requires_grad
    torch.testing.assert_close(guide[1, 2 * 21 + 1 * 7 + 6, 4], state[1, 2, 1, 4, 6].detach())


@torch.no_grad()
def test_mamba2_goes_on_from_its_state_and_along_any_route():
    torch.manual_seed(0)
    mixer, x = Mamba2Mixer(16, d_state=4, head_dim=8).double(), images(2, 7, 16).double()
    whole, last = mixer(x, return_final_state=True)
    first, state = mixer(x[:, :4], return_final_state=True)
    second, state = mixer(x[:, 4:], initial_state=state, return_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)
    back = mixer(x.flip(1), route=torch.arange(6, -1, -1, dtype=torch.int32)[None]).flip(1)
    torch.testing.assert_close(back, whole)
    with pytest.raises(InputError, match="do not divide into heads"):
        Mamba2Mixer(16, head_dim=12)


def test_every_parameter_takes_part_in_training():
    torch.manual_seed(0)
    model = MambaYOLOWorld(**SMALL, bins=4).train()
    with torch.autocast("cpu", torch.bfloat16):
        levels = model(images(2, 3, 64, 64), prompts(4))
    (
        sum(x.float().square().mean() for x in levels.logits) + sum(d.square().mean() for d in levels.distances)
    ).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters())


def official(model):
    """A state under the official names, with the text encoder that the official files carry, too."""
    import re

    out = {"backbone.text_model.model.text_projection.weight": torch.zeros(4, 4)}
    rules = (
        (r"^backbone\.stages\.(\d)", lambda m: f"backbone.image_model.stage{int(m[1]) + 1}"),
        (r"^backbone\.stem", "backbone.image_model.stem"), (r"^bbox_head\.", "bbox_head.head_module."),
        (r"\.fusion\.norm1\.", ".fusion.norm."), (r"\.local\.conv\.", ".lsblock.fc1."),
        (r"\.local\.fc([12])\.", lambda m: f".lsblock.fc{int(m[1]) + 1}."), (r"\.local\.norm\.0\.", ".lsblock.norm."),
        (r"\.mixer\.conv\.", ".mixer.conv2d.1."), (r"\.ssm\.x_proj", ".x_proj_weight"), (r"\.ssm\.D$", ".Ds"),
        (r"\.ssm\.guide_proj", ".guide_hidden_proj_weight"), (r"\.ssm\.dt_bias", ".dt_projs_bias"),
        (r"\.ssm\.A_log", ".A_logs"), (r"\.mixer\.", ".ss2d.0."), (r"\.fusion\.", ".textGuidedVSSBlock."),
        (r"\.conv_(weight|bias)$", r".conv1d.\1"),
    )  # fmt: skip
    for key, value in model.state_dict().items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        out[key] = value
    return out


@torch.no_grad()
def test_files_official_and_own_with_a_vocabulary(model, tmp_path):
    torch.save({"state_dict": official(model), "message_hub": {}}, tmp_path / "official.pth")
    other = linescan.load_checkpoint(MambaYOLOWorld(**SMALL).eval(), tmp_path / "official.pth")
    x, text = images(1, 3, 64, 64), prompts(3)
    want = model(x, text)
    torch.testing.assert_close(other(x, text), want, rtol=0, atol=0)
    other.set_vocabulary(5 * text.double())
    torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-5)
    save_file(other.state_dict(), tmp_path / "own.safetensors")
    kept = MambaYOLOWorld(**SMALL, num_prompts=3).eval()
    torch.testing.assert_close(linescan.load_checkpoint(kept, tmp_path / "own.safetensors")(x), other(x))
    for wrong in (text[:, :5], text[:0], text[0]):
        with pytest.raises(InputError, match="another text encoder"):
            other.set_vocabulary(wrong)
    with pytest.raises(linescan.CheckpointError, match="vocabulary"):
        linescan.load_checkpoint(MambaYOLOWorld(**SMALL), tmp_path / "own.safetensors")


def test_the_zoo_says_what_is_published():
    assert linescan.list_models(task="detection") == [f"mamba_yolo_world_{s}" for s in ("large", "medium", "small")]
    entry = linescan.zoo.find("mamba_yolo_world_medium.coco")
    assert entry.licence == "GPL-3.0" and entry.terms == "copyleft" and entry.metrics["box_ap"] == 51.4


@torch.no_grad()
def test_export(model):
    x, text = images(1, 3, 64, 64), prompts(3)
    exported = torch.export.export(model, (x, text)).module()
    torch.testing.assert_close(tuple(exported(x, text)), tuple(model(x, text)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision(model, dtype):
    x, text = images(1, 3, 64, 96), prompts(4)
    want, got = model(x, text), copy.deepcopy(model).to(dtype)(x.to(dtype), text.to(dtype))
    for exact, half in zip([*want.logits, *want.bins], [*got.logits, *got.bins]):
        assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
