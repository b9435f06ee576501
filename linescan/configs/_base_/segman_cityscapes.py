# SegMAN's schedule on Cityscapes: 160 000 iterations of 8 images (8 GPUs with 1 each) of 1024x1024, tested in windows.
_base_ = [
    './segman.py', 'mmseg::_base_/datasets/cityscapes_1024x1024.py', './adamw_160k.py',
    'mmseg::_base_/default_runtime.py'
]
model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=(1024, 1024), stride=(768, 768)))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.))))
train_dataloader = dict(batch_size=1)
