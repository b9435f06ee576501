# Vim-Ti: 41.0 mIoU (published; arXiv 2401.09417), from weights of the first release. The authors'
# layer-wise learning rates matched no layer of theirs, so there are none here.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_60k.py']
model = dict(
    backbone=dict(
        model='vim_tiny_patch16_224',
        img_size=512,
        tap='mixer',
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vim_tiny_patch16_224')),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1))
