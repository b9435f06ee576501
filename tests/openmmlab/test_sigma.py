"""Sigma in mmseg: pairs on disk, changed alike; the Runner, alone and in two processes; files by config and by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")

from mmcv.transforms import Compose  # noqa: E402
from mmengine.registry import DATASETS, MODELS, init_default_scope  # noqa: E402

import linescan.openmmlab.sigma  # noqa: E402
from linescan.errors import InputError  # noqa: E402
from linescan.openmmlab.runner import read_config, train_config  # noqa: E402
from linescan.tasks import Segmenter  # noqa: E402

from ..runs import train_as_two  # noqa: E402

SMALL = {"depths": [1, 1, 1, 1], "dim": 32}
OPTIONS = (
    "model.backbone.depths=[1,1,1,1]",
    "model.backbone.dim=32",
    "model.backbone.init_cfg=None",
    "model.decode_head.dim=32",
    "model.decode_head.depths=[1,1,1]",
    "model.data_preprocessor.size=(32,64)",
    "train_dataloader.dataset.pipeline.4.scales=[(48,24),(64,32),(96,48)]",
    "train_dataloader.dataset.pipeline.5.crop_size=(32,64)",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "train_cfg.max_epochs=2",
    "train_cfg.val_interval=2",
    "default_hooks.checkpoint.interval=1",
    "default_hooks.logger.interval=1",
    "env_cfg.dist_cfg.backend=gloo",
)


@pytest.fixture(scope="module")
def mfnet(tmp_path_factory):
    """Four scenes in MFNet's layout: the left half is known by its colour, the right half by its temperature."""
    root, rng = tmp_path_factory.mktemp("data") / "MFNet", np.random.default_rng(0)
    for folder in ("RGB", "Modal", "Label"):
        (root / folder).mkdir(parents=True)
    for i in range(4):
        label = rng.integers(0, 2, (4, 8), np.uint8).repeat(8, 0).repeat(8, 1)
        seen = np.zeros((32, 64), bool)
        seen[:, :32] = True
        rgb = np.stack([np.where(seen & (label > 0), 200, 30), np.full_like(label, 60), label * 0 + 90], -1)
        Image.fromarray(rgb.astype(np.uint8)).save(root / "RGB" / f"{i}.png")
        warm = np.where(~seen & (label > 0), 51_400, 7_710).astype(np.uint16)
        Image.fromarray(warm).save(root / "Modal" / f"{i}.png")
        Image.fromarray(label).save(root / "Label" / f"{i}.png")
    (root / "train2.txt").write_text("0\n1\n2\n3\n")
    (root / "test.txt").write_text("2\n3\n")
    return root


def small(root, *more):
    return [*OPTIONS, *(f"{part}_dataloader.dataset.data_root={root}" for part in ("train", "val", "test")), *more]


