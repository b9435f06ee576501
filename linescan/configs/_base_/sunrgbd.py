# SUN RGB-D's rooms, RGB and depth, with 37 classes and 0 for none, resized to 640x480.
_base_ = ['./nyuv2.py']
data = dict(
    type='SUNRGBDDataset',
    data_root='data/SUNRGBD',
    data_prefix=dict(img_path='RGB_resize', extra_path='Depth_resize', seg_map_path='labels_resize'))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
