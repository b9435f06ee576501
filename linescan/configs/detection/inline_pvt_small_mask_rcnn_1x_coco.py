# As PVT is trained; the authors publish no code or weights for detection (arXiv 2412.06590).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='inline_pvt_small',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://inline_pvt_small')),
    neck=dict(in_channels=[64, 128, 320, 512]))
