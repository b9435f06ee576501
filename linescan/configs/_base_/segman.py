# SegMAN with its own decoder and no auxiliary head (arXiv 2412.11890).
_base_ = ['./linescan.py']
custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.segman'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255),
    backbone=dict(type='LinescanBackbone'),
    decode_head=dict(
        type='SegMANDecoder',
        in_index=[0, 1, 2, 3],
        dropout_ratio=0.1,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
