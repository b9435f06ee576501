# A small UPerNet learns to segment digits, from scratch, on a CPU: half of `make demo-dense`.
_base_ = ['../_base_/upernet.py', '../_base_/digits_segmentation.py']
dims = [48, 96, 128, 160]
norm_cfg = dict(type='BN')
# Most pixels are canvas. At full weight they keep the digits from being told apart for hundreds of iterations; at a
# lower one digits would spread over their edges, but for the Dice loss.
loss = [
    dict(type='CrossEntropyLoss', class_weight=[0.2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    dict(type='DiceLoss'),
]
model = dict(
    data_preprocessor=dict(size={{_base_.size}}),
    backbone=dict(model='vmamba_tiny_s1l8', dims=dims, depths=[1, 1, 2, 1]),
    decode_head=dict(in_channels=dims, channels=64, num_classes=11, norm_cfg=norm_cfg, loss_decode=loss),
    auxiliary_head=dict(in_channels=dims[2], channels=64, num_classes=11, norm_cfg=norm_cfg, loss_decode=loss))
