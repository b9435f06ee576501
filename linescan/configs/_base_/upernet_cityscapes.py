# UPerNet for Cityscapes' 19 classes at 512x1024.
_base_ = './upernet.py'
model = dict(
    data_preprocessor=dict(size=(512, 1024)), decode_head=dict(num_classes=19), auxiliary_head=dict(num_classes=19))
