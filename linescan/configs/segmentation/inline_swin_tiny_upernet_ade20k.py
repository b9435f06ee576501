# As Swin is trained; the authors publish no code or weights for segmentation (arXiv 2412.06590).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='inline_swin_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://inline_swin_tiny')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
