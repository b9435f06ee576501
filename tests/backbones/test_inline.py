"""InLine beyond the contract and the golden data: its attention, windows, stripes, positions and files."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import linescan
from linescan.backbones.inline import (
    CSwinBlock,
    InLineAttention,
    InLineCSwin,
    InLinePVT,
    InLineSwin,
    PredictedConv,
    StripeAttention,
    attention_kinds,
    injective_attention,
)

from .test_contract import shaken


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(*shape):
    return noise(*shape).float()


# -- attention --------------------------------------------------------------------------------------------------------


def test_weights_are_the_paper_s_and_add_up_to_one():
    q, k, v = (noise(2, 7, 3, 4, seed=i) for i in range(3))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * 4**-0.5
    weights = (logits - logits.mean(-1, keepdim=True)) / 7 + 1 / 7
    want = torch.einsum("bhij,bjhd->bihd", weights, v)
    assert torch.allclose(injective_attention(q, k, v), want)
    one = injective_attention(q, k, torch.ones_like(v))
    assert torch.allclose(one, torch.ones_like(one))
    assert torch.allclose(injective_attention(q, k + 5, v), want), "a shift of all keys changes nothing"
    assert not torch.allclose(injective_attention(2 * q, k, v), want), "the length of a query is not lost"
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(injective_attention, inputs, fast_mode=True)


def test_tokens_that_are_not_counted_have_no_part():
    q, k, v = (noise(2, 6, 2, 4, seed=i) for i in range(3))
    k[0, 4:] = v[0, 4:] = 0
    got = injective_attention(q, k, v, torch.tensor([4.0, 6.0]).double().view(2, 1, 1, 1))
    assert torch.allclose(got[0, :4], injective_attention(q[:1, :4], k[:1, :4], v[:1, :4])[0])
    assert torch.allclose(got[1], injective_attention(q[1:], k[1:], v[1:])[0])


def test_the_predicted_convolution_is_one_of_each_sample():
    torch.manual_seed(0)
    conv, x, mean = PredictedConv(8, 2).double(), noise(3, 5, 4, 8), noise(3, 8, seed=2)
    taps = conv.taps(mean[..., None]).view(3, 8, 1, 3, 3)
    for i in range(3):
        want = F.conv2d(x[i : i + 1].permute(0, 3, 1, 2), taps[i], padding=1, groups=8)
        assert torch.allclose(conv(x, mean)[i], want[0].permute(1, 2, 0))
    other = conv.taps[0].weight.clone()
    assert other.shape == (8, 4, 1) and conv.taps[2].weight.shape == (72, 4, 1), "taps of a head see that head alone"
    assert torch.autograd.gradcheck(
        lambda x, m: conv(x, m), (x.requires_grad_(), mean.requires_grad_()), fast_mode=True
    )


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (3, 7), (5, 4)])
def test_windows_are_read_apart(grid, shifted):
    """Whole, cut off and missing windows, on a torus where they are shifted."""
    torch.manual_seed(0)
    mixer = shaken(InLineAttention(8, 2, window=4, shifted=shifted, lepe=True)).double()
    whole = InLineAttention(8, 2, lepe=True).double()
    whole.load_state_dict(mixer.state_dict())
    x = noise(2, *grid, 8)
    sides = [min(4, side) for side in grid]
    shift = [side // 2 if shifted and side < n else 0 for side, n in zip(sides, grid)]
    rolled = x.roll([-n for n in shift], (1, 2))
    want = torch.zeros_like(x)
    for top in range(0, grid[0], sides[0]):
        for left in range(0, grid[1], sides[1]):
            part = slice(None), slice(top, top + sides[0]), slice(left, left + sides[1])
            want[part] = whole(rolled[part])
    assert torch.allclose(mixer(x), want.roll(shift, (1, 2)))


def test_class_tokens_are_read_but_not_convolved():
    torch.manual_seed(0)
    mixer, x = shaken(InLineAttention(8, 2)).double(), noise(1, 1 + 12, 8)
    with torch.no_grad():
        plain = mixer(x, (3, 4))
        nn.init.zeros_(mixer.conv.taps[2].weight), nn.init.zeros_(mixer.conv.taps[2].bias)
        without = mixer(x, (3, 4))
    assert torch.allclose(plain[:, 0], without[:, 0]) and not torch.allclose(plain[:, 1:], without[:, 1:])
    with pytest.raises(ValueError, match="num_heads divides the channels: 8 is not a multiple of 3"):
        InLineAttention(8, 3)


def test_what_the_taps_are_made_of():
    """The mean of the normed tokens, class tokens among them; in CSwin that of what is not normed yet."""
    torch.manual_seed(0)
    mixer, given = InLineAttention(8, 2), []
    mixer.conv.register_forward_hook(lambda module, inputs, output: given.append(inputs[1]))
    tokens, image = pixels(1, 1 + 12, 8), pixels(1, 3, 4, 8) + 1
    mixer(tokens, (3, 4))
    CSwinBlock(8, mixer)(image)
    assert torch.allclose(given[0], tokens.mean(1)) and torch.allclose(given[1], image.mean((1, 2)))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 2)])
def test_stripes_stand_and_lie(grid):
    torch.manual_seed(0)
    mixer = StripeAttention(8, 2, 2).double()
    x = noise(1, *grid, 8).requires_grad_()
    mixer.proj = nn.Identity()
    y, row, column = mixer(x), grid[0] - 1, 0
    for half, seen in ((slice(0, 4), "columns"), (slice(4, 8), "rows")):
        (gradient,) = torch.autograd.grad(y[0, row, column, half].sum(), x, retain_graph=True)
        read = gradient[0].abs().sum(-1) > 0
        want = torch.zeros(grid, dtype=torch.bool)
        if seen == "columns":
            want[:, :2] = True
        else:
            want[row // 2 * 2 : row // 2 * 2 + 2] = True
        assert torch.equal(read, want), seen
    with pytest.raises(ValueError, match="8 channels do not divide into 1 heads for 2 kinds of stripes"):
        StripeAttention(8, 1, 2)


def test_kinds_of_attention():
    assert attention_kinds("IIMS2", (2, 1, 4, 1)) == ["II", "I", "IISS", "S"]
    assert attention_kinds("MS3", (2, 2)) == ["II", "SS"]
    for wrong in ("III", "IIXS", "IIMS", "IISS2", "2IISS", ""):
        with pytest.raises(ValueError, match="attn_type has a letter I, S or M for each of the 4 stages"):
            attention_kinds(wrong, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="dims, depths and num_heads are for the same stages"):
        InLineSwin(depths=(1, 1))


# -- hosts ------------------------------------------------------------------------------------------------------------


TINY = dict(dims=(8, 16), depths=(2, 2), num_heads=(2, 2), num_classes=5)


@pytest.mark.parametrize("cls, options", [
    (InLinePVT, {"attn_type": "MS1", "mlp_ratios": (2, 2), "sr_ratios": (4, 2)}),
    (InLineSwin, {"attn_type": "IM1", "window": 6}),
    (InLineCSwin, {"attn_type": "SM1", "stripes": (3, 2)}),
])  # fmt: skip
def test_mixed_hosts_train_at_any_size(cls, options):
    torch.manual_seed(0)
    model = cls(**TINY, **options)
    for size in ((64, 64), (45, 90), (32, 16)):
        logits = model(pixels(2, 3, *size))
        assert logits.shape == (2, 5)
    logits = model(pixels(2, 3, 64, 52))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_map_of_pvt_is_no_smaller_than_a_key():
    assert timm.create_model("inline_pvt_tiny", depths=(1, 1, 1, 1), device="meta").min_size == 32
    assert InLinePVT(attn_type="IS", mlp_ratios=(2, 2), sr_ratios=(64, 8), **TINY).min_size == 64
    with pytest.raises(ValueError, match="at least 64x64 pixels, got 48x64"):
        InLinePVT(attn_type="IS", mlp_ratios=(2, 2), sr_ratios=(64, 8), **TINY)(pixels(1, 3, 48, 64))


def test_positions_of_pvt_follow_the_image_and_the_file(tmp_path):
    options = TINY | {"attn_type": "II", "mlp_ratios": (2, 2)}
    torch.manual_seed(0)
    model = InLinePVT(img_size=32, **options)
    tables = {name: p for name, p in model.named_parameters() if name.endswith("pos_embed")}
    assert {name: tuple(p.shape[1:3]) for name, p in tables.items()} == {
        "patch_embed.pos_embed": (8, 8), "stages.1.downsample.pos_embed": (4, 4),
    }  # fmt: skip
    assert model.no_weight_decay() == set(tables)
    table = model.patch_embed.pos_embed
    want = F.interpolate(table.permute(0, 3, 1, 2), (10, 6), mode="bilinear").permute(0, 2, 3, 1)
    stem = model.patch_embed.layer
    x = pixels(1, 3, 40, 24)
    assert torch.allclose(model.patch_embed(x), stem(x) + want, atol=1e-6)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    for size, side in ((64, 16), ((32, 64), None)):
        other = linescan.load_checkpoint(InLinePVT(img_size=size, **options), tmp_path / "own.pth")
        grid = other.patch_embed.pos_embed.shape[1:3]
        want = F.interpolate(table.permute(0, 3, 1, 2), grid, mode="bicubic").permute(0, 2, 3, 1)
        assert torch.allclose(other.patch_embed.pos_embed, want) and side in (None, grid[0])


def official_pvt(state):
    """The authors' keys for a PVT of two stages, of InLine blocks."""
    out = {}
    for key, value in state.items():
        if key.endswith("pos_embed"):
            out["pos_embed1" if key.startswith("patch") else "pos_embed2"] = value.flatten(1, 2)
            continue
        key = key.replace("patch_embed.layer.", "patch_embed1.").replace("stages.1.downsample.layer.", "patch_embed2.")
        key = key.replace("_embed1.conv", "_embed1.proj").replace("_embed2.conv", "_embed2.proj")
        key = key.replace("stages.0.blocks", "block1").replace("stages.1.blocks", "block2")
        key = key.replace("mixer.conv.taps", "attn.residual").replace("mixer", "attn")
        if ".qkv." in key:
            q, kv = value.split([len(value) // 3, 2 * len(value) // 3])
            out |= {key.replace("qkv", "q"): q, key.replace("qkv", "kv"): kv}
        else:
            out[key] = value
    return out


def test_a_file_of_pvt_s_authors_at_another_size(tmp_path):
    options = TINY | {"attn_type": "II", "mlp_ratios": (2, 2)}
    model = shaken(InLinePVT(img_size=32, **options))
    torch.save({"model": official_pvt(model.state_dict())}, tmp_path / "official.pth")
    same = linescan.load_checkpoint(InLinePVT(img_size=32, **options), tmp_path / "official.pth")
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
    wide = InLinePVT(img_size=(32, 64), **options)
    state = wide.checkpoint_filter(official_pvt(model.state_dict()))
    assert state["stages.1.downsample.pos_embed"].shape == (1, 4, 8, 16)
    with pytest.raises(ValueError, match="64 positions in the file, an image of 64"):
        wide.checkpoint_filter(official_pvt(model.state_dict()), img_size=64)


def test_biases_of_windows_are_resampled():
    model, larger = (InLineSwin(attn_type="IS", window=w, **TINY) for w in (56, 96))
    state = larger.checkpoint_filter(model.state_dict())
    key = "stages.1.blocks.0.mixer.bias_table"
    assert model.state_dict()[key].shape == (169, 2) and state[key].shape == (23**2, 2)
    one = model.state_dict() | {key: torch.ones(169, 2)}
    assert torch.allclose(larger.checkpoint_filter(one)[key], torch.ones(23**2, 2), atol=1e-5)


def test_averaged_weights_of_cswin_are_preferred(tmp_path):
    options = TINY | {"attn_type": "IS", "stripes": (0, 0)}
    raw, averaged = (shaken(InLineCSwin(**options), seed) for seed in (1, 2))
    torch.save({"model": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "both.pth")
    loaded = linescan.load_checkpoint(InLineCSwin(**options), tmp_path / "both.pth")
    assert torch.equal(loaded.head.weight, averaged.head.weight)


def test_published_sizes_and_terms():
    assert timm.create_model("inline_deit_base", depth=1, device="meta").native_grid == (28, 28)
    entry = linescan.zoo.find("inline_cswin_base.in1k")
    assert entry.licence == "none" and entry.url.startswith("https://cloud.tsinghua.edu.cn/f/91e17121df284ae38521")
    assert linescan.zoo.find("inline_swin_base_384").inputs == ((3, 384, 384),)
