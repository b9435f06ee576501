"""Every config that comes with linescan builds; of each kind, one trains a step and tests an image."""

import re
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import mmengine.config.utils  # noqa: E402
from mmcv.transforms import Compose  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, DefaultScope, init_default_scope  # noqa: E402
from mmengine.structures import InstanceData, PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from linescan.backbones.contract import architecture  # noqa: E402
from linescan.openmmlab import find_config, list_configs  # noqa: E402

from ..building import uninitialised  # noqa: E402

CONFIGS = [name for name in list_configs() if name.startswith(("segmentation/", "detection/"))]
SIDE = 64


def _kind(name: str) -> str:
    """The name without width, schedule and data set: configs that differ in no more take the same steps."""
    width_or_schedule = r"_(tiny|small|medium|base|large\d?|b\d|s\d|1x|3x)(?=_)"
    data = r"_(ade20k|cityscapes|coco|objects365|goldg|mfnet|pst900|nyuv2|sunrgbd)(?=_|$)"
    return re.sub(f"{width_or_schedule}|{data}", "", name)


NARROW_LAST = sorted(CONFIGS, key=lambda name: "tiny" in name or "b0" in name)
KINDS = list({_kind(name): name for name in NARROW_LAST}.values())


@pytest.fixture(scope="module", autouse=True)
def _read_each_file_once():
    """MMEngine parses every metafile of a package again for each base that is looked up in it, and every base again for
    each config."""
    read = cache(Config._file2dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, "load", cache(mmengine.config.utils.load))
        patch.setattr(Config, "_file2dict", staticmethod(lambda *args, **options: deepcopy(read(*args, **options))))
        yield


@pytest.fixture(scope="module")
def built():
    """Models by what they are built of: those of two schedules are the same."""
    return {}


@pytest.fixture
def cfg(request):
    cfg = Config.fromfile(find_config(request.param))
    init_default_scope(cfg.default_scope)
    yield cfg
    DefaultScope._instance_dict.clear()  # the next config may be of the other package


def shrink(cfg):
    """Fewer blocks, narrow heads, small images, on the CPU; the backbone's widths stay."""
    backbone, model = cfg.model.backbone, cfg.model
    if model.type == "MambaYOLOWorld":
        backbone.width, backbone.last_chans, model.embeddings = 0.125, 256, None
        model.neck.dims = model.bbox_head.dims = [32, 64, 32]
        cfg.optim_wrapper.type = "OptimWrapper"
        return cfg
    backbone.init_cfg = None
    backbone.drop_path_rate = 0.0  # for a step in which every block takes part
    cfg.optim_wrapper.type = "OptimWrapper"  # mixed precision needs a GPU
    if backbone.type == "SigmaEncoder":
        backbone.depths, model.decode_head.depths = [1, 1, 1, 1], [1, 1, 1]
        model.data_preprocessor.size = (SIDE, SIDE)
        return cfg
    cls = architecture(backbone.model)[0]
    if cls.unit_name == "stages":
        backbone.depths = [1, 1, 1, 1]
        if backbone.model.startswith("segman"):
            backbone.windows = [3, 3, 3, 1]  # no map may be smaller
        if backbone.model.startswith("mambavision"):
            backbone.depths, backbone.windows = [1, 1, 2, 1], [8, 8, 4, 4]  # both mixers, in windows of the maps' size
    else:
        backbone.depth = 4
        if "img_size" in backbone:
            backbone.img_size = SIDE
        if "out_indices" in backbone:
            backbone.out_indices = [3]
        elif "img_size" in backbone:
            backbone.out_indices = [0, 1, 2, 3]
    if "decode_head" in model:
        model.data_preprocessor.size = (SIDE, SIDE)
        model.decode_head.channels = 16
        if "auxiliary_head" in model:
            model.auxiliary_head.channels = 16
    else:
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.fc_out_channels = 32
            if "num_shared_convs" in head:
                head.num_shared_convs, head.conv_out_channels = 1, 32
        model.roi_head.mask_head.num_convs = 1
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 10
        rcnn = model.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 8
    return cfg


