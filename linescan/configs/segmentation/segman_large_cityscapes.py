# SegMAN-L: 84.2 mIoU (published; arXiv 2412.11890); its stochastic depth is not, this is that of the next smaller one.
_base_ = ['../_base_/segman_cityscapes.py']
model = dict(
    backbone=dict(
        model='segman_large',
        drop_path_rate=0.25,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://segman_large')),
    decode_head=dict(in_channels=[96, 192, 432, 640], channels=224, feat_proj_dim=432),
    test_cfg=dict(_delete_=True, mode='whole'))
