# Sigma-T on NYUDepth v2: 53.9 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/nyuv2.py']
model = dict(decode_head=dict(num_classes=40))
