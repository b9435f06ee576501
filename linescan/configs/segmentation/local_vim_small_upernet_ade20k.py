# LocalVim-S: 46.4 mIoU, 47.5 at many scales (published; arXiv 2403.09338). Four maps of stride 16, no neck.
# Its classification weights were never released: training starts from your own file.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='local_vim_small',
        img_size=512,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/local_vim_small.ckpt')),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384))