@pytest.mark.slow
def test_a_config_trains_alone_and_in_two_processes(mfnet, tmp_path):
    work = train_config("sigma_tiny_mfnet", tmp_path / "one", options=small(mfnet))
    said = next(work.glob("*/vis_data/scalars.json")).read_text().splitlines()
    rows = [json.loads(line) for line in said]
    assert len([row for row in rows if "loss" in row]) == 4 and "mIoU" in rows[-1]
    assert (work / "best_mIoU_epoch_2.pth").exists()
    first, last = (torch.load(work / f"epoch_{i}.pth", weights_only=False)["state_dict"] for i in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    kept = {name for name in first if name not in moved}
    assert not [n for n in moved if ".mixer.ssm." in n or "A_log" in n or "skip" in n or "concat.0.ssm" in n]
    assert not [n for n in kept if ".ssm." not in n and "A_log" not in n and "skip" not in n and "fc" not in n]
    options = [part for option in small(mfnet, "train_dataloader.batch_size=1") for part in ("--cfg-options", option)]
    train_as_two(tmp_path, "train", "--config", "sigma_tiny_mfnet", "--work-dir", "two", *options)
    both = torch.load(tmp_path / "two" / "epoch_2.pth", weights_only=False)["state_dict"]
    assert both.keys() == last.keys() and (tmp_path / "two" / "epoch_1.pth").exists()

    # What was trained segments a pair, by the config, as the network itself does.
    config = tmp_path / "small.py"
    read_config("sigma_tiny_mfnet", small(mfnet)).dump(config)
    seg = Segmenter(config, work / "epoch_2.pth", device="cpu")
    pair = mfnet / "RGB" / "0.png", mfnet / "Modal" / "0.png"
    [mask] = seg([pair])
    colours, grey = np.asarray(Image.open(pair[0])), (np.asarray(Image.open(pair[1])) / 257).astype(np.float32)
    both = np.concatenate([colours[..., ::-1], np.repeat(grey[..., None], 3, -1)], -1)
    normal = (both - np.tile([123.675, 116.28, 103.53], 2)) / np.tile([58.395, 57.12, 57.375], 2)
    with torch.no_grad():
        x = torch.from_numpy(normal).float().movedim(-1, 0)[None]
        want = seg.module.decode_head(seg.module.backbone(x))[0].argmax(0)
    assert (mask == want.numpy()).mean() > 0.999 and seg.classes[1] == "car"
    with pytest.raises(InputError, match="reads 2 images of each scene .--extra., got 1"):
        seg([pair[0]])


def test_both_images_and_the_label_are_changed_alike(mfnet):
    cfg = read_config("sigma_tiny_mfnet", small(mfnet))
    init_default_scope("mmseg")
    data = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(data) == 4 and data.metainfo["classes"][8] == "bump"
    torch.manual_seed(0), np.random.seed(0)
    shapes = set()
    for i in range(12):
        item = data[i % 4]
        image, label = item["inputs"], item["data_samples"].gt_sem_seg.data[0]
        assert image.shape[0] == 6 and image.shape[1:] == label.shape
        hot = (image[3] > 120) | (image[2] > 120)  # red by day, warm by night
        assert (hot == (label > 0)).float().mean() > 0.97, "but for pixels at borders, which are blended"
        assert torch.equal(image[3], image[4]) and torch.equal(image[3], image[5])
        shapes.add(tuple(label.shape))
    assert len(shapes) > 1


def test_what_is_no_pair_is_refused_in_one_line(mfnet, tmp_path):
    load = Compose([dict(type="mmseg.LoadExtraImage")])
    image = {"img": np.zeros((32, 64, 3), np.uint8), "img_path": "a.png"}
    with pytest.raises(InputError, match="a.png has no partner: there is no .*none.png"):
        load({**image, "extra_path": str(tmp_path / "none.png")})
    Image.fromarray(np.zeros((30, 64), np.uint8)).save(tmp_path / "low.png")
    with pytest.raises(InputError, match="a.png has 32x64 pixels, .*low.png has 30x64: both are of one size"):
        load({**image, "extra_path": str(tmp_path / "low.png")})
    (tmp_path / "torn.png").write_bytes((tmp_path / "low.png").read_bytes()[:40])
    with pytest.raises(InputError, match="torn.png is not an image, or damaged"):
        load({**image, "extra_path": str(tmp_path / "torn.png")})
    with pytest.raises(InputError, match="one of 6 channels"):
        MODELS.build(dict(type="SigmaEncoder", **SMALL))(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="drop bgr_to_rgb"):
        MODELS.build(dict(type="PairedSegDataPreProcessor", mean=[0] * 3, std=[1] * 3, bgr_to_rgb=True))


def test_official_files_and_classifiers_start_it(tmp_path):
    torch.manual_seed(0)
    encoder = MODELS.build(dict(type="SigmaEncoder", **SMALL))
    state = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": state | {"decode_head.output.weight": torch.zeros(1)}}, tmp_path / "sigma.pth")
    classifier = linescan.create_model("vmamba_vanilla_tiny", depths=[1, 1, 1, 1], dims=32, num_classes=3)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    for file, same in (("sigma.pth", encoder.state_dict()), ("classifier.pth", classifier.state_dict())):
        started = dict(type="SigmaEncoder", **SMALL, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / file)))
        other = MODELS.build(started)
        other.init_weights()
        name = "stages.1.blocks.0.mixer.in_proj.weight"
        want = same[f"encoder.trunk.{name}"] if f"encoder.trunk.{name}" in same else same[name]
        assert torch.equal(other.state_dict()[f"encoder.trunk.{name}"], want)
        if file == "sigma.pth":
            assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), same.values(), strict=True))
    with pytest.raises(InputError, match="init_cfg is dict"):
        MODELS.build(dict(type="SigmaEncoder", **SMALL, init_cfg=dict(type="Normal")))
