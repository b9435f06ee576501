# vmamba_vanilla_tiny: 46.5 box AP, 42.1 mask AP (published; arXiv 2401.10166).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vmamba_vanilla_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_tiny')),
    neck=dict(in_channels=[96, 192, 384, 768]))
