# LocalVMamba-T: 47.9 mIoU, 49.1 at many scales (published; arXiv 2403.09338).
# Its classification weights were never released: training starts from your own file.
_base_ = ['../_base_/upernet.py', '../_base_/ade20k_160k.py']
model = dict(
    backbone=dict(
        model='local_vssm_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/local_vssm_tiny.ckpt')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
