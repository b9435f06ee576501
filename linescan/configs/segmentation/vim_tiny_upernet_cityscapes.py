# Vim-Ti (arXiv 2401.09417); no published result.
_base_ = ['../_base_/upernet_cityscapes.py', '../_base_/cityscapes_160k.py']
model = dict(
    backbone=dict(
        model='vim_tiny_patch16_224',
        img_size=(512, 1024),
        tap='mixer',
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vim_tiny_patch16_224')),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode='slide', crop_size=(512, 1024), stride=(341, 683)))
