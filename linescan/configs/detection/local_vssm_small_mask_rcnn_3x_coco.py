# LocalVMamba-S: 49.9 box AP, 44.1 mask AP (published; arXiv 2403.09338).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='local_vssm_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vssm_small')),
    neck=dict(in_channels=[96, 192, 384, 768]))
