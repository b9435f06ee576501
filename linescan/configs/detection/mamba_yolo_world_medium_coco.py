# Mamba-YOLO-World-M fine-tuned on COCO: 51.4 box AP (published; arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_coco.py']
dims = [192, 384, 576]
model = dict(
    backbone=dict(depth=0.67, width=0.75, last_chans=768),
    neck=dict(dims=dims, blocks=2),
    bbox_head=dict(dims=dims))
load_from = 'pretrain/mamba_yolo_world_medium.pth'  # pre-trained; see `linescan info mamba_yolo_world_medium`
