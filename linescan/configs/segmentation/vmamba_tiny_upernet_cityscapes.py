# VMamba-T (arXiv 2401.10166); no published result.
_base_ = ['../_base_/upernet_cityscapes.py', '../_base_/cityscapes_160k.py']
model = dict(
    backbone=dict(
        model='vmamba_tiny_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_tiny_s1l8')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
