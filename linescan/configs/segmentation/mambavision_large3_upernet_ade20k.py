# MambaVision-L3-512-21K at 640x640: 53.2 mIoU (published; arXiv 2407.08083), without mixed precision, which the authors
# found unstable here. The weights are not for commercial use.
_base_ = [
    '../_base_/upernet.py', 'mmseg::_base_/datasets/ade20k_640x640.py', '../_base_/adamw_160k.py',
    'mmseg::_base_/default_runtime.py'
]
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        model='mambavision_large3',
        windows=(8, 8, 64, 32),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://mambavision_large3.in21k_ft_in1k_512')),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024))
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=8e-5, weight_decay=0.05))
