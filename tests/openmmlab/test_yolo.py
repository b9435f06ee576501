"""Mamba-YOLO-World with mmdet's Runner: trained on scenes of digits by their names, tested, on two processes."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")

from mmengine.registry import DefaultScope, init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from linescan.checkpoint import read_state_dict  # noqa: E402
from linescan.demos.render import WORDS, read_pixels, write_scenes, write_words  # noqa: E402
from linescan.demos.scenes import configure  # noqa: E402
from linescan.errors import InputError  # noqa: E402
from linescan.openmmlab.models import MMDetector  # noqa: E402
from linescan.openmmlab.runner import read_config  # noqa: E402
from linescan.openmmlab.yolo import (  # noqa: E402
    Letterbox,
    MambaYOLOWorldDetector,
    PhraseDataset,
    SamplePrompts,
    phrases,
)
from linescan.tasks.detect import Detector  # noqa: E402
from linescan.tasks.prompts import write_embeddings  # noqa: E402

from ..runs import train_as_two  # noqa: E402

NAME = "demo/mamba_yolo_world_digits"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 8), ("val", 4)):
        write_scenes(root, split, count)
    write_words(root / "words.npz")
    return root


def config(data, iterations=4):
    cfg = configure(NAME, data, iterations)
    cfg.model.embeddings = str(data / "words.npz")
    cfg.train_dataloader.batch_size = 2
    cfg.model.backbone.width, cfg.model.backbone.last_chans = 0.125, 256
    cfg.model.neck.dims = cfg.model.bbox_head.dims = [32, 64, 32]
    cfg.model.test_cfg.score = 0.0
    return cfg


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a short training, its config, and the model."""
    out = tmp_path_factory.mktemp("run")
    cfg = config(data)
    cfg.work_dir, cfg.log_level = str(out), "ERROR"
    cfg.dump(out / "config.py")
    runner = Runner.from_cfg(cfg)
    runner.train()
    yield out, cfg, runner.model
    DefaultScope._instance_dict.clear()


def test_the_runner_trains_and_the_checkpoint_keeps_the_words(trained, data):
    out, _, _ = trained
    state = read_state_dict(out / "iter_4.pth")
    vectors = torch.from_numpy(np.load(data / "words.npz")["vectors"])
    torch.testing.assert_close(state["vocabulary"], vectors)
    assert all(value.isfinite().all() for value in state.values())


def test_linescan_detect_answers_as_the_plain_network(trained, data, tmp_path):
    """The config's detector without its file of embeddings, and the zoo's model with it."""
    out, cfg, _ = trained
    image = read_pixels(data / "val" / "images" / "00000.png")
    detector = MMDetector(out / "config.py", out / "iter_4.pth")
    detector.module.eval()
    with torch.inference_mode():
        (found,) = detector.detect([image])
    state = read_state_dict(out / "iter_4.pth")
    torch.save({key: value for key, value in state.items() if key != "vocabulary"}, tmp_path / "plain.pth")
    plain = Detector(
        "mamba_yolo_world_small", tmp_path / "plain.pth", embeddings=data / "words.npz", img_size=96, text_dim=64,
        d_state=16, head_dim=16, width=0.125, last_chans=256, num_classes=10,
    )  # fmt: skip
    assert plain.classes == list(WORDS)
    answer = plain(image)
    shared = min(len(found.scores), len(answer))
    assert shared > 5
    np.testing.assert_allclose(found.scores[:shared], answer.scores[:shared], atol=1e-5)
    np.testing.assert_allclose(found.boxes[0], answer.boxes[0], atol=1e-2)
    assert found.labels[0] == answer.labels[0]


def test_a_published_file_takes_the_words_from_theirs(trained, data):
    _, cfg, model = trained
    init_default_scope("mmdet")
    other = MambaYOLOWorldDetector(**{key: value for key, value in cfg.model.items() if key != "type"})
    state = {key: value for key, value in model.state_dict().items() if key != "vocabulary"}
    missing = other.load_state_dict(
        {key.replace("bbox_head.", "bbox_head.head_module.").replace("backbone.stem", "backbone.image_model.stem"): v
         for key, v in state.items()}, strict=False
    )  # fmt: skip
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.testing.assert_close(other.vocabulary, model.vocabulary)
    other.num_classes = 9
    with pytest.raises(InputError, match="has 10 embeddings; the config says 9 prompts"):
        other.read_vocabulary()


