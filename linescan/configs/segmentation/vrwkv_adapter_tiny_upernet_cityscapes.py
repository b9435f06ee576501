# VRWKV-T with ViT-Adapter (arXiv 2403.02308); no published result.
_base_ = ['../_base_/upernet_cityscapes.py', '../_base_/cityscapes_160k.py']
model = dict(
    backbone=dict(
        model='vrwkv_tiny',
        init_values=1.0,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_tiny')),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode='slide', crop_size=(512, 1024), stride=(341, 683)))
