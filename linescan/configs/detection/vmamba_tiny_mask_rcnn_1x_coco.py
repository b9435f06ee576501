# vmamba_tiny_s1l8: 47.3 box AP, 42.7 mask AP (published; arXiv 2401.10166).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vmamba_tiny_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_tiny_s1l8')),
    neck=dict(in_channels=[96, 192, 384, 768]))
