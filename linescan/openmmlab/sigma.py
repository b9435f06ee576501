"""Sigma for mmseg: two images of a scene are one of six channels; needs mmsegmentation.

    custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.sigma'])
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='PairedSegDataPreProcessor', mean=mean, std=std, ...),
        backbone=dict(type='SigmaEncoder', depths=[2, 2, 9, 2], dim=96),
        decode_head=dict(type='SigmaDecoder', dim=96, num_classes=9))

`PairedSegDataset` finds the second images and `LoadExtraImage` appends them to the first, so that all that follows in
a pipeline (resize, crop, flip) is done to both alike. What the network computes is in `linescan.heads.sigma`.
"""

from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.datasets import BaseSegDataset
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import DATASETS, TRANSFORMS
from torch import Tensor

from ..errors import InputError
from ..heads.sigma import SigmaDecoder, SigmaEncoder
from ..media.draw import default_palette
from ..media.labels import class_names
from .backbone import fetch_checkpoint
from .keys import translate_keys

__all__ = [
    "LoadExtraImage",
    "MFNetDataset",
    "NYUv2Dataset",
    "PST900Dataset",
    "PairedSegDataPreProcessor",
    "PairedSegDataset",
    "SUNRGBDDataset",
    "SigmaBackbone",
    "SigmaDecodeHead",
]


# -- network ----------------------------------------------------------------------------------------------------------


@MODELS.register_module(name="SigmaEncoder")
class SigmaBackbone(SigmaEncoder, BaseModule):
    """`linescan.heads.sigma.SigmaEncoder`: images (B, 6, H, W), the second in channels 4 to 6, -> four fused maps.

    Args:
        with_cp: gradient checkpointing, block by block.
        init_cfg: `dict(type='Pretrained', checkpoint=...)`: a file, a URL, or `linescan://NAME` for the official file
            of a registered model; of a Sigma, or a classifier's that the encoder of both images starts from.
        kwargs: of `SigmaEncoder`.

    Raises:
        InputError: another kind of `init_cfg`, or images of other than six channels.
        CheckpointError: the file cannot be read, or is of another model.
    """

    def __init__(self, with_cp: bool = False, init_cfg: dict | None = None, **kwargs):
        if init_cfg and (init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg):
            raise InputError(f"init_cfg is dict(type='Pretrained', checkpoint=...) or None, not {dict(init_cfg)}")
        super().__init__(**kwargs)
        self.init_cfg = init_cfg
        self.set_grad_checkpointing(with_cp)
        self.register_load_state_dict_pre_hook(translate_keys)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != 6:
            raise InputError(
                f"two images of a scene are one of 6 channels (LoadExtraImage appends the second), got {tuple(x.shape)}"
            )
        return super().forward(*x.chunk(2, 1))

    def init_weights(self) -> None:
        """Loads what `init_cfg` names; otherwise the encoder is initialised since it was built."""
        if self.init_cfg and not self._is_init:  # type: ignore[has-type]
            self.load_pretrained(fetch_checkpoint(self.init_cfg["checkpoint"]))
            print_log(f"SigmaEncoder: loaded {self.init_cfg['checkpoint']}", logger="current")
        self._is_init = True


@MODELS.register_module(name="SigmaDecoder")
class SigmaDecodeHead(BaseDecodeHead):
    """`linescan.heads.sigma.SigmaDecoder` with mmseg's losses and prediction.

    Args:
        dim: channels of the map of stride 4; the others have 2, 4 and 8 times as many.
        num_classes: classes.
        depths, drop_path_rate: of `SigmaDecoder`.
        kwargs: of `BaseDecodeHead`: `loss_decode`, `ignore_index`, ...
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        depths: Sequence[int] = (4, 4, 4),
        drop_path_rate: float = 0.1 * 11 / 15,
        **kwargs,
    ):
        selected = {"in_index": (0, 1, 2, 3), "input_transform": "multiple_select"}
        super().__init__([2**i * dim for i in range(4)], dim, num_classes=num_classes, **{**kwargs, **selected})
        del self.conv_seg
        self.decoder = SigmaDecoder(dim, num_classes, depths, drop_path_rate)
        self.register_load_state_dict_pre_hook(translate_keys)

    def init_weights(self) -> None:
        """Nothing: the decoder is initialised since it was built."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps of strides 4, 8, 16, 32 -> logits (B, classes, H, W) of the image's size, where 4 divides it."""
        return self.decoder(self._transform_inputs(inputs))

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official keys, and those of a `SigmaDecoder`, to linescan's."""
        state = {key.removeprefix("decoder."): value for key, value in state.items()}
        return {f"decoder.{key}": value for key, value in self.decoder.checkpoint_filter(state).items()}


