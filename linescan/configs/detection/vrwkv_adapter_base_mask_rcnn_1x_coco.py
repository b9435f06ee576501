# VRWKV-B with ViT-Adapter: 46.8 box AP, 41.7 mask AP (published; arXiv 2403.02308).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_base',
        neck=dict(type='adapter', num_heads=12, ratio=0.5, features='last'),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_base')),
    neck=dict(in_channels=[768] * 4))
