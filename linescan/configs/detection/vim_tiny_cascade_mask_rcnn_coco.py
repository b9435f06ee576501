# Vim-Ti: 45.7 box AP, 39.2 mask AP (published; arXiv 2401.09417), from weights of the first release.
_base_ = ['../_base_/cascade_mask_rcnn.py', '../_base_/coco_vitdet.py']
model = dict(
    backbone=dict(
        model='vim_tiny_patch16_224',
        img_size=1024,
        out_indices=[23],
        neck='simple',
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vim_tiny_patch16_224')),
    neck=None)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.837))
