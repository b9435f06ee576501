# VRWKV-B with ViT-Adapter: 46.8 box AP, 41.7 mask AP (published; arXiv 2403.02308).
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='vrwkv_base',
        neck=dict(type='adapter', num_heads=12, ratio=0.5, features='last'),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vrwkv_base')),
    neck=dict(in_channels=[768] * 4))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.85))
