"""Reading and loading checkpoints: nesting, strictness, other shapes, and files that are not what their name says."""

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torch import nn

import linescan
from linescan.checkpoint import CheckpointError, fit, load_checkpoint, read_meta, read_state_dict
from linescan.notices import show_notices_with
from linescan.tensorfile import read_file

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2)


def official(model):
    """The model's weights under the names of the published Vim files."""
    out = {}
    pairs = {
        "conv_weight": "conv1d{}.weight", "conv_bias": "conv1d{}.bias", "x_proj": "x_proj{}.weight",
        "dt_proj": "dt_proj{}.weight", "dt_bias": "dt_proj{}.bias", "D": "D{}",
    }  # fmt: skip
    for key, value in model.state_dict().items():
        head, _, leaf = key.rpartition(".")
        head = head.replace("blocks.", "layers.")
        if leaf in pairs:
            for suffix, row in zip(("", "_b"), value):
                out[f"{head}.{pairs[leaf].format(suffix)}"] = row[:, None] if leaf == "conv_weight" else row
        elif leaf == "A_log":
            out |= {f"{head}.A_log": value[0], f"{head}.A_b_log": value[1]}
        elif key == "norm.weight":
            out["norm_f.weight"] = value
        else:
            out[f"{head}.{leaf}".lstrip(".").replace("patch_embed.", "patch_embed.proj.")] = value
    return {k: v.clone() for k, v in out.items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vim_tiny_patch16_224", **TINY)


def test_a_training_file_loads_through_timm(model, tmp_path):
    path = tmp_path / "vim.pth"
    state = official(model)
    torch.save({"model": state, "epoch": 299, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}}, path)
    overlay = {"file": str(path)}
    other = timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))
    # another number of classes keeps its own head, one grey channel folds the stem, as timm does
    grey = timm.create_model(
        "vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1, **TINY
    )
    assert torch.allclose(grey.patch_embed.weight, model.patch_embed.weight.sum(1, keepdim=True))
    assert torch.equal(grey.blocks[1].mixer.A_log, model.blocks[1].mixer.A_log)


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "meta": {"epoch": 1}},
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"decode_head.x": torch.zeros(1)}},
])  # fmt: skip
def test_nesting_is_undone(model, tmp_path, wrap):
    torch.save(wrap(official(model)), tmp_path / "file.pth")
    other = timm.create_model("vim_tiny_patch16_224", **TINY)
    linescan.load_checkpoint(other, tmp_path / "file.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return True


def test_another_models_checkpoint_is_named(model, tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this Vim: .* missing .* unexpected") as error:
        linescan.load_checkpoint(model, tmp_path / "vit.pth")
    assert one_line(error)
    deeper = official(timm.create_model("vim_tiny_patch16_224", **TINY | {"depth": 3}))
    torch.save(deeper, tmp_path / "deeper.pth")
    with pytest.raises(CheckpointError, match="unexpected"):
        linescan.load_checkpoint(model, tmp_path / "deeper.pth")
    torch.save(official(timm.create_model("vim_tiny_patch16_224", **TINY | {"embed_dim": 48})), tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match="another shape"):
        linescan.load_checkpoint(model, tmp_path / "wider.pth")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_truncated_files_give_one_clear_line(model, tmp_path, name, keep):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(official(model), path)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep)
    with pytest.raises(CheckpointError, match=str(path)) as error:
        read_state_dict(path)
    assert one_line(error)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_would_run_code_does_not(tmp_path, write):
    trap = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    write({"model": {"weight": torch.zeros(2)}, "extra": Payload(trap)}, path)
    with pytest.raises(CheckpointError) as error:
        read_state_dict(path)
    assert one_line(error) and not trap.exists()


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    wrong = {"page.pth": "neither", "empty.pth": "no weights", "none.pth": "not exist", ".": "folder"}
    for name, message in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            read_state_dict(tmp_path / name)


# -- what a file may hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_values_are_those_of_torch_load(tmp_path, zipped):
    shared = torch.arange(12.0)
    content = {
        "plain": torch.randn(3, 4), "turned": torch.randn(3, 4).t(), "part": shared[3:9].view(2, 3), "whole": shared,
        "number": torch.tensor(7), "none": torch.zeros(0, 3), "half": torch.randn(5).bfloat16(),
        "yes": torch.ones(3) > 0, "parameter": nn.Parameter(torch.randn(2)), "large": 2**70, "dtype": torch.float64,
        "nested": {"list": [1, "two", (3.5, None, True)], "set": {1, 2}}, "args": argparse.Namespace(lr=1.0),
    }  # fmt: skip
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    have, want = read_file(tmp_path / "file.pth"), torch.load(tmp_path / "file.pth", weights_only=False)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert have[key].dtype == value.dtype and have[key].stride() == value.stride(), key
            assert torch.equal(have[key], value), key
        elif key != "args":
            assert have[key] == value, key
    have["whole"][4] = -1  # one storage, writable
    assert have["part"][0, 1] == -1


def test_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(5.0)}, tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_state_dict(tmp_path / "file.pth")["weight"], torch.arange(5.0))


