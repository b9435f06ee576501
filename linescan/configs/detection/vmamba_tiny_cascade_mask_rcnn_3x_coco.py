# VMamba-T (arXiv 2401.10166); no published result.
_base_ = ['../_base_/cascade_mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='vmamba_tiny_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_tiny_s1l8')),
    neck=dict(in_channels=[96, 192, 384, 768]))
