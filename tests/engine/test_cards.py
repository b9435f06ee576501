"""Model cards: what a file says of itself is checked before it is used; tags decide classes and names."""

import json

import pytest
import timm
import torch
from safetensors.torch import save

import linescan
from linescan import zoo
from linescan.checkpoint import CheckpointError, load_checkpoint
from linescan.engine.cards import ModelCard, build, class_names, preprocess_of, read_card, restore, save_model
from linescan.errors import InputError

NAME = "vim_tiny_patch16_224"
ARGS = dict(img_size=32, patch_size=16, embed_dim=16, depth=2, num_classes=3, class_token=None)
CLASSES = ["cat", "dog [old]", "cow"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return linescan.create_model(NAME, **ARGS).eval()


@pytest.fixture(scope="module")
def card(model):
    return ModelCard(NAME, ARGS, CLASSES, preprocess_of(model, 3, 32), {"epoch": 3, "val_loss": float("nan")})


@pytest.fixture
def path(model, card, tmp_path):
    save_model(tmp_path / "model.safetensors", model, card)
    return tmp_path / "model.safetensors"


def test_a_file_says_all_that_is_needed(model, card, path):
    read = read_card(path)
    assert (read.model, read.args, read.classes) == (card.model, card.args, card.classes)
    assert read.preprocess == card.preprocess and read.trained == {"epoch": 3, "val_loss": None}
    again, said = restore(checkpoint=path)
    assert said.classes == CLASSES and again.cls_token is None  # None is a value here, not "as by default"
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))
    larger, said = restore(checkpoint=path, img_size=(64, 48))
    assert said.preprocess.size == (3, 64, 48) and said.args["img_size"] == (64, 48)
    assert restore(NAME + ".in1k", path)[1].classes == CLASSES
    with pytest.raises(CheckpointError, match="is a checkpoint of vim_tiny_patch16_224, not of vim_small"):
        restore("vim_small_patch16_224", path)


def test_the_state_of_a_training_has_a_card(model, card, tmp_path):
    content = {"step": 7, "losses": [1.0], "model": model.state_dict(), "linescan": card.as_dict()}
    torch.save(content, tmp_path / "state.pt")
    assert read_card(tmp_path / "state.pt").classes == CLASSES
    again, said = restore(checkpoint=tmp_path / "state.pt")
    assert torch.equal(again.norm.weight, model.norm.weight) and said.preprocess.size == (3, 32, 32)
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    assert read_card(tmp_path / "bare.pth") is None
    with pytest.raises(InputError, match="bare.pth does not say which model it is of"):
        restore(checkpoint=tmp_path / "bare.pth")


def change(values, *keys, to):
    *keys, last = keys
    for key in keys:
        values = values[key]
    if to is KeyError:
        del values[last]
    else:
        values[last] = to


MANY = {f"a{i}": 1 for i in range(2000)}
MALFORMED = [
    (("model",), KeyError, "has no model"),
    (("args",), KeyError, "has no args"),
    (("classes",), KeyError, "has no classes"),
    (("preprocess",), KeyError, "has no preprocess"),
    (("colour",), 1, "has 'colour', which is unknown"),
    (("model",), 5, "model is a name, not 5"),
    (("model",), "../../etc/passwd", "model is a name"),
    (("model",), "hf-hub:owner/name", "model is a name"),
    (("model",), "vim_tiny_patch16_242", "of no model: unknown model 'vim_tiny_patch16_242'; near it"),
    (("args",), [1], "args is a table, not a list"),
    (("args",), None, "args is a table"),
    (("args",), MANY, "args is a table"),
    (("args", "not a word"), 1, "args has 'not a word'"),
    (("args", "pretrained"), True, "args has 'pretrained'"),
    (("args", "checkpoint_path"), "/etc/passwd", "args has 'checkpoint_path'"),
    (("args", "pretrained_cfg_overlay"), {"url": "http://x"}, "args has 'pretrained_cfg_overlay'"),
    (("args", "depth"), float("nan"), "args.depth is nan"),
    (("args", "depth"), 10**9, "args.depth is 1000000000"),
    (("args", "depth"), 100_000, "larger model than its weights"),
    (("args", "embed_dim"), 100_000, "larger model than its weights"),
    (("args", "img_size"), 131_072, "larger model than its weights"),
    (("args", "depth"), [[[[[[1]]]]]], "args.depth is"),
    (("args", "depth"), "x" * 5000, "args.depth is"),
    (("args", "depth"), "two", "of no model: cannot build .* with .*depth=two"),
    (("args", "colour"), "red", "of no model: cannot build .* with .*colour=red"),
    (("args", "img_size"), "abc", "img_size"),
    (("args", "patch_size"), 0, "patch_size=0"),
    (("args", "num_classes"), 4, "another shape"),
    (("args", "embed_dim"), 8, "another shape"),
    (("args", "depth"), 1, "unexpected"),
    (("classes",), {}, "classes is a list"),
    (("classes",), ["cat", 3, "cow"], "a class has a name, not 3"),
    (("classes",), ["a", "b"], "names 2 classes, its model has 3"),
    (("classes",), ["a" * 5000, "b", "c"], "a class has a name"),
    (("preprocess",), [], "preprocess is a table"),
    (("preprocess", "size"), KeyError, "preprocess has no size"),
    (("preprocess", "size"), [0, 0], "channels, height and width"),
    (("preprocess", "size"), [3, 0, 0], "preprocess.size is .3, 0, 0."),
    (("preprocess", "size"), [3, 10**7, 10**7], "preprocess.size"),
    (("preprocess", "size"), [3, 32.5, 32], "channels, height and width"),
    (("preprocess", "size"), [True, 32, 32], "channels, height and width"),
    (("preprocess", "std"), [0, 0, 0], "more than 0"),
    (("preprocess", "std"), [1, 1], "preprocess.std is 3 finite numbers"),
    (("preprocess", "mean"), ["a", "b", "c"], "preprocess.mean is 3 finite numbers"),
    (("preprocess", "mean"), [float("inf"), 0, 0], "preprocess.mean is 3 finite numbers"),
    (("preprocess", "crop_pct"), float("nan"), "preprocess.crop_pct is 1 finite"),
    (("preprocess", "crop_pct"), 0, "preprocess.crop_pct is 0"),
    (("preprocess", "crop_pct"), -1, "preprocess.crop_pct is -1"),
    (("preprocess", "interpolation"), "cubist", "preprocess.interpolation is 'cubist'; there are"),
    (("preprocess", "interpolation"), ["bilinear"], "preprocess.interpolation is a list"),
    (("preprocess", "crop_mode"), "border", "preprocess.crop_mode is 'border'; there are center, squash"),
    (("preprocess", "extra"), 1, "preprocess has 'extra'"),
    (("trained",), [], "trained is a table"),
    (("trained", "loss"), float("inf"), "trained.loss is inf"),
]


