# Sigma-S on SUN RGB-D: 52.4 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/sunrgbd.py']
model = dict(
    backbone=dict(
        depths=[2, 2, 27, 2],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_small')),
    decode_head=dict(num_classes=37))
