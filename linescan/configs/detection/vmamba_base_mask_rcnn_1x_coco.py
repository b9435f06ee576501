# vmamba_base_s2l15: 49.2 box AP, 44.1 mask AP (published; arXiv 2401.10166).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vmamba_base_s2l15',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_base_s2l15')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
