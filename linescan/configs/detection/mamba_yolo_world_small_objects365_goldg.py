# Mamba-YOLO-World-S pre-trained: 27.7 AP on LVIS minival, 38.0 on COCO (published; arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_goldg.py']
model = dict(test_cfg=dict(most=1000))
