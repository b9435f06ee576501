"""linescan convert and linescan embed: what other programs read is what the model holds and answers."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linescan import Classifier

PUBLISHED = {"vmamba_tiny_s1l8": ("MIT", "import linescan, timm"), "resnet18": ("apache-2.0", "import timm")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_of_the_authors_becomes_a_folder_of_the_hub(linescan_here, tmp_path, name):
    torch.manual_seed(0)
    args = dict(img_size=32, depths=(1, 1, 1, 1), dims=16) if name.startswith("vmamba") else {}
    model = timm.create_model(name, num_classes=5, **args)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    pairs = (f"{key}={_json(value)}" for key, value in (args | {"num_classes": 5}).items())
    given = [word for pair in pairs for word in ("--model-arg", pair)]
    out = tmp_path / "deep" / "hub"
    status, _, stderr = linescan_here("convert", tmp_path / "official.pth", "-m", name, *given, "--out", out)
    assert status == 0
    assert stderr.splitlines() == [str(out / file) for file in ("model.safetensors", "config.json", "README.md")]
    state, before = timm.create_model(f"local-dir:{out}", pretrained=True).state_dict(), model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    readme, (licence, code) = (out / "README.md").read_text(), PUBLISHED[name]
    assert readme.startswith(f"---\nlicense: {licence.lower()}\n") and code in readme
    assert json.loads((out / "config.json").read_text())["architecture"] == name
    assert len(Classifier(checkpoint=out / "model.safetensors", device="cpu").classes) == 5, "a checkpoint of its own"


def _json(value) -> str:
    return json.dumps(value).replace(" ", "")


def test_what_was_trained_further_has_no_licence_but_the_one_that_is_given(linescan_here, trained, tmp_path):
    for licence, said in (((), "license: unknown\n"), (("--licence", "CC-BY-4.0"), "license: cc-by-4.0\n")):
        args = ("convert", trained / "model.safetensors", "--out", tmp_path / "hub", *licence)
        assert linescan_here(*args)[0] == 0
        readme = (tmp_path / "hub" / "README.md").read_text()
        assert said in readme and "as published" not in readme and "val_top1 after training" in readme
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"][0] == 1 and config["num_classes"] == 10
    (tmp_path / "file").write_text("")
    status, _, stderr = linescan_here("convert", trained / "model.safetensors", "--out", tmp_path / "file")
    assert status == 2 and "is a file" in stderr


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_features_are_those_that_the_classifier_reads(linescan_here, trained, tmp_path, suffix):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(tmp_path / f"{i} [x].png")
    (tmp_path / "broken.png").write_bytes(b"not an image, but of some length")
    out = tmp_path / "out" / f"features.{suffix}"
    args = ("-c", trained / "model.safetensors", "--out", out, "--batch", 2)
    status, stdout, stderr = linescan_here("embed", tmp_path, *args)
    assert status == 1 and "broken.png" in stderr and "3 of 4 done" in stderr and "0 [x].png: " in stdout
    if suffix == "npz":
        table = dict(np.load(out))
    else:
        from pyarrow import parquet

        table = parquet.read_table(out).to_pydict()
    assert [*table["path"]] == [str(tmp_path / f"{i} [x].png") for i in range(3)] and set(table["frame"]) == {-1}
    classifier = Classifier(checkpoint=trained / "model.safetensors", device="cpu")
    logits = classifier.model.get_classifier()(torch.tensor(np.array(table["features"], np.float32)))
    wanted = classifier.probabilities([tmp_path / f"{i} [x].png" for i in range(3)])
    torch.testing.assert_close(logits.softmax(-1), wanted)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def test_what_cannot_be(linescan_here, trained, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    good, out = trained / "model.safetensors", tmp_path / "x.npz"
    for inputs, checkpoint, to, said in (
        (tmp_path, good, tmp_path / "features.csv", "a .npz or a .parquet file"),
        (tmp_path, good, tmp_path, "a .npz or a .parquet file"),
        (tmp_path, tmp_path / "none.pth", out, "none.pth does not exist"),
        (tmp_path / "gone", good, out, "gone does not exist"),
        (tmp_path, good, tmp_path / "x.png" / "x.npz", "is a file; --out needs a folder there"),
    ):
        status, _, stderr = linescan_here("embed", inputs, "-c", checkpoint, "--out", to)
        assert status == 2 and said in stderr and stderr.count("\n") == 1
    assert not out.exists()
