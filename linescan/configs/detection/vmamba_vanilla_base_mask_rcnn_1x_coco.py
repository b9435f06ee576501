# vmamba_vanilla_base: 48.6 box AP, 43.3 mask AP (published; arXiv 2401.10166).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vmamba_vanilla_base',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_base')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
