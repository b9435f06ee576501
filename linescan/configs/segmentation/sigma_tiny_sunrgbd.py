# Sigma-T on SUN RGB-D: 50.0 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/sunrgbd.py']
model = dict(decode_head=dict(num_classes=37))
