# LocalVMamba-T: 46.7 box AP, 42.2 mask AP (published; arXiv 2403.09338).
# Its classification weights were never released: training starts from your own file.
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_1x.py']
model = dict(
    backbone=dict(
        model='local_vssm_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/local_vssm_tiny.ckpt')),
    neck=dict(in_channels=[96, 192, 384, 768]))
