# Mamba-YOLO-World-L fine-tuned on COCO: 54.1 box AP (published; arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_coco.py']
dims = [256, 512, 512]
model = dict(
    backbone=dict(depth=1.0, width=1.0, last_chans=512),
    neck=dict(dims=dims, blocks=3),
    bbox_head=dict(dims=dims))
train_dataloader = dict(batch_size=12)
load_from = 'pretrain/mamba_yolo_world_large.pth'  # pre-trained; see `linescan info mamba_yolo_world_large`
