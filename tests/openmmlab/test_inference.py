"""Segmenting and detecting with models of mmseg and mmdet: their own answers, from files to files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.runner import save_checkpoint  # noqa: E402

import linescan.openmmlab  # noqa: E402, F401
from linescan.checkpoint import CheckpointError  # noqa: E402
from linescan.engine.configs import CONFIGS  # noqa: E402
from linescan.errors import InputError  # noqa: E402
from linescan.openmmlab.models import _read_config  # noqa: E402
from linescan.tasks import Detector, Segmenter  # noqa: E402

from ..tasks.test_classify import Bomb  # noqa: E402
from ..tasks.test_dense import photo, write_video  # noqa: E402

SEGMENTOR = f"""
_base_ = ['{CONFIGS}/_base_/upernet.py']
default_scope = 'mmseg'
dims = [16, 16, 32, 32]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(model='vmamba_tiny_s1l8', dims=dims, depths=[1, 1, 1, 1]),
    decode_head=dict(in_channels=dims, channels=16, num_classes=4),
    auxiliary_head=dict(in_channels=32, channels=16, num_classes=4))
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(256, 96), keep_ratio=True),
    dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_dataloader = dict(dataset=dict(
    type='BaseSegDataset', metainfo=dict(classes=('grass', 'road', 'tree', 'sky')), pipeline=test_pipeline))
"""
SLIDE = """
model['test_cfg'] = dict(mode='slide', crop_size=(64, 64), stride=(42, 42))
test_pipeline.pop(1)
"""
BINARY = """
model['decode_head'].update(num_classes=2, out_channels=1, threshold=0.49,
                            loss_decode=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True))
