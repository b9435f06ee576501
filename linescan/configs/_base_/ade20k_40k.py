# ADE20K: 40 000 iterations of 32 images (8 GPUs with 4 each) of 512x512, AdamW; as PoolFormer and others train.
_base_ = ['mmseg::_base_/datasets/ade20k.py', 'mmseg::_base_/schedules/schedule_40k.py',
          'mmseg::_base_/default_runtime.py']
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
