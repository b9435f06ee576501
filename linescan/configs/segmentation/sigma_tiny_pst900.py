# Sigma-T on PST900: 88.6 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/pst900.py']
model = dict(
    data_preprocessor=dict(size=(720, 1280)),
    decode_head=dict(num_classes=5))
