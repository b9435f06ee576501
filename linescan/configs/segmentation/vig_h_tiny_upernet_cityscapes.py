# ViG-H-T (arXiv 2405.18425); no published result.
# Classification weights: huggingface.co/hustvl/ViG, to be put where init_cfg says.
_base_ = ['../_base_/upernet_cityscapes.py', '../_base_/cityscapes_160k.py']
model = dict(
    backbone=dict(
        model='vig_h_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/vig_h_tiny.pth')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
