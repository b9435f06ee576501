# Semantic FPN for ADE20K's 150 classes at 512x512.
_base_ = ['./linescan.py', 'mmseg::_base_/models/fpn_r50.py']
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='LinescanBackbone'),
    decode_head=dict(num_classes=150))
