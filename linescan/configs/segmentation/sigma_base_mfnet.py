# Sigma-B on MFNet: 61.3 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/mfnet.py']
model = dict(
    backbone=dict(
        depths=[2, 2, 27, 2],
        dim=128,
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_base')),
    decode_head=dict(dim=128))
