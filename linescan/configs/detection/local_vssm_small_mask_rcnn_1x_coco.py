# LocalVMamba-S: 48.4 box AP, 43.2 mask AP (published; arXiv 2403.09338).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='local_vssm_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vssm_small')),
    neck=dict(in_channels=[96, 192, 384, 768]))
