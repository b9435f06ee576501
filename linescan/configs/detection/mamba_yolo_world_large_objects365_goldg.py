# Mamba-YOLO-World-L pre-trained: 35.0 AP on LVIS minival, 45.4 on COCO (published; arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_goldg.py']
dims = [256, 512, 512]
model = dict(
    backbone=dict(depth=1.0, width=1.0, last_chans=512),
    neck=dict(dims=dims, blocks=3),
    bbox_head=dict(dims=dims),
    test_cfg=dict(overlap=0.0, most=1000))
train_dataloader = dict(batch_size=12)
