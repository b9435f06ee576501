# VAN-B3: 50.6 mIoU at many scales (published; arXiv 2202.09741).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='van_b3',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://van_b3')),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320))
