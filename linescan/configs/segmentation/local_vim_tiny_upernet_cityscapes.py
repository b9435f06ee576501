# LocalVim-T (arXiv 2403.09338); no published result.
_base_ = ['../_base_/upernet_cityscapes.py', '../_base_/cityscapes_160k.py']
model = dict(
    backbone=dict(
        model='local_vim_tiny',
        img_size=(512, 1024),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vim_tiny')),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192))
