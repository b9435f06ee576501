# vmamba_small_s2l15: 49.9 box AP, 44.2 mask AP (published; arXiv 2401.10166).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='vmamba_small_s2l15',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_small_s2l15')),
    neck=dict(in_channels=[96, 192, 384, 768]))
