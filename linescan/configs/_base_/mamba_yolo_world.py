# Mamba-YOLO-World-S on images of 640 x 640, tested as published.
__import__('linescan.openmmlab')
custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.yolo'])
dims = [128, 256, 512]
model = dict(
    type='MambaYOLOWorld',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0., 0., 0.], std=[255., 255., 255.], bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(type='YOLOv8Backbone', depth=0.33, width=0.5, last_chans=1024),
    neck=dict(type='MambaFusionPAN', dims=dims, blocks=1),
    bbox_head=dict(type='YOLOWorldHead', dims=dims, num_classes=80),
    num_prompts=80,
    test_cfg=dict(score=0.001, candidates=30000, overlap=0.7, most=300))
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'corner')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='YOLOLetterbox', scale=(640, 640)),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
