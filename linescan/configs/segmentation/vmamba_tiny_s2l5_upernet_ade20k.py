# VMamba-T[s2l5]: 48.3 mIoU, 48.6 at many scales (published; arXiv 2401.10166).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='vmamba_tiny_s2l5',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_tiny_s2l5')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
