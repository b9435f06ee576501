# LocalVMamba-S (arXiv 2403.09338); no published result.
_base_ = ['../_base_/upernet_cityscapes.py', '../_base_/cityscapes_160k.py']
model = dict(
    backbone=dict(
        model='local_vssm_small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vssm_small')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
