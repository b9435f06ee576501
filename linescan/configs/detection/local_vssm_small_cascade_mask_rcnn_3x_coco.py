# LocalVMamba-S (arXiv 2403.09338); no published result.
_base_ = ['../_base_/cascade_mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='local_vssm_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vssm_small')),
    neck=dict(in_channels=[96, 192, 384, 768]))
