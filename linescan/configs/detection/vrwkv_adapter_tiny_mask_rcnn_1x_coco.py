# VRWKV-T with ViT-Adapter: 41.7 box AP, 38.0 mask AP (published; arXiv 2403.02308).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_tiny',
        neck=dict(type='adapter', features='last'),
        init_values=1.0,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_tiny')),
    neck=dict(in_channels=[192] * 4))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
