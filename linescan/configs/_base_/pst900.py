# PST900's tunnels, RGB and thermal, 1280x720.
_base_ = ['./mfnet.py']
prefix = dict(img_path='rgb_resize', extra_path='thermal_resize', seg_map_path='labels_resize')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadExtraImage'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoiceResize',
        scales=[(640, 360), (960, 540), (1280, 720), (1600, 900), (1920, 1080), (2240, 1260)],
        resize_type='Resize',
        keep_ratio=True),
    dict(type='RandomCrop', crop_size=(720, 1280)),
    dict(type='PackSegInputs')
]
data = dict(type='PST900Dataset', data_root='data/PST900_RGBT_Dataset', data_prefix=prefix)
train_dataloader = dict(dataset=dict(ann_file='train.txt', pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
