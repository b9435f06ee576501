# VAN-B4: 53.5 mIoU at many scales (published; arXiv 2202.09741), from weights of ImageNet-22K, which
# github.com/LGYoung/VAN-Classification links to, to be put where init_cfg says.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='van_b4',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/van_b4_22k.pth')),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320))
