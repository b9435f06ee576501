"""Mamba-YOLO-World as a detector of mmdet, for its Runner: detector, backbone, neck, head and data. No mmyolo.

    custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.yolo'])
    model = dict(
        type='MambaYOLOWorld',
        backbone=dict(type='YOLOv8Backbone', depth=0.33, width=0.5, last_chans=1024),
        neck=dict(type='MambaFusionPAN', dims=[128, 256, 512], blocks=1),
        bbox_head=dict(type='YOLOWorldHead', dims=[128, 256, 512], num_classes=80),
        embeddings='data/texts/coco.npz', num_prompts=80)

What it computes is in `linescan.heads.detection`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmdet.datasets import ODVGDataset
from mmdet.models.detectors.base import BaseDetector
from mmengine.dist import get_world_size
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ..errors import InputError
from ..heads.detection import dense_boxes
from ..heads.detection.mamba_yolo_world import MambaFusionPAN, MambaYOLOWorld, YOLOv8Backbone, YOLOWorldHead
from ..media.resize import letterbox
from ..tasks.prompts import pick, read_embeddings
from .keys import translate_keys

__all__ = [
    "FreeVectorsOptimWrapperConstructor",
    "Letterbox",
    "MambaYOLOWorldDetector",
    "MixedDatasets",
    "PhraseDataset",
    "SamplePrompts",
    "phrases",
]

for part in (YOLOv8Backbone, MambaFusionPAN, YOLOWorldHead):
    MODELS.register_module(module=part)


@MODELS.register_module(name="MambaYOLOWorld")
class MambaYOLOWorldDetector(BaseDetector):
    """`linescan.heads.detection.mamba_yolo_world.MambaYOLOWorld` with its losses; official files load as they are.

    Args:
        backbone, neck, bbox_head: configs of the parts.
        embeddings: a file of embeddings (`linescan.tasks.prompts`). It is read when the training begins, and for a
            checkpoint that keeps no vocabulary, such as the official ones; checkpoints of trainings here keep theirs.
        prompts: names in that file, in the order of the classes; all by default.
        num_prompts: how many they are.
        test_cfg: `score`, `candidates`, `overlap` and `most` of `linescan.heads.detection.dense_boxes.decode`.
        data_preprocessor, init_cfg: as of every detector. Images are RGB in 0..1.
    """

    strides = MambaYOLOWorld.strides
    forward_features = MambaYOLOWorld.forward_features
    set_vocabulary = MambaYOLOWorld.set_vocabulary

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        bbox_head: dict,
        num_prompts: int,
        embeddings: str | None = None,
        prompts: Sequence[str] | None = None,
        test_cfg: dict | None = None,
        train_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone, self.neck, self.bbox_head = map(MODELS.build, (backbone, neck, bbox_head))
        self.text_dim = self.neck.text_top_down.out_proj.out_features
        self.num_classes, self.source, self.prompts = num_prompts, embeddings, prompts
        self.test_cfg = dict(test_cfg or {})
        self.register_buffer("vocabulary", torch.zeros(num_prompts, self.text_dim))
        self.register_load_state_dict_pre_hook(translate_keys)

    def init_weights(self) -> None:
        """Loads what `init_cfg` names, and the embeddings."""
        super().init_weights()
        self.read_vocabulary()

    def read_vocabulary(self) -> None:
        """Takes the embeddings from their file, where there is one.

        Raises:
            InputError: the file cannot be read, or holds others than `prompts`, or another number of them.
        """
        if self.source is None:
            return
        names, vectors = read_embeddings(self.source)
        vectors = vectors if self.prompts is None else pick(self.prompts, names, vectors, self.source)
        if len(vectors) != self.num_classes:
            raise InputError(f"{self.source} has {len(vectors)} embeddings; the config says {self.num_classes} prompts")
        self.set_vocabulary(vectors)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's; with the embeddings' file where the checkpoint has no vocabulary."""
        state = MambaYOLOWorld.checkpoint_filter(self, state)
        if "vocabulary" not in state:
            self.read_vocabulary()
            state["vocabulary"] = self.vocabulary
        return state

    def embeddings(self, text: Tensor | None, batch: int) -> Tensor:
        """As of the plain network."""
        return MambaYOLOWorld.embeddings(self, text, batch)

    def extract_feat(self, batch_inputs: Tensor) -> list[Tensor]:
        """The neck's maps (B, C, H / s, W / s), s = 8, 16, 32, of images (B, 3, H, W)."""
        return self.forward_features(batch_inputs)[0]

    def _forward(self, batch_inputs: Tensor, batch_data_samples=None) -> dense_boxes.Levels:
        chosen = [sample.get("vectors") for sample in batch_data_samples or ()]
        text = None
        if any(vectors is not None for vectors in chosen):
            text = torch.from_numpy(np.stack(chosen)).to(self.vocabulary)
        return self.bbox_head(*self.forward_features(batch_inputs, text))

    def loss(self, batch_inputs: Tensor, batch_data_samples) -> dict[str, Tensor]:
        """The losses of `dense_boxes.losses`, as published times the processes of the training."""
        objects = [sample.gt_instances for sample in batch_data_samples]
        targets = [(getattr(one.bboxes, "tensor", one.bboxes), one.labels) for one in objects]
        found = dense_boxes.losses(self._forward(batch_inputs, batch_data_samples), self.strides, targets)
        return {f"loss_{name}": loss * get_world_size() for name, loss in found.items()}

    def predict(self, batch_inputs: Tensor, batch_data_samples, rescale: bool = True):
        """The samples with `pred_instances`, in pixels of the original images."""
        levels = self._forward(batch_inputs)
        for sample, found in zip(batch_data_samples, dense_boxes.decode(levels, self.strides, **self.test_cfg)):
            boxes, meta = found.boxes, sample.metainfo
            if rescale:
                corner, factor = meta.get("corner", (0, 0)), meta.get("scale_factor", (1.0, 1.0))
                boxes = (boxes - boxes.new_tensor(corner).repeat(2)) / boxes.new_tensor(factor).repeat(2)
            height, width = meta["ori_shape"] if rescale else meta["img_shape"]
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
            sample.pred_instances = InstanceData(bboxes=boxes, scores=found.scores, labels=found.labels)
        return batch_data_samples


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class FreeVectorsOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default, but no weight decay for vectors and numbers, such as norms and biases."""

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module=None) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        for group in params:
            if all(parameter.ndim < 2 for parameter in group["params"]):
                group["weight_decay"] = 0.0


@TRANSFORMS.register_module(name="YOLOLetterbox")
class Letterbox(BaseTransform):
    """An image in the middle of one of the size `scale`, with its boxes: `linescan.media.resize.letterbox`.

    Args:
        scale: (width, height).
        fill: of the border.
    """

    def __init__(self, scale: tuple[int, int], fill: int = 114):
        self.size, self.fill = (scale[1], scale[0]), fill

    def transform(self, results: dict) -> dict:
        """Changes `img`, `img_shape` and `gt_bboxes`; sets `scale_factor` and `corner`, which packing is to keep."""
        inner = letterbox(results["img"], self.size, self.fill)
        results |= {"img": inner.image, "img_shape": self.size, "scale_factor": inner.scale, "corner": inner.corner}
        if "gt_bboxes" in results:
            results["gt_bboxes"].rescale_(inner.scale)
            results["gt_bboxes"].translate_(inner.corner)
        return results


# -- vocabularies of the data -----------------------------------------------------------------------------------------


@lru_cache(8)  # what a process has read before it makes the workers of a loader, these share
def _vocabulary(path: str) -> tuple[dict[str, int], np.ndarray]:
    """The row of each name in a file of embeddings, and all vectors (n, dim), of unit length."""
    names, vectors = read_embeddings(path)
    return {name: row for row, name in enumerate(names)}, F.normalize(vectors, dim=-1).numpy()


@TRANSFORMS.register_module()
class SamplePrompts(BaseTransform):
    """Some of a large vocabulary for each image: what it shows, and others by chance.

    Args:
        embeddings: the file of the vocabulary; labels are rows in it. Its embedding of "", if it is there, fills up
            too few prompts, else zeros do.
        num_prompts: for an image.
        negatives: (least, most) prompts beside those that are there.
    """

    def __init__(self, embeddings: str, num_prompts: int = 80, negatives: tuple[int, int] = (80, 80)):
        self.embeddings, self.num_prompts, self.negatives = embeddings, num_prompts, negatives

    def transform(self, results: dict) -> dict:
        """Sets `vectors` (num_prompts, dim), which packing is to keep; numbers `gt_bboxes_labels` by them."""
        rows, vectors = _vocabulary(self.embeddings)
        empty, labels = rows.get(""), results["gt_bboxes_labels"]
        chosen = np.random.permutation(np.unique(labels))[: self.num_prompts]
        count = min(np.random.randint(self.negatives[0], self.negatives[1] + 1), self.num_prompts - len(chosen))
        if count:
            others = np.setdiff1d(np.arange(len(vectors)), [*labels, -1 if empty is None else empty])
            chosen = np.random.permutation(np.append(chosen, np.random.permutation(others)[:count]))
        place = {row: i for i, row in enumerate(chosen.tolist())}
        kept = np.isin(labels, chosen)
        for name in ("gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags"):
            if name in results:
                results[name] = results[name][kept]
        results["gt_bboxes_labels"] = np.array([place[row] for row in labels[kept].tolist()], np.int64)
        filling = np.zeros_like(vectors[:1]) if empty is None else vectors[empty : empty + 1]
        missing = self.num_prompts - len(chosen)
        return results | {"vectors": np.concatenate([vectors[chosen], filling.repeat(missing, 0)])}


def _phrase(region: dict) -> str:
    """What a region of an ODVG file is called: one span of the caption, or several."""
    return region["phrase"] if isinstance(region["phrase"], str) else " ".join(region["phrase"])


def phrases(*files: str | Path) -> list[str]:
    """The different phrases of annotation files in mmdet's ODVG format, in order, such as those of GoldG."""
    found: dict[str, None] = {}
    for file in files:
        with open(file) as lines:
            for line in lines:
                found |= dict.fromkeys(map(_phrase, json.loads(line)["grounding"]["regions"]))
    return list(found)


