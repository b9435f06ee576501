# VRWKV-T with ViT-Adapter: 43.3 mIoU (published; arXiv 2403.02308).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_tiny',
        init_values=1.0,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_tiny')),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
optim_wrapper = dict(optimizer=dict(lr=12e-5), paramwise_cfg=dict(decay_rate=0.95))
