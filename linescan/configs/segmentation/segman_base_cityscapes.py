# SegMAN-B: 83.8 mIoU (published; arXiv 2412.11890).
_base_ = ['../_base_/segman_cityscapes.py']
model = dict(
    backbone=dict(
        model='segman_base',
        drop_path_rate=0.25,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://segman_base')),
    decode_head=dict(in_channels=[96, 160, 364, 560], channels=180, feat_proj_dim=320))
