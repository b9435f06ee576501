# ViG-H-T (arXiv 2405.18425, whose tables have its result; the dense code and weights are not released).
# Classification weights: huggingface.co/hustvl/ViG, to be put where init_cfg says.
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vig_h_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/vig_h_tiny.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]))
