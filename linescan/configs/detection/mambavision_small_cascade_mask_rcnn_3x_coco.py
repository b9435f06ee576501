# MambaVision-S: 52.3 box AP, 45.2 mask AP (published; arXiv 2407.08083). The weights are not for commercial use.
_base_ = ['../_base_/cascade_mask_rcnn_giou.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='mambavision_small',
        windows=(8, 8, 112, 56),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://mambavision_small')),
    neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(type='AmpOptimWrapper')
