# VRWKV-L with ViT-Adapter: 50.6 box AP, 44.9 mask AP (published; arXiv 2403.02308).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_large',
        neck=dict(type='adapter', num_heads=16, ratio=0.5, features='last'),
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_large')),
    neck=dict(in_channels=[1024] * 4))