@pytest.mark.parametrize("empty", [False, True])
def test_prompts_of_an_image_are_what_it_shows_and_others(tmp_path, empty):
    """Vectors are those of the rows; "" fills up, if it is there, and is never a prompt."""
    np.random.seed(0)
    table = 3 * torch.eye(20 + empty)  # vectors are made as long as those of the model's own vocabulary
    write_embeddings(tmp_path / "words.npz", [f"word {i}" for i in range(20)] + [""] * empty, table)
    sample = SamplePrompts(str(tmp_path / "words.npz"), num_prompts=6, negatives=(2, 3))
    for _ in range(20):
        given = np.random.randint(0, 20, np.random.randint(0, 9))
        results = {"gt_bboxes_labels": given, "gt_bboxes": np.arange(len(given)), "gt_ignore_flags": given > 3}
        made = sample.transform(dict(results))
        assert made["vectors"].shape == (6, len(table)) and set(made["vectors"].sum(1)) <= {0, 1}
        rows = np.where(made["vectors"][:, :20].any(1), made["vectors"].argmax(1), -1)
        there = rows[rows >= 0]
        assert len(set(there)) == len(there) and (rows[len(there) :] == -1).all()
        assert made["vectors"][len(there) :].sum() == (6 - len(there)) * empty
        assert (rows[made["gt_bboxes_labels"]] == given[made["gt_bboxes"]]).all()
        kinds = set(given)
        assert len(kinds & set(there)) == min(len(kinds), 6)
        assert len(set(there) - kinds) <= 3
        if len(kinds) <= 3:
            assert len(made["gt_bboxes_labels"]) == len(given) and len(set(there) - kinds) >= 2


def test_other_prompts_with_each_image(trained, data):
    _, _, model = trained
    model.eval()
    from mmdet.structures import DetDataSample

    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    words = model.vocabulary[torch.tensor([[3, 1, 0], [5, 0, 2]])]
    words[0, 2] = 0
    samples = [DetDataSample(metainfo={"vectors": own.numpy()}) for own in words]
    with torch.no_grad():
        both = model._forward(x, samples)
        alone = model.bbox_head(*model.forward_features(x, words))
    torch.testing.assert_close(both, alone)


# -- phrases of captions, and LVIS ------------------------------------------------------------------------------------


def write_phrases(root):
    """The scenes as GoldG's images, in mmdet's ODVG format: two of the words have two parts in the caption."""
    content = json.loads((root / "train" / "instances.json").read_text())
    called = {i: [["the", word], word][i % 5 > 0] for i, word in enumerate(WORDS, 1)}
    with open(root / "train" / "phrases.json", "w") as file:
        for image in content["images"]:
            regions = []
            for one in content["annotations"]:
                if one["image_id"] == image["id"]:
                    x, y, w, h = one["bbox"]
                    regions.append({"phrase": called[one["category_id"]], "bbox": [x, y, x + w, y + h],
                                    "tokens_positive": [[0, 1]]})  # fmt: skip
            line = {"filename": image["file_name"], "height": 96, "width": 96}
            file.write(json.dumps(line | {"grounding": {"caption": "digits", "regions": regions}}) + "\n")
    return root / "train" / "phrases.json"


def write_lvis(root):
    """The held-out scenes as LVIS has its images; the names of the classes."""
    content = json.loads((root / "val" / "instances.json").read_text())
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
        image |= {"neg_category_ids": [1, 2], "not_exhaustive_category_ids": []}
    for category in content["categories"]:
        category["frequency"] = "rcf"[category["id"] % 3]
    (root / "val" / "lvis.json").write_text(json.dumps(content))
    return [category["name"] for category in content["categories"]]


