# How Mamba-YOLO-World is trained: AdamW, mosaics but for the last epochs, a moving average of the weights. 8 GPUs with
# 16 images each. The authors' copy-paste and mask-refine are left out.
_base_ = ['mmdet::_base_/default_runtime.py', './mamba_yolo_world.py']
load_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
mix_pipeline = [
    dict(type='Mosaic', img_scale=(640, 640), pad_val=114.0),
    dict(
        type='RandomAffine', max_rotate_degree=0.0, max_shear_degree=0.0, scaling_ratio_range=(0.5, 1.5),
        border=(-320, -320), border_val=(114, 114, 114)),
    dict(type='YOLOLetterbox', scale=(640, 640)),  # for the epochs without the two above
    dict(type='YOLOXHSVRandomAug'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
]
train_pipeline = mix_pipeline + [dict(type='PackDetInputs', meta_keys={{_base_.meta_keys}})]
pack_prompts = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'corner', 'vectors'))
sampling_pipeline = mix_pipeline + [
    dict(type='SamplePrompts', embeddings='data/texts/objects365.npz'), pack_prompts]
phrase_pipeline = mix_pipeline + [
    dict(type='SamplePrompts', embeddings='data/texts/goldg.safetensors', negatives=(0, 0)), pack_prompts]
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
    constructor='FreeVectorsOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=2))
