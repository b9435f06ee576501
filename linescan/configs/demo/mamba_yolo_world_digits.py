# A small Mamba-YOLO-World learns to find digits by their names, from scratch, on a CPU. The embeddings of the names are
# written by `linescan.demos.render.write_words`.
_base_ = ['../_base_/mamba_yolo_world.py', '../_base_/digits_detection.py']
names = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
model = dict(
    backbone=dict(depth=0.33, width=0.25, last_chans=256),
    neck=dict(dims=[64, 128, 64], text_dim=64, d_state=16, head_dim=16),
    bbox_head=dict(dims=[64, 128, 64], text_dim=64, num_classes=10),
    embeddings='runs/demo-dense/words.npz',
    prompts=names,
    num_prompts=10,
    test_cfg=dict(score=0.01, most=20))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='YOLOLetterbox', scale={{_base_.size}}),
    dict(type='PackDetInputs', meta_keys={{_base_.meta_keys}}),
]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=2e-3))
