# Sigma-S on PST900: 87.8 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/pst900.py']
model = dict(
    data_preprocessor=dict(size=(720, 1280)),
    backbone=dict(
        depths=[2, 2, 27, 2],
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_small')),
    decode_head=dict(num_classes=5))
