"""Reading and loading checkpoints: nesting, strictness, and files that are not what their name says."""

import argparse
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from safetensors.torch import save_file

import linescan
from linescan.checkpoint import CheckpointError, read_state_dict

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