def test_phrases_of_captions_are_trained_on_and_lvis_is_tested(data, tmp_path):
    """The published pre-training: classes with others as negatives, phrases without, mosaics of each; LVIS's AP."""
    file = write_phrases(data)
    classes = write_lvis(data)
    said = phrases(file, file)
    assert len(said) == len(set(said)) and {"the four", "three"} & set(said)
    words, vectors = str(tmp_path / "phrases.safetensors"), torch.randn(len(said) + 1, 64)
    write_embeddings(words, ["", *said], vectors)

    cfg = read_config("detection/mamba_yolo_world_small_objects365_goldg")
    cfg.merge_from_dict(
        {
            "model": {
                "backbone": {"width": 0.125, "last_chans": 256}, "embeddings": str(data / "words.npz"),
                "neck": {"dims": [32, 64, 32], "text_dim": 64, "d_state": 16, "head_dim": 16},
                "bbox_head": {"dims": [32, 64, 32], "text_dim": 64}, "num_prompts": 10,
            },
            "optim_wrapper.type": "OptimWrapper", "work_dir": str(tmp_path / "run"), "log_level": "ERROR",
            "train_cfg": {"max_epochs": 2, "val_interval": 2}, "custom_hooks.1.num_last_epochs": 0,
        }
    )  # fmt: skip
    scenes = {"data_root": str(data / "train"), "data_prefix": {"img": "images/"}, "indices": 2}
    objects, *captions = cfg.train_dataloader.dataset.datasets
    objects.dataset |= {"type": "CocoDataset", "ann_file": "instances.json", **scenes,
                        "metainfo": {"classes": classes}}  # fmt: skip
    objects.pipeline[-2].embeddings = str(data / "words.npz")
    for one in captions:
        one.dataset |= {"ann_file": file.name, "embeddings": words, **scenes}
        one.pipeline[-2].embeddings = words
    for one in cfg.train_dataloader.dataset.datasets:
        one.pipeline[0].img_scale = one.pipeline[2].scale = (96, 96)
        one.pipeline[1].border = (-48, -48)
        one.pipeline[-2].num_prompts = 12
    for loader, batch in ((cfg.train_dataloader, 3), (cfg.val_dataloader, 1), (cfg.test_dataloader, 1)):
        loader |= {"batch_size": batch, "num_workers": 0, "persistent_workers": False}
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset |= {"data_root": str(data / "val"), "ann_file": "lvis.json", "indices": 2,
                           "metainfo": {"classes": classes}}  # fmt: skip
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(data / "val" / "lvis.json")
    runner = Runner.from_cfg(cfg)
    mixed = runner.train_dataloader.dataset
    assert len(mixed) == 6 and len(mixed.datasets) == 3
    of_objects, *of_phrases = (mixed[i]["data_samples"].vectors for i in (0, 2, 4))
    assert of_objects.any(1).sum() == 10, "all classes, those that are not there as negatives"
    for own in of_phrases:
        same = np.isclose(own, torch.nn.functional.normalize(vectors[:1]).numpy(), atol=1e-6)
        assert same.all(1).any(), "no other prompts than its own"
    runner.train()
    assert all(one._skip_type_keys == ("Mosaic", "RandomAffine") for one in mixed.datasets), "in the last epoch"
    found = {name: runner.message_hub.get_scalar(f"val/lvis/{name}").current() for name in ("AP", "APr", "APc", "APf")}
    assert 0 <= found["AP"] <= 1
    DefaultScope._instance_dict.clear()

    write_embeddings(tmp_path / "few.npz", said[1:], torch.randn(len(said) - 1, 64))
    with pytest.raises(InputError, match="has no embedding of '" + said[0]):
        PhraseDataset(ann_file=str(file), embeddings=str(tmp_path / "few.npz"), data_prefix={"img": ""}, pipeline=[])


def test_letterbox_moves_boxes():
    from mmdet.structures.bbox import HorizontalBoxes

    results = {"img": np.zeros((40, 100, 3), np.uint8), "gt_bboxes": HorizontalBoxes(torch.tensor([[0.0, 0, 100, 40]]))}
    made = Letterbox((64, 64)).transform(results)
    assert made["img"].shape == (64, 64, 3) and made["img_shape"] == (64, 64) and made["corner"] == (0, 19)
    torch.testing.assert_close(made["gt_bboxes"].tensor, torch.tensor([[0.0, 19, 64, 44]]))


@pytest.mark.slow
def test_two_processes(data, tmp_path):
    cfg = config(data)
    cfg.dump(tmp_path / "two.py")
    train_as_two(tmp_path, "train", "--config", "two.py", "--work-dir", "run")
    assert read_state_dict(tmp_path / "run" / "iter_4.pth")["vocabulary"].shape == (10, 64)
