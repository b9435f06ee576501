# SegMAN-S: 51.3 mIoU (published; arXiv 2412.11890).
_base_ = ['../_base_/segman_ade20k.py']
model = dict(
    backbone=dict(
        model='segman_small',
        drop_path_rate=0.15,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://segman_small')),
    decode_head=dict(in_channels=[64, 144, 288, 512], channels=144, feat_proj_dim=288))
