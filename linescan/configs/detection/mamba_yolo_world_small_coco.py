# Mamba-YOLO-World-S fine-tuned on COCO: 46.4 box AP (published; arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_coco.py']
load_from = 'pretrain/mamba_yolo_world_small.pth'  # pre-trained; see `linescan info mamba_yolo_world_small`
