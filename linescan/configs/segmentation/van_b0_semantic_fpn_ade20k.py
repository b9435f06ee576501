# VAN-B0: 38.5 mIoU (published; arXiv 2202.09741).
_base_ = ['../_base_/semantic_fpn.py', '../_base_/ade20k_40k.py']
model = dict(
    backbone=dict(
        model='van_b0',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://van_b0')),
    neck=dict(in_channels=[32, 64, 160, 256]))
