# LocalVim-T: 43.4 mIoU, 44.4 at many scales (published; arXiv 2403.09338). Four maps of stride 16, no neck.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='local_vim_tiny',
        img_size=512,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://local_vim_tiny')),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192))
