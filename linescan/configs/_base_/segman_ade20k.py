# SegMAN's schedule on ADE20K: 160 000 iterations of 16 images (8 GPUs with 2 each) of 512x512, the head ten times as
# fast. Tested whole, with sides that are multiples of 32.
_base_ = ['./segman.py', './ade20k_160k.py']
model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.))))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
