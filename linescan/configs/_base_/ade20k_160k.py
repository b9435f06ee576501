# Swin's schedule on ADE20K: 160 000 iterations of 16 images (8 GPUs with 2 each) of 512x512.
_base_ = ['mmseg::_base_/datasets/ade20k.py', './adamw_160k.py', 'mmseg::_base_/default_runtime.py']
train_dataloader = dict(batch_size=2)
