# Sigma (arXiv 2404.04256) for mmseg: two images of a scene are one of six channels. The published weights read BGR, by
# an oversight of their loader, with the statistics of RGB.
_base_ = ['./linescan.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.sigma'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='PairedSegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        pad_val=0,
        seg_pad_val=255,
        size=(480, 640)),
    backbone=dict(
        type='SigmaEncoder',
        depths=[2, 2, 9, 2],
        dim=96,
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='linescan://vmamba_vanilla_tiny')),
    decode_head=dict(
        type='SigmaDecoder',
        dim=96,
        num_classes=9,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

# 500 epochs of batches of 8. As published, the scans' own parameters keep the values that they start from (but for the
# projections of the fusion's first scans), and so do the weights of the decoder's shortcuts; without `custom_keys` all
# are trained.
fixed = dict(lr_mult=0.)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        custom_keys={
            key: fixed
            for key in ('mixer.ssm.', 'concat.0.ssm.', 'concat.1.ssm.', 'concat.2.ssm.', 'concat.3.ssm.', 'A_log',
                        'ssm.0.D', 'ssm.1.D', 'skip1', 'skip2')
        }))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=10, by_epoch=True, convert_to_iter_based=True),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=10, end=500, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=500, val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='AtomicCheckpointHook', interval=10, max_keep_ckpts=3, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
log_processor = dict(by_epoch=True)