@pytest.mark.parametrize("keys, to, said", MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_cards_get_one_line(model, card, tmp_path, keys, to, said):
    values = json.loads(json.dumps(card.as_dict()))
    change(values, *keys, to=to)
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(model.state_dict(), metadata={"linescan": json.dumps(values)}))
    with pytest.raises(CheckpointError, match=said) as error:
        restore(checkpoint=path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize("text", ["[]", "null", "3", "", "{", "NaN", "[" * 100_000, '"x"', "1" * 10_000])
def test_cards_that_are_no_tables(model, tmp_path, text):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(model.state_dict(), metadata={"linescan": text}))
    with pytest.raises(CheckpointError, match="its card is") as error:
        read_card(path)
    assert "\n" not in str(error.value)


def test_a_card_of_another_library_is_read_as_a_bare_file(model, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(save(model.state_dict(), metadata={"format": "pt"}))
    assert read_card(tmp_path / "file.safetensors") is None
    load_checkpoint(linescan.create_model(NAME, **ARGS), tmp_path / "file.safetensors")


# -- tags -------------------------------------------------------------------------------------------------------------


def test_class_names_follow_the_tag():
    def names(tag, **args):
        with torch.device("meta"):
            return class_names(linescan.create_model(f"videomamba_video_tiny_patch16_224.{tag}", depth=1, **args))

    assert names("k400_f8")[0] == "abseiling" and len(names("k400_f8")) == 400
    assert names("breakfast_f64") == [
        "cereals", "coffee", "tea", "pancake", "fried egg", "scrambled egg", "sandwich", "juice", "milk", "salad",
    ]  # fmt: skip
    ssv2 = names("ssv2_f8")
    assert len(ssv2) == 174 and ssv2[0].startswith("Approaching") and ssv2[-1].startswith("Wiping")
    assert names("coin_f32") == [str(i) for i in range(180)]
    assert names("breakfast_f64", num_classes=400) == [str(i) for i in range(400)]
    with torch.device("meta"):
        assert class_names(linescan.create_model(NAME))[3] == "tiger shark, Galeocerdo cuvieri"
        assert class_names(timm.create_model("vit_tiny_patch16_224"))[0] == "tench, Tinca tinca"


def test_a_published_file_is_restored_by_its_tag(tmp_path, monkeypatch):
    """As from the Hub: 10 classes of the file's own, 64 frames, and their names."""
    name = "videomamba_video_tiny_patch16_224.breakfast_f64"
    small = dict(depth=1, embed_dim=16, img_size=32)
    torch.manual_seed(0)
    published = linescan.create_model(name, **small)
    torch.save(published.state_dict(), tmp_path / "file.pth")
    asked = []
    monkeypatch.setattr(zoo, "fetch", lambda entry, cache_dir=None: asked.append(entry) or tmp_path / "file.pth")
    model, card = restore(name, **small)
    assert [entry.file for entry in asked] == ["videomamba_t16_breakfast_f64_res224.pth"]
    assert model.num_classes == 10 and model.num_frames == 64 and card.classes[0] == "cereals"
    assert torch.equal(model.head.weight, published.head.weight)
    model, card = restore(name, **small, num_frames=8)
    assert model.num_frames == 8 and card.classes[-1] == "salad"


def test_a_size_is_for_models_of_any_size_too(tmp_path):
    model = build("resnet18", img_size=[64, 32], in_chans=1, num_classes=2)
    preprocess = preprocess_of(model, 1, [64, 32])
    assert preprocess.size == (1, 64, 32) and preprocess.crop_pct == 1
    card = ModelCard("resnet18", dict(img_size=[64, 32], in_chans=1, num_classes=2), ["a", "b"], preprocess)
    save_model(tmp_path / "resnet.safetensors", model, card)
    assert restore(checkpoint=tmp_path / "resnet.safetensors")[1] == card


def test_building_names_what_is_wrong():
    for args, said in (
        ({"img_size": "abc"}, "img_size is a number of pixels, or height and width, not 'abc'"),
        ({"img_size": 0}, "img_size is"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"colour": "red"}, "colour=red"),
    ):
        with pytest.raises(InputError, match=f"cannot build {NAME} with .*{said}"):
            build(NAME, **args)
    with pytest.raises(InputError, match="has no tag 'in22k'"):
        build(f"{NAME}.in22k")
    with pytest.raises(InputError, match="unknown model 'vim_tiny_patch16_242'; near it: .*vim_tiny_patch16_224"):
        build("vim_tiny_patch16_242")
