# LocalVim-T: 45.3 box AP, 39.9 mask AP (published; arXiv 2403.09338).
_base_ = ['../_base_/cascade_mask_rcnn.py', '../_base_/coco_vitdet.py']
model = dict(
    backbone=dict(
        model='local_vim_tiny',
        img_size=1024,
        out_indices=[19],
        neck='simple',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vim_tiny')),
    neck=None)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
