# Sigma-T on MFNet: 60.2 mIoU (published; arXiv 2404.04256).
_base_ = ['../_base_/sigma.py', '../_base_/mfnet.py']
