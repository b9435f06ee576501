# UPerNet for ADE20K's 150 classes at 512x512.
_base_ = ['./linescan.py', 'mmseg::_base_/models/upernet_swin.py']
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='LinescanBackbone'),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