@MODELS.register_module()
class PairedSegDataPreProcessor(SegDataPreProcessor):
    """mmseg's preprocessor for two images in six channels, each with the same three means and deviations.

    Channels stay in the order of the files' reader: blue, green, red.

    Args:
        mean, std: of three channels.
        kwargs: of `SegDataPreProcessor`.

    Raises:
        InputError: channels are to be reordered.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs):
        if kwargs.get("bgr_to_rgb") or kwargs.get("rgb_to_bgr"):
            raise InputError("PairedSegDataPreProcessor keeps the order of channels: drop bgr_to_rgb and rgb_to_bgr")
        super().__init__(mean=mean, std=std, **kwargs)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(2 * [*values]).view(-1, 1, 1), persistent=False)


# -- data -------------------------------------------------------------------------------------------------------------


@DATASETS.register_module()
class PairedSegDataset(BaseSegDataset):
    """Images with a second one of the same scene, and a mask for both.

    Args:
        extra_suffix: of the second images, whose names are those of the first without their suffix.
        data_prefix: folders of the first images (`img_path`), the second (`extra_path`) and the masks (`seg_map_path`).
        kwargs: of `BaseSegDataset`; `ann_file` lists names without suffixes.
    """

    def __init__(self, extra_suffix: str = ".png", **kwargs):
        self.extra_suffix = extra_suffix
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """What `BaseSegDataset` has of each scene, and its `extra_path`."""
        items, first = super().load_data_list(), Path(self.data_prefix["img_path"])
        for item in items:
            name = str(Path(item["img_path"]).relative_to(first)).removesuffix(self.img_suffix)
            item["extra_path"] = str(Path(self.data_prefix["extra_path"]) / (name + self.extra_suffix))
        return items


@TRANSFORMS.register_module()
class LoadExtraImage(LoadImageFromFile):
    """Appends the second image, `extra_path`, to the first: `img` (H, W, 3) -> (H, W, 6).

    Args:
        color_type: "grayscale" repeats the grey values three times; "color" keeps blue, green and red.
        kwargs: of `LoadImageFromFile`.

    Raises:
        InputError: the file cannot be read, or is of another size.
    """

    def __init__(self, color_type: str = "grayscale", **kwargs):
        super().__init__(color_type=color_type, **kwargs)

    def transform(self, results: dict) -> dict:
        path = results["extra_path"]
        if not Path(path).is_file():
            raise InputError(f"{results['img_path']} has no partner: there is no {path}")
        try:
            loaded = super().transform({"img_path": path})
        except Exception:  # decoders raise anything from AssertionError to cv2.error
            loaded = None
        if loaded is None:
            raise InputError(f"{path} is not an image, or damaged")
        extra, image = np.atleast_3d(loaded["img"]), results["img"]
        if extra.shape[:2] != image.shape[:2]:
            sizes = ["x".join(map(str, x.shape[:2])) for x in (image, extra)]
            raise InputError(
                f"{results['img_path']} has {sizes[0]} pixels, {path} has {sizes[1]}: both are of one size"
            )
        results["img"] = np.concatenate([image, np.broadcast_to(extra, image.shape)], -1)
        return results


def _meta(data: str) -> dict:
    """Names and colours of a data set's classes."""
    names = class_names(data) or []
    return {"classes": tuple(names), "palette": [list(colour) for colour in default_palette(len(names))]}


@DATASETS.register_module()
class MFNetDataset(PairedSegDataset):
    """Streets by day and by night, RGB and thermal (Ha et al., IROS 2017)."""

    METAINFO = _meta("MFNet")


@DATASETS.register_module()
class PST900Dataset(PairedSegDataset):
    """Tunnels and caves, RGB and thermal (Shivakumar et al., ICRA 2020, arXiv 1909.10980)."""

    METAINFO = _meta("PST900")


@DATASETS.register_module()
class NYUv2Dataset(PairedSegDataset):
    """Rooms, RGB and depth, in 40 classes (Silberman et al., ECCV 2012; Gupta et al., CVPR 2013)."""

    METAINFO = _meta("NYUDepth v2")


@DATASETS.register_module()
class SUNRGBDDataset(PairedSegDataset):
    """Rooms, RGB and depth, in 37 classes (Song et al., CVPR 2015)."""

    METAINFO = _meta("SUN RGB-D")