@DATASETS.register_module()
class PhraseDataset(ODVGDataset):
    """Images with captions whose phrases have boxes, such as GoldG's, in mmdet's ODVG format.

    The label of a box is the row of its phrase in a file of embeddings, so that images can be mixed.

    Args:
        embeddings: the file, which has all `phrases`.
        kwargs: of `ODVGDataset`: `data_root`, `ann_file`, `data_prefix`, `pipeline`.

    Raises:
        InputError: a phrase is not in the file.
    """

    def __init__(self, *args, embeddings: str, **kwargs):
        self.embeddings = embeddings
        super().__init__(*args, return_classes=True, **kwargs)

    def load_data_list(self) -> list[dict]:
        """As of `ODVGDataset`."""
        rows, _ = _vocabulary(self.embeddings)
        images = super().load_data_list()
        for image in images:
            called = {i: _phrase(region) for i, region in image.pop("phrases").items()}
            if strange := [name for name in called.values() if name not in rows]:
                raise InputError(f"{self.embeddings} has no embedding of {strange[0]!r}, a phrase of {self.ann_file}")
            for instance in image["instances"]:
                instance["bbox_label"] = rows[called[instance["bbox_label"]]]
        return images


@DATASETS.register_module()
class MixedDatasets(ConcatDataset):
    """Datasets one behind the other, each with mosaics of its own images (`MultiImageMixDataset`).

    Args:
        datasets: configs.
    """

    def __init__(self, datasets: Sequence[dict]):
        self.mixes = [DATASETS.build(dataset) for dataset in datasets]
        super().__init__(self.mixes)
        self.metainfo = self.mixes[0].metainfo

    def update_skip_type_keys(self, keys: Sequence[str]) -> None:
        """Leaves out transforms of these types, in all datasets: what mmdet's hook for the last epochs asks for."""
        for dataset in self.mixes:
            dataset.update_skip_type_keys(keys)
