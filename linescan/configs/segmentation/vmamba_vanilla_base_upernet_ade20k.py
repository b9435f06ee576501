# VMamba-B of January 2024: 50.0 mIoU, 51.3 at many scales (published; arXiv 2401.10166).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='vmamba_vanilla_base',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_base')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
