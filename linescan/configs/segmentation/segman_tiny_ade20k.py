# SegMAN-T: 43.0 mIoU (published; arXiv 2412.11890).
_base_ = ['../_base_/segman_ade20k.py']
model = dict(
    backbone=dict(
        model='segman_tiny',
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://segman_tiny')),
    decode_head=dict(in_channels=[32, 64, 144, 192], channels=128, feat_proj_dim=192))
