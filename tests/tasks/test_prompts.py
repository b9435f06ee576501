"""Detection by prompts: words, files of embeddings, the letterbox, boxes from cells, vocabularies in checkpoints."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import linescan
from linescan.errors import InputError
from linescan.heads.detection.dense_boxes import decode
from linescan.heads.detection.mamba_yolo_world import Levels
from linescan.media.resize import letterbox
from linescan.tasks.prompts import encode, parse_prompts, pick, read_embeddings, write_embeddings

NAME = "mamba_yolo_world_small"
SMALL = {"width": 0.125, "last_chans": 256, "text_dim": 16, "d_state": 8, "head_dim": 8, "num_classes": 8}
ARGS = [part for key, value in SMALL.items() for part in ("--model-arg", f"{key}={value}")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small network, embeddings of four names in both kinds of files, and images."""
    folder = tmp_path_factory.mktemp("prompts")
    torch.manual_seed(0)
    model = linescan.create_model(NAME, **SMALL)
    for contrast in model.bbox_head.cls_contrasts:
        contrast.bias.data.zero_()  # something is found
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pth")
    vectors = F.normalize(torch.randn(4, 16), dim=-1)
    for ending in ("npz", "safetensors"):
        write_embeddings(folder / f"words.{ending}", ["cat", "red car", "tree", "[red]"], vectors)
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name, size in {"wide": (60, 200, 3), "dot": (1, 1, 3), "line": (3, 700, 3)}.items():
        Image.fromarray(random.integers(0, 255, size, np.uint8)).save(folder / "images" / f"{name}.png")
    Image.new("LA", (40, 50)).save(folder / "images" / "grey.png")
    (folder / "images" / "broken.jpg").write_bytes(b"no image")
    return folder


def test_words():
    assert parse_prompts(" cat,  red   car ,,cat") == ["cat", "red car"]
    assert parse_prompts(["a, b", "c"]) == ["a", "b", "c"]
    for nothing in ("", " , ", []):
        with pytest.raises(InputError, match="words separated by commas"):
            parse_prompts(nothing)


def test_files_of_embeddings(files, tmp_path):
    for ending in ("npz", "safetensors"):
        names, vectors = read_embeddings(files / f"words.{ending}")
        assert names == ["cat", "red car", "tree", "[red]"] and vectors.shape == (4, 16)
        torch.testing.assert_close(pick(["tree", "cat"], names, vectors, "it"), vectors[[2, 0]])
    with pytest.raises(InputError, match="it has no 'cart'; near it: cat"):
        pick(["cart"], names, vectors, "it")
    np.savez(tmp_path / "pickled.npz", names=np.array([object()]), vectors=np.zeros((1, 2)))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "few.npz", names=np.array(["a"]), vectors=np.zeros((2, 3), np.float32))
    np.savez(tmp_path / "nan.npz", names=np.array(["a"]), vectors=np.full((1, 3), np.nan))
    save_file({"vectors": torch.zeros(2, 3)}, tmp_path / "nameless.safetensors")
    save_file({"vectors": torch.zeros(2, 3)}, tmp_path / "odd.safetensors", {"names": json.dumps({"a": 1})})
    (tmp_path / "text.npz").write_text("cat")
    for name, said in {
        "pickled.npz": "Object arrays cannot be loaded", "other.npz": "names", "few.npz": "are n texts", "nan.npz":
        "is not finite", "nameless.safetensors": "names", "odd.safetensors": "are n texts", "text.npz": "no embeddings",
        "none.npz": "does not exist",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=said):
            read_embeddings(tmp_path / name)
    with pytest.raises(InputError, match="an .npz or a .safetensors"):
        write_embeddings(tmp_path / "words.json", names, vectors)


def test_embeddings_have_unit_length_however_many_prompts_there_are(monkeypatch, files):
    read = []

    def run(prompts):
        read.append(len(prompts))
        return torch.tensor([[3.0, len(prompt)] for prompt in prompts])

    monkeypatch.setattr("linescan.tasks.prompts._of_transformers", lambda name, state: run)
    vectors = encode(["猫", *(200 * ["tree"])])
    assert max(read) <= 128 and sum(read) == 201
    torch.testing.assert_close(vectors[[0, 200]], F.normalize(torch.tensor([[3.0, 1], [3, 4]]), dim=-1))
    model = linescan.create_model(NAME, **SMALL)
    model.set_vocabulary(5 * torch.ones(2, 16))
    torch.testing.assert_close(model.vocabulary.norm(dim=-1), torch.ones(2))


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("linescan.extras.find_spec", lambda name: None)
    for encoder, package in (("openai/clip-vit-base-patch32", "transformers"), ("open_clip:ViT-B-32/x", "open_clip")):
        with pytest.raises(InputError, match=rf"needs {package}; `pip install 'linescan\[text\]'`"):
            encode(["cat"], encoder)


