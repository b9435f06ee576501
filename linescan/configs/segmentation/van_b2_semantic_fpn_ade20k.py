# VAN-B2: 46.7 mIoU (published; arXiv 2202.09741).
_base_ = ['../_base_/semantic_fpn.py', '../_base_/ade20k_40k.py']
model = dict(
    backbone=dict(
        model='van_b2',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://van_b2')),
    neck=dict(in_channels=[64, 128, 320, 512]))
