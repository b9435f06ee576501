# VAN-B2: 46.4 box AP, 41.8 mask AP (published; arXiv 2202.09741).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='van_b2',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://van_b2')),
    neck=dict(in_channels=[64, 128, 320, 512]))