def test_letterbox():
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (40, 100, 3), np.uint8)
    small = letterbox(image, (64, 64))
    assert small.image.shape == (64, 64, 3) and small.scale == (0.64, 25 / 40) and small.corner == (0, 19)
    assert (small.image[:19] == 114).all() and (small.image[44:] == 114).all()
    # Each pixel is the mean of the area that it covers: 1.6 rows and 1.5625 columns.
    whole = np.repeat(np.repeat(image.astype(float), 25, 0), 16, 1)  # 1000 rows, 1600 columns
    means = whole.reshape(25, 40, 64, 25, 3).mean((1, 3))
    assert abs(small.image[19:44] - means).max() <= 0.5 + 1e-6
    assert letterbox(image, (40, 100)).image is not image and (letterbox(image, (40, 100)).image == image).all()
    large = letterbox(image, (100, 200))
    assert large.scale == (2, 2) and large.corner == (0, 10)
    boxes = torch.tensor([[0.0, 0, 100, 40], [3, 4, 5, 6]])
    for one in (small, large):
        torch.testing.assert_close(one.undo(one.apply(boxes)), boxes)
    torch.testing.assert_close(small.apply(boxes)[0], torch.tensor([0.0, 19, 64, 44]))
    assert letterbox(image[:1, :1].repeat(5000, 1), (32, 32)).image.shape == (32, 32, 3)


def test_boxes_from_cells():
    logits = [torch.full((1, 2, size, size), -20.0) for size in (8, 4, 2)]
    bins = [torch.full((1, 64, size, size), -20.0) for size in (8, 4, 2)]
    shares = bins[1].view(1, 4, 16, 4, 4)
    shares[0, [0, 1, 2, 3], [1, 2, 3, 4], 2, 1] = 20
    shares[0, [0, 1, 2, 3], [1, 2, 3, 4], 2, 2] = 20
    logits[1][0, :, 2, 1] = torch.tensor([2.0, 1.0])
    logits[1][0, 0, 2, 2] = 1.5  # 16 pixels to the right, of the same size: half as much in common
    (found,) = decode(Levels(logits, bins), (8, 16, 32))
    left, top, right, bottom = 24 - 16, 40 - 32, 24 + 48, 40 + 64
    torch.testing.assert_close(found.boxes[0], torch.tensor([left, top, right, bottom]).float())
    torch.testing.assert_close(found.scores, torch.tensor([2, 1.5, 1]).sigmoid())
    assert found.labels.tolist() == [0, 0, 1]
    (found,) = decode(Levels(logits, bins), (8, 16, 32), overlap=0.5)
    assert found.labels.tolist() == [0, 1]
    (found,) = decode(Levels(logits, bins), (8, 16, 32), most=1)
    assert len(found.boxes) == 1
    (found,) = decode(Levels(logits, bins), (8, 16, 32), candidates=2)
    assert len(found.scores) == 2
    (found,) = decode(Levels(logits, bins), (8, 16, 32), score=0.99)
    assert len(found.scores) == 0


def test_words_on_the_command_line_and_a_vocabulary_in_the_file(files, tmp_path, linescan_here):
    common = [files / "images", "--score", "0.1", "--no-overlays", "--json"]
    model = ["--model", NAME, "-c", files / "weights.pth", *ARGS, "--model-arg", "img_size=90"]
    words = ["--text", "tree, red car", "--text", "[red]", "--embeddings", files / "words.npz"]
    status, first, said = linescan_here(
        "detect", *common, *model, *words, "-o", tmp_path / "a", "--save", tmp_path / "kept.safetensors"
    )
    assert status == 1 and "broken.jpg" in said and "keeps the model and its 3 prompts" in said
    answers = {entry["source"].rpartition("/")[2]: entry.get("answer") for entry in json.loads(first)}
    assert answers["broken.jpg"] is None and all(answers[f"{name}.png"] for name in ("wide", "dot", "line", "grey"))
    assert {found["label"] for found in answers["wide.png"]} <= {"tree", "red car", "[red]"}
    for found in answers["wide.png"]:
        left, top, right, bottom = found["box"]
        assert 0 <= left <= right <= 200 and 0 <= top <= bottom <= 60
    categories = json.loads((tmp_path / "a" / "images.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["tree", "red car", "[red]"]

    status, second, _ = linescan_here("detect", *common, "-c", tmp_path / "kept.safetensors", "-o", tmp_path / "b")
    assert status == 1 and json.loads(second) == json.loads(first)
    some = "detect", files / "images" / "wide.png", "-c", tmp_path / "kept.safetensors", "--text", "[red], tree"
    status, _, said = linescan_here(*some, "-o", tmp_path / "some", "--save", tmp_path / "some.safetensors")
    assert status == 0 and "its 2 prompts" in said, said  # what the file keeps needs no encoder
    kept, fewer = (load_file(tmp_path / f"{name}.safetensors")["vocabulary"] for name in ("kept", "some"))
    assert torch.allclose(fewer, kept[[2, 0]])
    status, _, said = linescan_here(
        "detect", files / "images" / "wide.png", "-c", tmp_path / "kept.safetensors", "--text", "cat", "--embeddings",
        files / "words.safetensors", "-o", tmp_path / "c", "--window", "48",
    )  # fmt: skip
    assert status == 0 and (tmp_path / "c" / "overlays" / "wide.jpg").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "give --text 'cat, red car', --embeddings FILE, or a checkpoint"),
        (["--text", ","], "words separated by commas"),
        (["--embeddings", "{files}/words.npz", "--text", "dog"], "has no 'dog'"),
        (["--embeddings", "{files}/words.npz", "--text-encoder", "x"], "a file of embeddings needs none"),
        (["--embeddings", "{files}/none.npz"], "does not exist"),
        (["--embeddings", "{files}/words.npz", "--save", "model.pth"], "is kept as .safetensors, not 'model.pth'"),
        (["--embeddings", "{files}/words.npz", "--model-arg", "text_dim=32"], "another shape"),
        (["--embeddings", "{files}/words.npz", "--model-arg", "colour=3"], "colour"),
        (["--embeddings", "{files}/words.npz", "--model-arg", "img_size=big"], "img_size"),
        (["--embeddings", "{files}/words.npz", "--model", "mamba_yolo_world_huge"], "only for models by name (mamba_"),
    ],
)
def test_what_is_refused_in_one_line(files, tmp_path, linescan_here, given, said):
    args = ["--model", NAME, "-c", files / "weights.pth", *ARGS, *(part.format(files=files) for part in given)]
    status, out, error = linescan_here("detect", files / "images" / "wide.png", *args, "-o", tmp_path / "out")
    assert status and said in error and "Traceback" not in error, error


