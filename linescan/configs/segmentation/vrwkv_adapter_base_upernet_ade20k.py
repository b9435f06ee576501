# VRWKV-B with ViT-Adapter: 49.2 mIoU (published; arXiv 2403.02308).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_base',
        neck=dict(type='adapter', num_heads=12, ratio=0.5),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_base')),
    decode_head=dict(in_channels=[768] * 4),
    auxiliary_head=dict(in_channels=768),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
