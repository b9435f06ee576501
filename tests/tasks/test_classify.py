"""Classifier: whatever an image comes as, the same answer; whatever is wrong, one line."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from linescan.checkpoint import CheckpointError
from linescan.engine import Digits
from linescan.engine.cards import build, measure, preprocess_of, read_card, restore, save_model
from linescan.errors import BrokenImage, InputError
from linescan.tasks import Classifier


@pytest.fixture(scope="module")
def classify(trained):
    return Classifier(checkpoint=trained / "model.safetensors", device="cpu")


@pytest.fixture(scope="module")
def digit():
    return Digits(True).image(0, channels=1)


def test_the_file_knows_its_model_and_classes(classify, trained):
    assert classify.classes == list("0123456789")
    assert classify.card.model == "vit_tiny_patch16_224" and classify.card.preprocess.size == (1, 16, 16)
    assert classify.card.trained["epoch"] == 1
    trained_weights = torch.load(trained / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(v, trained_weights[k]) for k, v in classify.model.state_dict().items())


def test_an_image_is_an_image(classify, digit, tmp_path):
    digit.save(tmp_path / "x.png")
    pixels = np.asarray(digit)
    same = [
        tmp_path / "x.png", str(tmp_path / "x.png"), digit, pixels, pixels[:, :, None], np.stack([pixels] * 3, 2),
        torch.from_numpy(pixels.copy())[None], pixels / 255,
    ]  # fmt: skip
    probabilities = classify.probabilities(same)
    assert probabilities.shape == (8, 10)
    torch.testing.assert_close(probabilities, probabilities[:1].expand(8, 10), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))


def test_guesses_come_best_first(classify, digit):
    guesses = classify(digit, topk=3)
    probabilities = classify.probabilities([digit])[0]
    assert [g.index for g in guesses] == probabilities.topk(3).indices.tolist()
    assert [g.label for g in guesses] == [str(g.index) for g in guesses]
    assert len(classify(digit, topk=99)) == 10
    for again in classify([digit, digit], topk=3):  # in a batch of another size, sums may round otherwise
        assert [g._replace(probability=0) for g in again] == [g._replace(probability=0) for g in guesses]
        assert [g.probability for g in again] == pytest.approx([g.probability for g in guesses], rel=1e-5)
    assert classify([]) == []


def test_batches_do_not_matter(classify, trained):
    images = [Digits(True).image(i, channels=1) for i in range(7)]
    by_three = Classifier(checkpoint=trained / "model.safetensors", device="cpu", batch=3)
    torch.testing.assert_close(by_three.probabilities(images), classify.probabilities(images))


def test_half_precision_is_close(classify, trained, digit):
    half = Classifier(checkpoint=trained / "model.safetensors", device="cpu", dtype=torch.bfloat16)
    assert (half.probabilities([digit]) - classify.probabilities([digit])).abs().max() < 0.02
    with pytest.raises(InputError, match="float64"):
        Classifier(checkpoint=trained / "model.safetensors", device="cpu", dtype=torch.float64)


@pytest.mark.parametrize(
    "given, said",
    [
        (np.zeros((8, 8, 5), np.uint8), "shape (8, 8, 5) is not an image"),
        (np.zeros((0, 8), np.uint8), "shape (0, 8) is not an image"),
        (torch.zeros(2, 8, 8), "shape (2, 8, 8) is not an image; (H, W) and (1 or 3 or 4, H, W)"),
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((8, 8), -2.0), "0..1"),
        (np.full((8, 8), 300), "int64"),
        (7, "not int"),
    ],
)
def test_what_is_no_image(classify, given, said):
    with pytest.raises(InputError) as error:
        classify(given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_broken_file_is_named(classify, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(BrokenImage, match="x.png"):
        classify(tmp_path / "x.png")


def test_weights_that_are_no_numbers(trained, tmp_path, digit):
    model, card = restore(checkpoint=trained / "model.safetensors")
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    save_model(tmp_path / "x.safetensors", model, card)
    with pytest.raises(InputError, match="NaN or infinity"):
        Classifier(checkpoint=tmp_path / "x.safetensors", device="cpu")(digit)


def test_another_size(trained, digit):
    larger = Classifier(checkpoint=trained / "model.safetensors", device="cpu", img_size=16)
    assert larger.tensor(digit).shape == (1, 16, 16)
    vim = build("vim_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=16, num_classes=4)
    assert preprocess_of(vim, img_size=(32, 48)).size == (3, 32, 48)


def test_files_that_are_not_the_models(trained, tmp_path):
    path = trained / "model.safetensors"
    with pytest.raises(CheckpointError, match="is a checkpoint of vit_tiny_patch16_224, not of vim_tiny_patch16_224"):
        restore("vim_tiny_patch16_224", path)
    with pytest.raises(CheckpointError, match="another shape"):
        restore(checkpoint=path, embed_dim=48)
    data = path.read_bytes()
    for size in (0, 4, 9, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError) as error:
            restore("vit_tiny_patch16_224", tmp_path / "cut.safetensors", **read_card(path).args)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        restore(checkpoint=tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        restore(checkpoint=tmp_path)
    torch.save(torch.load(trained / "state.pt", weights_only=True)["model"], tmp_path / "bare.pth")
    with pytest.raises(InputError, match="does not say which model"):
        restore(checkpoint=tmp_path / "bare.pth")
    restore("vit_tiny_patch16_224", tmp_path / "bare.pth", **read_card(path).args)


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, how):
    sign, file = tmp_path / "it_ran", tmp_path / "bomb.pth"
    content = {"model": {"head.weight": torch.zeros(1)}, "extra": Bomb(sign)}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        restore("vit_tiny_patch16_224", file)
    assert not sign.exists()
    pickle.loads(pickle.dumps(Bomb(sign))).close()
    assert sign.exists()  # the bomb is a real one


def test_models_that_cannot_be_built():
    with pytest.raises(InputError, match="near it: .*vim_tiny_patch16_224") as refusal:
        build("vim_tiny_patch16_242")
    near = str(refusal.value).partition("near it: ")[2].split(", ")
    assert len(set(near)) == len(near), "a model of linescan is one of timm's too"
    with pytest.raises(InputError, match="cannot build vim_tiny_patch16_224 with colour=red"):
        build("vim_tiny_patch16_224", colour="red")


def test_measuring_counts_every_product():
    params, macs = measure(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False)), (3, 10, 10))
    assert (params, macs) == (3 * 8 * 9, 3 * 8 * 9 * 8 * 8)


def test_the_card_is_plain_json(trained):
    import safetensors

    with safetensors.safe_open(trained / "model.safetensors", "pt") as file:
        card = json.loads(file.metadata()["linescan"])
    assert card["classes"] == list("0123456789") and card["preprocess"]["size"] == [1, 16, 16]


def test_images_of_any_shape(classify):
    for size in ((1, 1), (1, 300), (300, 1), (5, 7)):
        assert classify.tensor(Image.new("RGB", size)).shape == (1, 16, 16)
