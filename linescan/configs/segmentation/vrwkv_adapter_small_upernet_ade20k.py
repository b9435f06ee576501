# VRWKV-S with ViT-Adapter: 47.2 mIoU (published; arXiv 2403.02308).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_small')),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
