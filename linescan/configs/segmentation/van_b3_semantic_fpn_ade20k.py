# VAN-B3: 48.1 mIoU (published; arXiv 2202.09741).
_base_ = ['../_base_/semantic_fpn.py', '../_base_/ade20k_40k.py']
model = dict(
    backbone=dict(
        model='van_b3',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://van_b3')),
    neck=dict(in_channels=[64, 128, 320, 512]))
