# Vim-Ti (arXiv 2401.09417), four blocks' maps brought to four scales; no published result.
_base_ = ['../_base_/mask_rcnn.py', '../_base_/coco_3x.py']
model = dict(
    backbone=dict(
        model='vim_tiny_patch16_224',
        img_size=1024,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vim_tiny_patch16_224')),
    neck=dict(in_channels=[192] * 4))
