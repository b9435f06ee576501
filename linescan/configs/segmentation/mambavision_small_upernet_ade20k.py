# MambaVision-S: 48.2 mIoU (published; arXiv 2407.08083). The weights are not for commercial use.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='mambavision_small',
        windows=(8, 8, 160, 56),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://mambavision_small')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(type='AmpOptimWrapper')
