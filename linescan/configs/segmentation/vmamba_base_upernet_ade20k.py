# VMamba-B[s2l15]: 51.0 mIoU, 51.6 at many scales (published; arXiv 2401.10166).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='vmamba_base_s2l15',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_base_s2l15')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
