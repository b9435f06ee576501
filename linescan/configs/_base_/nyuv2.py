# NYUDepth v2's rooms, RGB and depth, with 40 classes and 0 for none.
_base_ = ['./mfnet.py']
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadExtraImage'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoiceResize',
        scales=[(320, 240), (480, 360), (640, 480), (800, 600), (960, 720), (1120, 840)],
        resize_type='Resize',
        keep_ratio=True),
    dict(type='RandomCrop', crop_size=(480, 640)),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadExtraImage'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')
]
data = dict(
    type='NYUv2Dataset',
    data_root='data/NYUDepthv2',
    img_suffix='.jpg',
    reduce_zero_label=True,
    data_prefix=dict(img_path='RGB', extra_path='Depth', seg_map_path='Label'))
train_dataloader = dict(dataset=dict(ann_file='train2.txt', pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(ann_file='test2.txt', pipeline=test_pipeline, **data))
test_dataloader = val_dataloader
