# VAN-B0: 41.1 mIoU at many scales (published; arXiv 2202.09741).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='van_b0',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://van_b0')),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
    auxiliary_head=dict(in_channels=160))
