# MambaVision-T: 46.0 mIoU (published; arXiv 2407.08083). The weights are not for commercial use.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='mambavision_tiny',
        windows=(8, 8, 64, 32),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://mambavision_tiny')),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320))
optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(lr=5e-5))
