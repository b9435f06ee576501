# VRWKV-S with ViT-Adapter: 44.8 box AP, 40.2 mask AP (published; arXiv 2403.02308).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vrwkv_small',
        neck=dict(type='adapter', features='last'),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_small')),
    neck=dict(in_channels=[384] * 4))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.85))
