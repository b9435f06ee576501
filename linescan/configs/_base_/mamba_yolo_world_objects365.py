# Pre-training on Objects365 v1 alone, 80 prompts for each image: what it shows, and others of its 365 classes.
_base_ = ['./mamba_yolo_world_coco.py']
data_root = 'data/objects365v1/'
data = dict(type='Objects365V1Dataset', data_root=data_root)
val_file = 'annotations/objects365_val.json'
train_dataloader = dict(
    dataset=dict(
        dataset=dict(ann_file='annotations/objects365_train.json', data_prefix=dict(img='train/'), **data),
        pipeline={{_base_.sampling_pipeline}}))
val_dataloader = dict(dataset=dict(ann_file=val_file, data_prefix=dict(img='val/'), **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_file)
test_evaluator = val_evaluator
model = dict(embeddings='data/texts/objects365.npz', num_prompts=365)
train_cfg = dict(max_epochs=30)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(type='LinearLR', start_factor=1.0, end_factor=0.01, by_epoch=True, begin=3, end=30),
]
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, update_buffers=True, priority=49),
    dict(type='YOLOXModeSwitchHook', num_last_epochs=2, skip_type_keys=('Mosaic', 'RandomAffine'), priority=48),
]