def segmentation_batch():
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, SIDE, SIDE)))
        samples.append(sample)
    return samples


def detection_batch():
    samples = []
    for _ in range(2):
        sample = DetDataSample(
            metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE), "scale_factor": (1.0, 1.0), "img_id": 0}
        )
        masks = np.zeros((1, SIDE, SIDE), np.uint8)
        masks[:, 8:40, 8:50] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 50.0, 40.0]]),
            labels=torch.tensor([3]),
            masks=BitmapMasks(masks, SIDE, SIDE),
        )
        samples.append(sample)
    return samples


@pytest.mark.parametrize("cfg", CONFIGS, indirect=True, ids=CONFIGS)
def test_config_builds(cfg, built):
    """As large as it is, without its numbers; every layer that reads the backbone's maps expects their channels."""
    for key in ("backbone", "neck"):
        if cfg.model.get(key):
            cfg.model[key].pop("init_cfg", None)
    key = repr(cfg.model)
    if key not in built:
        with torch.device("meta"), uninitialised():
            built[key] = MODELS.build(cfg.model)
    model = built[key]
    if reader := getattr(model, "neck", None) or getattr(model, "decode_head", None):
        expected = getattr(reader, "in_channels", None)
        assert expected in (None, model.backbone.out_channels)
    assert cfg.default_hooks.checkpoint.type == "AtomicCheckpointHook", "which survives kill -9"
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        for dataset in loader.dataset.get("datasets", [loader.dataset]):
            for part in (dataset, dataset.get("dataset", dataset)):  # a wrapper may have a pipeline of its own
                Compose(part.get("pipeline", []))


@pytest.mark.parametrize("cfg", KINDS, indirect=True, ids=KINDS)
def test_config_trains_and_tests_a_step(cfg):
    torch.manual_seed(0)
    cfg = shrink(cfg)
    model = MODELS.build(cfg.model)
    model.init_weights()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    parts = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    reached = set()
    for name, parameter in parts.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))

    samples = segmentation_batch() if "decode_head" in cfg.model else detection_batch()
    channels = 6 if cfg.model.data_preprocessor.type.startswith("Paired") else 3
    batch = {"inputs": [torch.randint(0, 256, (channels, SIDE, SIDE), dtype=torch.uint8) for _ in samples]}
    losses = model.train_step({**batch, "data_samples": samples}, optimizer)
    assert all(torch.isfinite(v).all() for v in losses.values())
    assert reached == parts.keys(), "DistributedDataParallel fails for parameters without a gradient"

    model.eval()
    (result, _) = model.test_step({**batch, "data_samples": samples})
    if "decode_head" in cfg.model:
        classes = {"ADE20KDataset": 150, "CityscapesDataset": 19, "MFNetDataset": 9, "PST900Dataset": 5,
                   "NYUv2Dataset": 40, "SUNRGBDDataset": 37}[cfg.test_dataloader.dataset.type]  # fmt: skip
        assert result.seg_logits.data.shape == (classes, SIDE, SIDE)
    else:
        there = {"bboxes", "scores", "labels"} | ({"masks"} if "roi_head" in cfg.model else set())
        assert set(result.pred_instances.keys()) >= there


def test_every_family_has_every_task():
    """The matrix of the tasks and the families."""
    for family in ("vim", "vmamba", "local_", "vig_h", "vrwkv_adapter"):
        names = [name for name in CONFIGS if name.partition("/")[2].startswith(family)]
        for task in ("upernet_ade20k", "upernet_cityscapes", "cascade_mask_rcnn", "mask_rcnn_1x", "mask_rcnn_3x"):
            assert any(task in name for name in names), (family, task)
    for size in ("tiny", "small", "base", "large"):
        assert {f"segmentation/segman_{size}_{task}" for task in ("ade20k", "cityscapes")} <= set(CONFIGS)
