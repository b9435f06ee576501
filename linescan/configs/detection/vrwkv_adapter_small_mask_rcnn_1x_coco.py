# VRWKV-S with ViT-Adapter: 44.8 box AP, 40.2 mask AP (published; arXiv 2403.02308).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_small',
        neck=dict(type='adapter', features='last'),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_small')),
    neck=dict(in_channels=[384] * 4))
