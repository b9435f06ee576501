"""SegMAN's decoder as a decode head of mmseg, under its published name; needs mmsegmentation.

    custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.segman'])
    model = dict(
        backbone=dict(type='LinescanBackbone', model='segman_tiny'),
        decode_head=dict(
            type='SegMANDecoder', in_channels=[32, 64, 144, 192], in_index=[0, 1, 2, 3], channels=128,
            feat_proj_dim=192, num_classes=150, norm_cfg=dict(type='SyncBN', requires_grad=True), align_corners=False))

What it computes is in `linescan.heads.segman`.
"""

from typing import Sequence

from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from ..heads.segman import MMSCopE
from .keys import translate_keys

__all__ = ["SegMANDecodeHead"]


@MODELS.register_module(name="SegMANDecoder")
class SegMANDecodeHead(MMSCopE, BaseDecodeHead):
    """`linescan.heads.segman.SegMANDecoder` with mmseg's losses and prediction; official files load as they are.

    Args:
        in_channels: channels of the maps of strides 4, 8, 16 and 32.
        feat_proj_dim: f, that each map is projected to.
        norm_cfg: `dict(type='SyncBN')` synchronises the BatchNorms over processes.
        kwargs: of `BaseDecodeHead`: `channels`, `num_classes`, `in_index`, `loss_decode`, ...

    Raises:
        ValueError: not four maps, or norms other than BatchNorm.
    """

    def __init__(self, in_channels: Sequence[int], feat_proj_dim: int, norm_cfg: dict | None = None, **kwargs):
        if len(in_channels) != 4:
            raise ValueError(f"SegMANDecoder reads four maps, got in_channels={list(in_channels)}")
        kind = (norm_cfg or {}).get("type", "BN")
        if kind not in ("BN", "BN2d", "SyncBN"):
            raise ValueError(f"SegMANDecoder has BatchNorms: norm_cfg's type is 'BN' or 'SyncBN', not {kind!r}")
        kwargs = {"in_index": (0, 1, 2, 3), **kwargs, "input_transform": "multiple_select"}
        super().__init__(in_channels, norm_cfg=norm_cfg, **kwargs)
        self.init_fusion(in_channels, self.channels, feat_proj_dim)
        if kind == "SyncBN":
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        self.register_load_state_dict_pre_hook(translate_keys)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps of strides 4, 8, 16, 32 -> logits (B, classes, H / 8, W / 8)."""
        return self.cls_seg(self.fuse(self._transform_inputs(inputs)))