def test_a_model_must_be_named(files, linescan_here):
    status, _, error = linescan_here("detect", files / "images", "-c", files / "weights.pth", "--text", "cat")
    assert status and "does not say which model it is of; name one with --model" in error
    status, _, error = linescan_here("detect", files / "images", "--text", "cat")
    assert status and "no model and no checkpoint given" in error


def tiny_clip(folder):
    """A CLIP text encoder of random weights and its tokenizer, as `transformers` keeps them in a folder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, eos_token_id=len(words) - 1, bos_token_id=len(words) - 2,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(folder)
    return model


def test_clip_reads_words_and_takes_the_weights_of_the_file(files, tmp_path, linescan_here):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    model = tiny_clip(tmp_path)
    alone = [encode([word], str(tmp_path)) for word in ("cat", "red car")]
    together = encode(["cat", "red car"], str(tmp_path))
    torch.testing.assert_close(torch.cat(alone), together)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    with torch.no_grad():
        ours = model(**AutoTokenizer.from_pretrained(tmp_path)("cat", return_tensors="pt")).text_embeds
    torch.testing.assert_close(F.normalize(ours, dim=-1), together[:1])
    assert encode(["a long prompt of many more tokens than there are positions"], str(tmp_path)).isfinite().all()

    tuned = {key: value + 1 for key, value in model.state_dict().items()}
    assert not torch.allclose(encode(["cat"], str(tmp_path), tuned), together[:1])
    with pytest.raises(linescan.CheckpointError, match="text encoder"):
        encode(["cat"], str(tmp_path), {"other": torch.zeros(1)})
    with pytest.raises(InputError, match="cannot open the text encoder .*; --text-encoder names another"):
        encode(["cat"], str(tmp_path / "nothing"))
    args = ["--model", NAME, "-c", files / "weights.pth", *ARGS, "--model-arg", "img_size=64", "--text", "cat"]
    status, _, error = linescan_here(
        "detect", files / "images" / "wide.png", *args, "--text-encoder", tmp_path, "-o", tmp_path / "out"
    )
    assert status == 0, error


def test_open_clip_reads_words_with_the_weights_that_are_named(tmp_path):
    for name in ("ViT-B-32", "ViT-B-32/", ""):
        with pytest.raises(InputError, match=f"open_clip:{name} has no weights"):  # random ones would not be noticed
            encode(["cat"], f"open_clip:{name}")
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    path = tmp_path / "ViT-tiny-words.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    model, _, _ = open_clip.create_model_and_transforms("ViT-tiny-words", None)
    torch.save(model.eval().state_dict(), tmp_path / "weights.pt")
    found = encode(["cat", "red car"], f"open_clip:ViT-tiny-words/{tmp_path}/weights.pt")
    with torch.no_grad():
        want = model.encode_text(open_clip.get_tokenizer("ViT-tiny-words")(["cat", "red car"]))
    torch.testing.assert_close(found, F.normalize(want, dim=-1))
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    for weights in (tmp_path / "broken.pt", "laion9"):
        with pytest.raises(InputError, match="cannot open the text encoder ViT-tiny-words/.*; --text-encoder names"):
            encode(["cat"], f"open_clip:ViT-tiny-words/{weights}")
