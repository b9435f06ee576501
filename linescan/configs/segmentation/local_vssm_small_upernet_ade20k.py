# LocalVMamba-S: 50.0 mIoU, 51.0 at many scales (published; arXiv 2403.09338).
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='local_vssm_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vssm_small')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),)
optim_wrapper = dict(type='AmpOptimWrapper')
