# CARE-S1: 40.7 box AP, 37.5 mask AP (published; arXiv 2411.16170; the dense code and weights are not released).
# Classification weights: huggingface.co/YuanZ1995/CARE-Transformer, to be put where init_cfg says.
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='care_s1',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/CARETrans_S1.pth.tar')),
    neck=dict(in_channels=[32, 64, 128, 1024]))
