# A small Mask R-CNN learns to find digits, from scratch, on a CPU: half of `make demo-dense`.
_base_ = ['../_base_/mask_rcnn.py', '../_base_/digits_detection.py']
dims = [48, 96, 128, 160]
model = dict(
    backbone=dict(model='vig_h_tiny', dims=dims, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 5]),
    neck=dict(in_channels=dims, out_channels=64, num_outs=5),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[5])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=24))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=50), rcnn=dict(max_per_img=20)))
