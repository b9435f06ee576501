"""Mamba-YOLO-World with mmdet's Runner: trained on scenes of digits by their names, tested, on two processes."""


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
from linescan.openmmlab.yolo import Letterbox, MambaYOLOWorldDetector, SamplePrompts  # noqa: E402
from linescan.tasks.detect import Detector  # noqa: E402

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


def test_prompts_of_an_image_are_what_it_shows_and_others():
    np.random.seed(0)
    sample = SamplePrompts(num_classes=20, num_prompts=6, negatives=(2, 3))
    for _ in range(20):
        given = np.random.randint(0, 20, np.random.randint(0, 9))
        results = {"gt_bboxes_labels": given, "gt_bboxes": np.arange(len(given)), "gt_ignore_flags": given > 3}
        made = sample.transform(dict(results))
        rows = made["prompts"]
        there = rows[rows >= 0]
        assert len(rows) == 6 and len(set(there)) == len(there) and (rows[len(there) :] == -1).all()
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
    rows = np.array([[3, 1, -1], [5, 0, 2]])
    samples = [DetDataSample(metainfo={"prompts": row}) for row in rows]
    with torch.no_grad():
        both = model._forward(x, samples)
        words = model.vocabulary[torch.from_numpy(rows).clamp(0)]
        words[0, 2] = 0
        alone = model.bbox_head(*model.forward_features(x, words))
    torch.testing.assert_close(both, alone)


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
