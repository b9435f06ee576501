# Mamba-YOLO-World-L pre-trained on Objects365 alone; nothing is published for it (arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_objects365.py']
dims = [256, 512, 512]
model = dict(
    backbone=dict(depth=1.0, width=1.0, last_chans=512),
    neck=dict(dims=dims, blocks=3),
    bbox_head=dict(dims=dims),
    test_cfg=dict(overlap=0.0, most=1000))
train_dataloader = dict(batch_size=12)
