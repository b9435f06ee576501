# Mamba-YOLO-World-M pre-trained on Objects365 alone; nothing is published for it (arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_objects365.py']
dims = [192, 384, 576]
model = dict(
    backbone=dict(depth=0.67, width=0.75, last_chans=768),
    neck=dict(dims=dims, blocks=2),
    bbox_head=dict(dims=dims),
    test_cfg=dict(most=1000))
train_cfg = dict(max_epochs=40)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(type='LinearLR', start_factor=1.0, end_factor=0.01, by_epoch=True, begin=3, end=40),
]
