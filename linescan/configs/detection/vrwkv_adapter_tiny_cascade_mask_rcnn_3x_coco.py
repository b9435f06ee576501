# VRWKV-T with ViT-Adapter (arXiv 2403.02308); no published result.
_base_ = ['../_base_/cascade_mask_rcnn.py', '../_base_/coco_3x_layer_decay.py']
model = dict(
    backbone=dict(
        model='vrwkv_tiny',
        neck=dict(type='adapter', features='last'),
        init_values=1.0,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_tiny')),
    neck=dict(in_channels=[192] * 4))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