test_dataloader['dataset']['metainfo'] = dict(classes=('no', 'yes'))
"""
DETECTOR = f"""
_base_ = ['{CONFIGS}/_base_/mask_rcnn.py']
default_scope = 'mmdet'
dims = [16, 16, 32, 32]
model = dict(
    backbone=dict(model='vig_h_tiny', dims=dims, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
    neck=dict(in_channels=dims, out_channels=16, num_outs=5),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3)),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=20), rcnn=dict(max_per_img=15)))
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(256, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_dataloader = dict(dataset=dict(
    type='CocoDataset', metainfo=dict(classes=('cat', 'dog', 'fox')), pipeline=test_pipeline))
"""
NAMES = {"grass": (10, 200, 30), "road": (90, 90, 90), "tree": (0, 80, 0), "sky": (150, 200, 250)}


def make(folder: Path, name: str, text: str, **meta) -> tuple[str, str]:
    """A config file and a checkpoint of it, as MMEngine's Runner writes it."""
    config, weights = folder / f"{name}.py", folder / f"{name}.pth"
    config.write_text(text)
    cfg = Config.fromfile(config)
    torch.manual_seed(1)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    for key, parameter in model.named_parameters():  # away from the initialisation, whose answers are all alike
        if "conv_seg.weight" in key or "fc_cls.weight" in key or "fc_reg.weight" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    hub = {"log_scalars": {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}}
    save_checkpoint({"meta": {"iter": 3, **meta}, "state_dict": model.state_dict(), "message_hub": hub}, str(weights))
    return str(config), str(weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def segmentor(folder):
    return make(folder, "segmentor", SEGMENTOR, dataset_meta={"classes": list(NAMES), "palette": list(NAMES.values())})


@pytest.fixture(scope="module")
def detector(folder):
    return make(folder, "detector", DETECTOR)


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(photo(110, 170)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# -- segmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [("whole", ""), ("slide", SLIDE), ("binary", BINARY)])
def test_a_mask_is_mmsegs_own(name, text, folder, picture):
    from mmengine.model import revert_sync_batchnorm
    from mmseg.apis import inference_model, init_model

    config, weights = make(folder, name, SEGMENTOR + text, dataset_meta={"classes": ["x"], "palette": [[0, 0, 0]]})
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = revert_sync_batchnorm(init_model(config, device="cpu"))
        theirs.load_state_dict(torch.load(weights, weights_only=False)["state_dict"])
        expected = inference_model(theirs, str(picture)).pred_sem_seg.data[0].numpy()
    DefaultScope._instance_dict.clear()
    for batch in (1, 4):
        mask = Segmenter(config, weights, device="cpu", batch=batch)(str(picture))
        assert mask.shape == (110, 170) and len(np.unique(mask)) > 1
        assert (mask == expected).mean() > 0.999


def test_names_and_colours(segmentor, folder):
    tool = Segmenter(*segmentor, device="cpu")
    assert tool.classes == list(NAMES) and tool.palette == list(NAMES.values())
    silent = make(folder, "silent", SEGMENTOR)
    assert Segmenter(*silent, device="cpu").classes == list(NAMES), "the config says them, too"
    other = make(folder, "other", SEGMENTOR, CLASSES=["a", "b", "c", "d"])
    assert Segmenter(*other, device="cpu").classes == list("abcd"), "as mmseg before 1.0 wrote them"
    strange = make(folder, "strange", SEGMENTOR, dataset_meta={"classes": ["one"]})
    assert Segmenter(*strange, device="cpu").classes == [f"class {i}" for i in range(4)]


def test_windows_larger_images_and_half_precision(segmentor):
    image = photo(200, 330)
    full = Segmenter(*segmentor, device="cpu", window=96, batch=3)
    once = Segmenter(*segmentor, device="cpu", window=96, memory=1)
    half = Segmenter(*segmentor, device="cpu", window=96, batch=3, dtype=torch.bfloat16)
    mask = full(image)
    assert mask.shape == (200, 330) and (once(image) == mask).mean() > 0.999 and (half(image) == mask).mean() > 0.9


def test_segment_command(linescan_here, segmentor, picture, tmp_path):
    config, weights = segmentor
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    out = tmp_path / "out"
    status, stdout, stderr = linescan_here("segment", tmp_path, "-m", config, "-c", weights, "-o", out)
    assert status == 1 and "broken.jpg" in stderr and "Traceback" not in stderr
    assert stdout.startswith(f"{picture}: ") and "%" in stdout and len(stdout.splitlines()) == 1
    with Image.open(out / "masks" / "photo.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), Segmenter(config, weights)(picture))


# -- detection --------------------------------------------------------------------------------------------------------


def theirs(config, weights, path):
    from mmdet.apis import inference_detector, init_detector

    with DefaultScope.overwrite_default_scope("mmdet"):
        cfg = Config.fromfile(config)
        cfg.test_dataloader.dataset.update(ann_file="", data_root="")
        model = init_detector(cfg, None, device="cpu", palette="coco")
        model.load_state_dict(torch.load(weights, weights_only=False)["state_dict"])
        return inference_detector(model, str(path)).pred_instances


@pytest.mark.filterwarnings("ignore")
def test_instances_are_mmdets_own(detector, picture):
    expected = theirs(*detector, picture)
    DefaultScope._instance_dict.clear()
    tool = Detector(*detector, device="cpu")
    found = tool(str(picture))
    assert len(found) == len(expected.scores) > 3 and tool.classes == ["cat", "dog", "fox"]
    order = expected.scores.argsort(descending=True, stable=True)
    np.testing.assert_allclose(found.scores, expected.scores[order].numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.bboxes[order].numpy(), rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(found.labels, expected.labels[order].numpy())
    np.testing.assert_array_equal(found.masks, expected.masks[order].numpy())
    assert found.masks.any()
    drawn = tool.draw(picture, found, score=0.0)
    assert drawn.width == 170 * 3 and drawn.height > 110 * 3


def test_batches_of_equal_images(detector):
    images = [photo(100, 150, seed) for seed in range(3)]
    alone, together = Detector(*detector, device="cpu"), Detector(*detector, device="cpu", batch=3)
    for one, other in zip(alone(images), together(images)):
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-2, atol=0.1)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3, atol=1e-4)


def test_windows_of_a_large_image(detector):
    image = photo(200, 300)
    found = Detector(*detector, device="cpu", window=(128, 128), batch=2)(image)
    left = Detector(*detector, device="cpu")(image[:128, :128])
    assert len(found) and found.boxes[:, 2].max() > 200, "things of every window"
    assert found.masks.shape == (len(found), 200, 300)
    assert (np.diff(found.scores) <= 0).all()
    inside = (left.boxes[:, 2] < 120) & (left.boxes[:, 3] < 120)
    for box, score in zip(left.boxes[inside], left.scores[inside]):
        near = abs(found.boxes - box).max(1) < 0.1
        assert near.any() or score < found.scores.max(), "the best of a window stays, where it is"


def test_detect_command(linescan_here, detector, tmp_path):
    from pycocotools.coco import COCO

    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(photo(90, 120, i)).save(folder / f"{i}.png")
    config, weights = detector
    categories = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}, {"id": 99, "name": "fox"}]
    images = [{"id": 500 + i, "file_name": f"{i}.png", "height": 90, "width": 120} for i in range(2)]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    options = ("-m", config, "-c", weights, "--device", "cpu")
    status, stdout, _ = linescan_here("detect", folder, *options, "-o", out, "--annotations", truth, "--score", "0")
    assert status == 0 and len(stdout.splitlines()) == 2
    results = COCO(truth).loadRes(str(out / "detections.json"))
    tool = Detector(config, weights, device="cpu")
    for i in range(2):
        found, kept = tool(folder / f"{i}.png"), results.imgToAnns[500 + i]
        assert len(kept) == len(found)
        ids = [{"cat": 17, "dog": 18, "fox": 99}[tool.classes[label]] for label in found.labels]
        assert [k["category_id"] for k in kept] == ids
        for k, mask in zip(kept, found.masks):
            np.testing.assert_array_equal(results.annToMask(k), mask)
        with Image.open(out / "overlays" / f"{i}.jpg") as overlay:
            assert overlay.width == 480

    truth.write_text(json.dumps({"images": images, "annotations": [], "categories": categories[:2]}))
    status, _, stderr = linescan_here("detect", folder, *options, "-o", out, "--annotations", truth)
    assert status == 2 and "no category 'fox'" in stderr

    write_video(folder / "clip.mp4", 3)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    status, _, stderr = linescan_here("detect", folder, *options, "-o", tmp_path / "more", "--batch", "2")
    assert status == 1 and "cut.png" in stderr and "3 of 4 done" in stderr
    described = json.loads((tmp_path / "more" / "images.json").read_text())
    assert [image.get("frame") for image in described["images"]] == [None, None, 0, 1, 2]
    assert {c["id"]: c["name"] for c in described["categories"]} == {1: "cat", 2: "dog", 3: "fox"}
    known = {image["id"] for image in described["images"]}
    assert {r["image_id"] for r in json.loads((tmp_path / "more" / "detections.json").read_text())} <= known
    assert (tmp_path / "more" / "overlays" / "clip.mp4").stat().st_size > 0


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_the_wrong_files(segmentor, detector, tmp_path):
    with pytest.raises(InputError, match="linescan detect"):
        Segmenter(*detector)
    with pytest.raises(InputError, match="linescan segment"):
        Detector(*segmentor)
    with pytest.raises(InputError, match="give a checkpoint"):
        Segmenter(segmentor[0])
    with pytest.raises(CheckpointError, match="is not a checkpoint of this EncoderDecoder"):
        Segmenter(segmentor[0], detector[1])
    with pytest.raises(InputError, match="no config"):
        Segmenter("segmentation/vmamba_tiny_upernet", segmentor[1])
    with pytest.raises(InputError, match="only for models by name"):
        Segmenter(*segmentor, depth=3)
    state = torch.load(segmentor[1], weights_only=False)["state_dict"]
    torch.save({"state_dict": state, "meta": {"dataset_meta": Bomb(tmp_path / "fired")}}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="refused"):
        Segmenter(segmentor[0], tmp_path / "bomb.pth")
    assert not (tmp_path / "fired").exists()
    state["decode_head.conv_seg.weight"] = torch.zeros(9, 16, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match="conv_seg"):
        Segmenter(segmentor[0], tmp_path / "shape.pth")
    broken = tmp_path / "broken.py"
    broken.write_text("default_scope = 'mmseg'\nmodel = dict(type='NoSuchThing')")
    with pytest.raises(InputError, match="NoSuchThing"):
        Segmenter(broken, segmentor[1])


def test_configs_by_name():
    assert _read_config("segmentation/vmamba_tiny_upernet_ade20k", "mmseg").model.type == "EncoderDecoder"
    assert _read_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco", "mmdet").model.type == "MaskRCNN"
    with pytest.raises(InputError, match="no config"):
        _read_config("mmdet::mask_rcnn/none", "mmdet")
