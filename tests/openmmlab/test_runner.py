"""A config written by hand in mmseg's usual way trains with MMEngine's Runner, on images on disk."""

import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

mmseg = pytest.importorskip("mmseg")

from typer.testing import CliRunner  # noqa: E402

from linescan import cli  # noqa: E402
from linescan.errors import InputError  # noqa: E402
from linescan.openmmlab.runner import parse_options, read_config, train_config  # noqa: E402

BASES = Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_"

BY_HAND = """
_base_ = ['{bases}/models/upernet_r50.py', '{bases}/datasets/ade20k.py', '{bases}/default_runtime.py']
custom_imports = dict(imports=['linescan.openmmlab'], allow_failed_imports=False)
crop_size = (64, 64)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=crop_size),
    backbone=dict(_delete_=True, type='LinescanBackbone', model='vig_h_tiny', out_indices=(0, 1, 2, 3), dims=24),
    decode_head=dict(in_channels=[24, 48, 96, 192], channels=16, num_classes=2),
    auxiliary_head=dict(in_channels=96, channels=16, num_classes=2))
dataset = dict(
    _delete_=True, type='BaseSegDataset', metainfo=dict(classes=('dark', 'light')), data_root='{data}',
    img_suffix='.png', data_prefix=dict(img_path='images', seg_map_path='masks'),
    pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs')])
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(decay_rate=0.9))
param_scheduler = [dict(type='PolyLR', power=1.0, begin=0, end=40, eta_min=0.0, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
"""


@pytest.fixture
def config(tmp_path):
    """Images of a light half and a dark half, and a config for them."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, 12 * i :] = 1
        picture = np.where(mask[..., None] > 0, 200, 50) + rng.integers(-20, 20, (64, 64, 3))
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{i}.png"), picture.astype(np.uint8))
        cv2.imwrite(str(tmp_path / "data" / "masks" / f"{i}.png"), mask)
    file = tmp_path / "by_hand.py"
    file.write_text(BY_HAND.format(bases=BASES.as_posix(), data=(tmp_path / "data").as_posix()))
    return file


@pytest.fixture
def torchrun(monkeypatch):
    """As a process that torchrun has started, alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_config_written_by_hand_trains_and_goes_on(config, tmp_path, request):
    to = train_config(config, tmp_path / "run")
    first = torch.load(to / "iter_2.pth", map_location="cpu", weights_only=False)
    assert any(key.startswith("backbone.trunk.stages.3.") for key in first["state_dict"])
    assert "mIoU" in next(to.glob("*/*.log")).read_text()
    # The command line goes on from there, as one of several processes, without a GPU: torch then refuses SyncBN.
    request.getfixturevalue("torchrun")
    arguments = ["train", "--config", str(config), "--work-dir", str(to), "--resume"]
    result = CliRunner().invoke(cli.app, [*arguments, "--cfg-options", "train_cfg.max_iters=4"])
    assert result.exit_code == 0, result.exception
    second = torch.load(to / "iter_4.pth", map_location="cpu", weights_only=False)
    assert second["message_hub"]["runtime_info"]["iter"] == 3
    name = "decode_head.conv_seg.weight"
    assert not torch.equal(first["state_dict"][name], second["state_dict"][name])


def test_options_are_read_as_mmengine_reads_them():
    options = parse_options(["train_cfg.max_iters=10", "backbone.depths=[1,1]", "backbone.model=vig_h_tiny"])
    assert options == {"train_cfg.max_iters": 10, "backbone.depths": [1, 1], "backbone.model": "vig_h_tiny"}
    with pytest.raises(InputError, match="KEY=VALUE"):
        parse_options(["max_iters"])


def test_configs_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="near it: segmentation/vig_h_tiny_upernet_ade20k"):
        read_config("segmentation/vig_h_tiny_upernet_ade20")
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(InputError, match="cannot read .*broken.py"):
        read_config(tmp_path / "broken.py")


def test_without_the_packages_one_line_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    with pytest.raises(InputError, match="install_openmmlab"):
        read_config("segmentation/vig_h_tiny_upernet_ade20k")
