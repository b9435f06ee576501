# Mamba-YOLO-World-S pre-trained: 27.7 AP on LVIS minival, 38.0 on COCO (published, with GoldG; arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_objects365.py']
model = dict(test_cfg=dict(most=1000))
