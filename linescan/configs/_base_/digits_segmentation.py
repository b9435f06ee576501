# Digit scenes as mmseg reads them: images and mask PNGs.
_base_ = './digits.py'
default_scope = 'mmseg'
metainfo = dict(classes=('canvas', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root={{_base_.data_root}},
        data_prefix=dict(img_path='train/images', seg_map_path='train/masks'),
        img_suffix='.png',
        pipeline=pipeline))
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root={{_base_.data_root}},
        data_prefix=dict(img_path='val/images', seg_map_path='val/masks'),
        img_suffix='.png',
        pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=1400, eta_min_ratio=0.01),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1400, val_interval=200)
