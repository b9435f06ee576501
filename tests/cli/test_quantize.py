"""`linescan quantize`, and the commands that read what it writes."""

import csv
import json

import pytest
import torch
from PIL import Image

import linescan
from linescan.engine.cards import ModelCard, save_model
from linescan.media.preprocess import Preprocess

NAME, ARGS = "vim_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "in_chans": 1}
ARGS["num_classes"] = 10


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small untrained Vim for the digits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "model.safetensors"
    model = linescan.create_model(NAME, **ARGS)
    torch.nn.init.normal_(model.head.weight)
    save_model(path, model, ModelCard(NAME, ARGS, list("0123456789"), Preprocess((1, 16, 16), (0.3,), (0.3,))))
    return path


def test_from_a_file_to_a_smaller_one_that_all_commands_read(digits, linescan_here, tmp_path, images):
    out = tmp_path / "new" / "small.safetensors"
    (images / "circle" / "broken.png").write_bytes(b"no image")
    status, said, news = linescan_here("quantize", "-c", digits, "--calibrate", images, "--images", 25, "-o", out)
    assert status == 1 and "left out" in news and "broken.png" in news  # the others calibrate
    assert "(mambaquant w8a8)" in said and "24 images keep their class" in said and "simulated" in said
    assert said.count("dB") == 3
    assert out.stat().st_size < digits.stat().st_size
    rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert [row["layer"] for row in rows][-1] == "head" and {row["kind"] for row in rows} == {"linear", "mixer"}
    assert all(float(row["output_snr_db"]) > 5 and float(row["weight_error"]) > 0 for row in rows)
    picture = Image.open(out.with_suffix(".png"))
    assert picture.width > 500 and picture.convert("L").getextrema()[0] < 100

    status, said, news = linescan_here("classify", images / "circle" / "0.png", "-c", out, "--json")
    assert status == 0 and "quantised by mambaquant to w8a8" in news
    assert json.loads(said)[0]["answer"][0]["label"] in "0123456789"
    scores = {}
    for checkpoint in (digits, out):
        status, said, _ = linescan_here("evaluate", "--data", "digits", "-c", checkpoint, "--json")
        assert status == 0
        scores[checkpoint] = json.loads(said)
    assert scores[out]["samples"] == 359 and scores[out]["loss"] == pytest.approx(scores[digits]["loss"], rel=0.2)

    for args, line in (
        (["quantize", "-c", out, "--method", "dynamic", "-o", tmp_path / "twice.safetensors"], "is quantised already"),
        (["explain", images / "circle" / "0.png", "-c", out], "a quantised model has no gradients"),
        (["convert", out, "-o", tmp_path / "folder"], "timm reads no quantised models"),
        (["train", "--data", "digits", "--checkpoint", out, "-o", tmp_path / "run"], "training starts from weights"),
    ):
        status, _, news = linescan_here(*args)
        assert status == 2 and line in news, news


def test_no_calibration_is_needed_where_scales_are_dynamic(digits, linescan_here, tmp_path):
    out = tmp_path / "int8.safetensors"
    status, said, _ = linescan_here("quantize", "-c", digits, "--method", "dynamic", "-o", out, "--json")
    found = json.loads(said)
    assert status == 0 and found["layers"] == [] and found["same"] is None
    assert found["files"] == [str(out)] and found["bytes_after"] < found["bytes_before"]
    status, said, _ = linescan_here(
        "quantize", "-c", digits, "--method", "dynamic", "--bits", "w4a8", "--calibrate", "digits", "-o", out, "--json"
    )
    found = json.loads(said)
    assert status == 0 and found["images"] == 64 and found["same"] > 0.5 and found["bits"] == "w4a8"
    assert {layer["kind"] for layer in found["layers"]} == {"linear"}
    status, _, news = linescan_here("export", "-c", out, "--out", tmp_path / "int8.onnx")
    assert status == 2 and "is quantised, which linescan alone runs" in news


@pytest.mark.parametrize("args, line", [
    (["--method", "best"], "the method is one of 'mambaquant', 'quamba', 'dynamic', 'naive', not 'best'"),
    (["--bits", "8"], "bits are those of weights and activations, 2 to 8 each, as in w8a8 or w4a8, not '8'"),
    ([], "mambaquant needs --calibrate with images like those the model is for"),
    (["--calibrate", "nowhere"], "nowhere is not a folder"),
    (["--calibrate", "digits", "--out", "small.pth"], "a quantised model is written to a .safetensors file"),
    (["--calibrate", "digits", "--model-arg", "depth"], "--model-arg takes KEY=VALUE"),
    (["--calibrate", "digits", "--out", "file/x.safetensors"], "file is a file; --out needs a folder there"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(args, line, digits, linescan_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, said, news = linescan_here("quantize", "--checkpoint", digits, *args)
    assert status == 2 and not said and line in news and news.count("\n") == 1, news
    assert not list(tmp_path.rglob("*.safetensors"))


def test_models_of_other_tasks_are_refused(linescan_here, tmp_path):
    status, _, news = linescan_here("quantize", "--method", "dynamic", "-o", tmp_path / "x.safetensors")
    assert status == 2 and "no model and no checkpoint given" in news
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for command in (
        ("quantize", "mhsvm_vmunet_3h", "--method", "dynamic", "-o", tmp_path / "x.safetensors"),
        ("classify", tmp_path / "a.png", "--model", "mhsvm_vmunet_3h"),
    ):
        status, _, news = linescan_here(*command)
        assert status == 2 and "mhsvm_vmunet_3h classifies no images" in news, news  # before weights are fetched
    clouds = "quantize", "pointmamba_modelnet40", "--method", "dynamic", "-o", tmp_path / "x.safetensors"
    status, _, news = linescan_here(*clouds)
    assert status == 2 and "pointmamba_modelnet40 classifies no images" in news, news
