# Mamba-YOLO-World-S pre-trained on Objects365 alone; nothing is published for it (arXiv 2409.08513).
_base_ = ['../_base_/mamba_yolo_world_objects365.py']
model = dict(test_cfg=dict(most=1000))
