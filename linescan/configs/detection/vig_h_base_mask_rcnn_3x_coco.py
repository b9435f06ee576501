# ViG-H-B (arXiv 2405.18425, whose tables have its result; the dense code and weights are not released).
# Classification weights: huggingface.co/hustvl/ViG, to be put where init_cfg says.
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='vig_h_base',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/vig_h_base.pth')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
