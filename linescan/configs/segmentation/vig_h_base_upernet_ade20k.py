# ViG-H-B (arXiv 2405.18425, whose tables have its result; the dense code and weights are not released).
# Classification weights: huggingface.co/hustvl/ViG, to be put where init_cfg says.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='vig_h_base',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/vig_h_base.pth')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
