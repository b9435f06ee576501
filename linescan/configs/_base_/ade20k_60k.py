# ADE20K, 60 000 iterations of 32 images (4 GPUs with 8 each) of 512x512.
_base_ = './ade20k_160k.py'
train_cfg = dict(max_iters=60000, val_interval=6000)
train_dataloader = dict(batch_size=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
