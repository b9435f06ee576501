# VMamba-S of January 2024: 49.5 mIoU, 50.5 at many scales (published; arXiv 2401.10166).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='vmamba_vanilla_small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_small')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
