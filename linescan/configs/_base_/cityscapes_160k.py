# As on ADE20K, 160 000 iterations of 16 images of 512x1024. None of the papers reports Cityscapes.
_base_ = ['mmseg::_base_/datasets/cityscapes.py', './adamw_160k.py', 'mmseg::_base_/default_runtime.py']
train_dataloader = dict(batch_size=2)
