# VAN-B6: 54.7 mIoU at many scales (published; arXiv 2202.09741), from weights of ImageNet-22K, which
# github.com/LGYoung/VAN-Classification links to, to be put where init_cfg says.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='van_b6',
        drop_path_rate=0.5,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/van_b6_22k.pth')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
