# MambaVision-T: 51.1 box AP, 44.3 mask AP (published; arXiv 2407.08083). The weights are not for commercial use.
_base_ = ['../_base_/cascade_mask_rcnn_giou.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='mambavision_tiny',
        windows=(8, 8, 112, 56),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://mambavision_tiny')),
    neck=dict(in_channels=[80, 160, 320, 640]))
optim_wrapper = dict(type='AmpOptimWrapper')