def test_a_flipped_bit_is_found(tmp_path):
    torch.save({"weight": torch.arange(64.0)}, tmp_path / "file.pth")
    data = bytearray((tmp_path / "file.pth").read_bytes())
    at = data.find(struct.pack("<f", 37.0))
    data[at] ^= 1
    (tmp_path / "file.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged .*CRC"):
        read_state_dict(tmp_path / "file.pth")


def loop():
    content: dict = {"epoch": 3}
    content["model"] = content["state_dict"] = content
    return content


@pytest.mark.parametrize("content, said", [
    (loop(), "holds no weights .found: epoch, model, state_dict"),
    ({"state_dict": {"model": loop()}}, "holds no weights"),
    ({0: torch.zeros(2), 1: torch.ones(2)}, "not under names .first: 0"),
    ({"model": {"a": torch.zeros(2), 7: torch.zeros(2)}}, "not under names .first: 7"),
    ({"a": torch.eye(3).to_sparse()}, "a is a sparse tensor"),
    ({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "a is a quantised tensor"),
    ({"a": torch.zeros(3, device="meta")}, "a is a meta tensor"),
    ({"epoch": 3, "optimizer": {"state": {}}}, "holds no weights .found: epoch, optimizer"),
    ({"model": None}, "holds no weights .found: model"),
    ({"model": {}}, "holds no weights"),
    ([torch.zeros(2)], "holds no weights .found: list"),
    (torch.zeros(2), "holds no weights .found: Tensor"),
    ({}, "holds no weights .found: dict"),
    ({"a": torch.zeros(1).expand(2**40)}, "tensors are larger than the file"),
    ({"a\n\x1b[2J": torch.eye(3).to_sparse()}, r"a \\x1b\[2J is a sparse tensor"),
])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_odd_contents_get_one_line(tmp_path, content, said, zipped):
    torch.save(content, tmp_path / "odd.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=f"odd.pth.*{said}") as error:
        read_state_dict(tmp_path / "odd.pth")
    assert one_line(error)


def in_zip(records, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as target:
        for name, content in records.items():
            target.writestr(name, content)
    return file.getvalue()


def test_files_that_ask_for_more_than_they_hold(tmp_path):
    path = tmp_path / "file.pth"
    with open(path, "wb") as file:  # a header of 10 GB
        file.write(struct.pack("<Q", 10 * 2**30) + b'{"a":')
        file.truncate(11 * 2**30)
    calls = b"\x80\x02cbuiltins\nset\nq\x00]q\x01(" + b"K\x01" * 9000 + b"e0" + b"h\x00h\x01\x85R0" * 9000 + b"."
    for said, data in {
        "a header of 10737418240 bytes": None,
        "compressed": in_zip({"x/data.pkl": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED),
        "without weights": in_zip({"x/data": b"1"}),
        "holds no weights": in_zip({"x/data.pkl": b"\x80\x02]r\xff\xff\xff\x7f."}),  # memory for 2**31 entries
        "damaged": in_zip({"x/data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."}),
        "larger than the file": in_zip({"x/data.pkl": calls}),
        "would run code on loading .posix.system": in_zip({"x/data.pkl": pickle.dumps(Payload("x"))}),
    }.items():
        if data:
            path.write_bytes(data)
        with pytest.raises(CheckpointError, match=said) as error:
            read_state_dict(path)
        assert one_line(error)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path, said in (
        (tmp_path / "pipe.pth", "not a file"), (tmp_path / ("x" * 300), "too long"), ("/dev/zero", "not a file"),
        (tmp_path / "a\0b", "null"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=said) as error:
            read_state_dict(path)
        assert one_line(error)


def test_meta_is_plain(tmp_path):
    torch.save({"meta": {"CLASSES": ("a", "b"), "lr": 0.1}, "state_dict": {"x": torch.zeros(1)}}, tmp_path / "file.pth")
    assert read_meta(tmp_path / "file.pth") == {"CLASSES": ("a", "b"), "lr": 0.1}
    save_file({"x": torch.zeros(1)}, tmp_path / "file.safetensors")
    assert read_meta(tmp_path / "file.safetensors") == {}


# -- weights for other shapes ------------------------------------------------------------------------------------------


@pytest.fixture
def notices():
    lines = []
    show_notices_with(lambda line, loud: lines.append(line))
    yield lines
    show_notices_with(None)


def create(**kwargs):
    torch.manual_seed(1)
    return timm.create_model("vim_tiny_patch16_224", **TINY | kwargs)


def saved(model, path):
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("before, after", [(3, 1), (1, 3), (1, 4), (3, 4), (13, 26), (26, 13), (4, 3), (3, 3)])
def test_stems_adapt_to_channels_as_timms(tmp_path, notices, before, after):
    old = create(in_chans=before)
    path = saved(old, tmp_path / "file.pth")
    new = load_checkpoint(create(in_chans=after), path, adapt=True)
    weight = old.patch_embed.weight
    base = {"base_chans": before} if "base_chans" in signature(adapt_input_conv).parameters else {}
    if not base and before != 3:
        pytest.skip("this timm adapts stems of three channels alone")
    assert torch.allclose(new.patch_embed.weight, adapt_input_conv(after, weight.detach().clone(), **base))
    assert torch.equal(new.blocks[1].mixer.A_log, old.blocks[1].mixer.A_log)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():  # a grey image
        grey = [model.eval()(x.expand(-1, n, -1, -1)) for model, n in ((old, before), (new, after))]
    if after == 1 or after % before == 0:
        assert torch.allclose(*grey, atol=1e-5)
    assert not notices
    if before != after:
        with pytest.raises(CheckpointError, match="of another shape .first: patch_embed.weight"):
            load_checkpoint(create(in_chans=after), path)


def test_stems_of_clips_adapt_too(tmp_path):
    def video(channels):
        return timm.create_model("videomamba_video_tiny_patch16_224", depth=1, img_size=32, num_frames=2,
                                 in_chans=channels)  # fmt: skip

    old = video(3)
    new = load_checkpoint(video(1), saved(old, tmp_path / "file.pth"), adapt=True)
    assert torch.allclose(new.patch_embed.weight, old.patch_embed.weight.sum(1, keepdim=True))


def test_every_stem_of_a_segmentor_adapts(tmp_path):
    small = {"backbone": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16], "num_heads": [1, 1, 1, 1]}, "channels": 8,
             "feat_proj_dim": 8}  # fmt: skip
    old = linescan.create_model("segman_seg_tiny", num_classes=5, **small)
    grey = {**small, "backbone": {**small["backbone"], "in_chans": 1}}
    new = linescan.create_model("segman_seg_tiny", num_classes=5, **grey)
    load_checkpoint(new, saved(old, tmp_path / "file.pth"), adapt=True)
    stem = "backbone.trunk.patch_embed.0.weight"
    assert torch.allclose(new.state_dict()[stem], old.state_dict()[stem].sum(1, keepdim=True))


def test_another_classifier_is_left_out_and_said(tmp_path, notices):
    old = create(num_classes=10)
    path = saved(old, tmp_path / "file.pth")
    new = create(num_classes=3)
    own = new.head.weight.detach().clone()
    load_checkpoint(new, path, adapt=True)
    assert torch.equal(new.head.weight, own) and torch.equal(new.norm.weight, old.norm.weight)
    assert len(notices) == 1 and "classifier is of 10 classes, the model's of 3" in notices[0]
    same = load_checkpoint(create(num_classes=10), path, adapt=True)
    assert torch.equal(same.head.weight, old.head.weight) and len(notices) == 1
    load_checkpoint(create(num_classes=0), path, adapt=True)
    with pytest.raises(
        CheckpointError, match="2 of another shape .first: head.weight is .10, 32., the model has .3, 32."
    ):
        load_checkpoint(create(num_classes=3), path)
    with pytest.raises(CheckpointError, match="2 unexpected .first: head.weight"):
        load_checkpoint(create(num_classes=0), path)


def test_a_file_without_classifier(tmp_path, notices):
    path = saved(create(num_classes=0), tmp_path / "file.pth")
    load_checkpoint(create(num_classes=3), path, adapt=True)
    assert len(notices) == 1 and "has no classifier" in notices[0]
    with pytest.raises(CheckpointError, match="2 keys missing .first: head.weight"):
        load_checkpoint(create(num_classes=3), path)


def test_a_classifier_of_two_layers(tmp_path, notices):
    def large(**kwargs):
        return timm.create_model("vrwkv_large", depth=1, embed_dim=64, head_hidden=48, img_size=32, **kwargs)

    old = large(num_classes=7)
    new = load_checkpoint(large(num_classes=5), saved(old, tmp_path / "file.pth"), adapt=True)
    assert torch.equal(new.head_inner[0].weight, old.head_inner[0].weight)  # it fits
    assert "of 7 classes, the model's of 5" in notices[0]


def test_adapting_hides_no_other_difference(tmp_path):
    path = saved(create(), tmp_path / "file.pth")
    for other, said in (({"depth": 3}, "missing"), ({"depth": 1}, "unexpected"), ({"embed_dim": 48}, "another shape")):
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(create(**other), path, adapt=True)


@pytest.mark.parametrize("name, options", [
    ("vim_tiny_patch16_224", TINY | {"depth": 4}),
    ("vmamba_tiny_s1l8", {"depths": (1, 1, 1, 1), "dims": 16}),
    ("vrwkv_tiny", {"depth": 4, "img_size": 32, "embed_dim": 64}),
])  # fmt: skip
@pytest.mark.parametrize("official_keys", [False, True])
def test_a_features_only_model_takes_its_part(tmp_path, name, options, official_keys):
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=5, **options).eval()
    state = official(whole) if official_keys and name.startswith("vim") else whole.state_dict()
    torch.save({"model": state}, tmp_path / "file.pth")
    torch.manual_seed(1)
    part = timm.create_model(name, features_only=True, out_indices=(0, 1), **options).eval()
    assert load_checkpoint(part, tmp_path / "file.pth") is part
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        maps = whole.forward_intermediates(x, indices=(0, 1), intermediates_only=True)
        assert all(torch.equal(have, want) for have, want in zip(part(x), maps))
    torch.save({"model": part.state_dict()}, tmp_path / "part.pth")  # its own keys begin with "model."
    torch.manual_seed(2)
    again = timm.create_model(name, features_only=True, out_indices=(0, 1), **options).eval()
    load_checkpoint(again, tmp_path / "part.pth")
    with torch.no_grad():
        assert all(torch.equal(have, want) for have, want in zip(again(x), maps))
    deeper = {"depth": 6} if "depth" in options else {"depths": (1, 1, 1, 2)}
    torch.save(
        {"model": timm.create_model(name, num_classes=5, **options | deeper).state_dict()}, tmp_path / "deep.pth"
    )
    if "depth" in deeper:  # of a longer model than this is a part of
        with pytest.raises(CheckpointError, match="unexpected"):
            load_checkpoint(part, tmp_path / "deep.pth")


SIZED = [
    ("vim_tiny_patch16_224", {"depth": 2, "embed_dim": 16}),
    ("vim_tiny_patch16_224", {"depth": 2, "embed_dim": 16, "class_token": "none", "rope": True}),
    ("vmamba_tiny_s1l8", {"depths": (1, 1, 1, 1), "dims": 8, "pos_embed": True}),
    ("local_vim_tiny_middle_cls_token", {"depth": 2, "embed_dim": 16, "directions": "row,-row,w2,-w2"}),
    ("local_vssm_tiny", {"depths": (1, 1, 1, 1), "dims": 8, "directions": "row,-row,w2,-w2"}),
    ("vig_tiny", {"depth": 2, "embed_dim": 48}),
    ("vig_h_tiny", {"depths": (1, 1, 1, 1), "dims": 24}),
    ("vrwkv_tiny", {"depth": 2, "embed_dim": 64}),
    ("vrwkv6_tiny", {"depth": 2, "embed_dim": 64}),
    ("scan_tiny", {"depth": 2, "embed_dim": 32}),
    ("scanh_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "head_dim": 8}),
    ("videomamba_tiny_patch16_224", {"depth": 2, "embed_dim": 16}),
    ("videomamba_video_tiny_patch16_224", {"depth": 2, "embed_dim": 16, "num_frames": 4}),
    ("van_b0", {"depths": (1,) * 4, "dims": (8, 16, 16, 16)}),
    ("mambavision_tiny", {"depths": (1, 1, 2, 1), "dims": 8, "stem_dim": 8, "num_heads": (1,) * 4}),
    ("care_s0", {"depths": (1,) * 4, "dims": (8, 16, 16, 32), "head_dims": (4, 4)}),
    ("segman_tiny", {"depths": (1,) * 4, "dims": (8, 16, 16, 16), "num_heads": (1,) * 4, "windows": (3, 3, 3, 1)}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", SIZED, ids=lambda value: value if isinstance(value, str) else "")
def test_every_family_loads_at_another_size(tmp_path, name, options):
    """The table of positions is brought to the new grid as a forward pass at that size would."""

    def build(img_size, seed):
        torch.manual_seed(seed)
        model = linescan.create_model(name, img_size=img_size, num_classes=4, **options)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        return model.eval()

    old = build((64, 128), 0)
    path = saved(old, tmp_path / "file.pth")
    frames = getattr(old, "num_frames", 0)
    for size in ((96, 96), (128, 64), (64, 128)):  # another count of patches; the same, of another shape; the same
        new = load_checkpoint(build(size, 1), path)
        x = torch.randn(2, 3, *([frames] if frames else []), *size)
        with torch.no_grad():
            assert torch.allclose(new(x), old(x), atol=1e-5), size
    if frames:
        longer = linescan.create_model(name, img_size=64, num_classes=4, **options | {"num_frames": 6}).eval()
        load_checkpoint(longer, path)
        x = torch.randn(1, 3, 6, 64, 64)
        with torch.no_grad():
            assert torch.allclose(longer(x), old(x), atol=1e-5)


def test_official_tables_that_are_not_square(tmp_path):
    """A table of tokens does not tell its grid: `img_size` does, or the model that is built for it."""

    def build(img_size):
        torch.manual_seed(0)
        model = timm.create_model("vrwkv_tiny", img_size=img_size, depth=1, embed_dim=64, num_classes=4).eval()
        nn.init.normal_(model.pos_embed)
        return model

    old = build((64, 128))
    state = old.state_dict()
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    torch.save(state, tmp_path / "official.pth")
    assert state["pos_embed"].shape == (1, 32, 64)
    same = load_checkpoint(build((64, 128)), tmp_path / "official.pth")
    assert torch.equal(same.pos_embed, old.pos_embed)
    with pytest.raises(CheckpointError, match="32 positions make no square: give the img_size"):
        load_checkpoint(build(96), tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="32 positions in the file, an image of 64 has 4x4"):
        load_checkpoint(build(96), tmp_path / "official.pth", img_size=64)
    for size in ((96, 96), (128, 64)):
        new = load_checkpoint(build(size), tmp_path / "official.pth", img_size=(64, 128))
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.allclose(new(x), old(x), atol=1e-5)


def test_averages_and_wrappers(model, tmp_path):
    state, other = model.state_dict(), {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    average = torch.optim.swa_utils.AveragedModel(model).state_dict()
    for content, prefer, want in (
        ({"state_dict_ema": state}, (), state),
        ({"epoch": 1, "model_ema": state}, (), state),
        ({"model": state, "model_ema": other}, (), state),
        ({"model": other, "model_ema": state}, ("model_ema",), state),
        ({"model": state, "ema": None, "loss": torch.zeros(1)}, (), state),
        (average, (), state),
        ({"model": {f"module._orig_mod.{key}": value for key, value in state.items()}}, (), state),
    ):
        torch.save(content, tmp_path / "file.pth")
        have = read_state_dict(tmp_path / "file.pth", prefer)
        assert have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)
        assert load_checkpoint(create(), tmp_path / "file.pth")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "lightning.ckpt")
    load_checkpoint(create(), tmp_path / "lightning.ckpt")
    compiled = torch.compile(create())
    load_checkpoint(compiled, tmp_path / "lightning.ckpt")
    assert torch.equal(compiled._orig_mod.norm.weight, model.norm.weight)


def test_fit_reports_all_and_changes_nothing():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {
        **before,
        "0.bias": torch.zeros(4),
        "2.weight": torch.zeros(1),
        "1.weight": torch.zeros(3, dtype=torch.int8),
    }
    del state["0.weight"], state["1.running_var"]
    with pytest.raises(CheckpointError) as error:
        fit(module, state, "x.pth")
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "2 keys missing (first: 0.weight)",
        "1 unexpected (first: 2.weight)",
        "1 of another shape (first: 0.bias is (4,), the model has (3,))",
        "1 of another type (first: 1.weight is torch.int8)",
    ]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    state = {**before, "0.bias": torch.ones(3), "2.weight": torch.zeros(1)}
    del state["1.bias"]
    said = fit(module, state, "x", optional=lambda key: key == "1.bias", dropped=lambda key: key.startswith("2."))
    assert said == (["2.weight"], ["1.bias"]) and torch.equal(module[0].bias, torch.ones(3))
    half = {key: value.half() for key, value in before.items()}  # with the counter of the norm
    fit(module, half, "x")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download needs."""

    file: bytes = b""
    asked: list[str] = []

    def do_HEAD(self):
        self.reply()

    def do_GET(self):
        self.reply()
        self.wfile.write(self.file)

    def reply(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.file)))
        self.end_headers()

    def log_message(self, *args):
        pass


def test_official_files_come_from_the_hub(tmp_path):
    model = timm.create_model("vim_tiny_patch16_224")
    torch.save({"model": official(model)}, tmp_path / "official.pth")
    Hub.file, Hub.asked = (tmp_path / "official.pth").read_bytes(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    program = (
        "import timm, linescan, torch;"
        "create = lambda **kwargs: timm.create_model('vim_tiny_patch16_224', pretrained=True, **kwargs);"
        "hub = create();"
        f"url = create(pretrained_cfg_overlay=dict(url='{address}/x.pth', hf_hub_id=None));"
        "print(hub.head.bias.double().sum().item(), url.head.bias.double().sum().item())"
    )
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
    env |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    want = model.head.bias.double().sum().item()
    assert [float(v) for v in done.stdout.split()] == [want, want]
    assert any("hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth" in path for path in Hub.asked)
