# vmamba_tiny_s2l5: 48.9 box AP, 43.7 mask AP (published; arXiv 2401.10166).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='vmamba_tiny_s2l5',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_tiny_s2l5')),
    neck=dict(in_channels=[96, 192, 384, 768]))
