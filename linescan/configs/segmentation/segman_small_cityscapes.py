# SegMAN-S: 83.2 mIoU (published; arXiv 2412.11890).
_base_ = ['../_base_/segman_cityscapes.py']
model = dict(
    backbone=dict(
        model='segman_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://segman_small')),
    decode_head=dict(in_channels=[64, 144, 288, 512], channels=152, feat_proj_dim=288))
