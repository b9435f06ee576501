# Mask R-CNN with FPN.
_base_ = ['./linescan.py', 'mmdet::_base_/models/mask-rcnn_r50_fpn.py']
model = dict(backbone=dict(_delete_=True, type='LinescanBackbone'))
