# Pre-training as the authors have it: Objects365 v1, and the phrases of GoldG (Flickr30k Entities, and GQA without
# COCO's images), each with mosaics of its own. An image of phrases has no other prompts than its own, and the embedding
# of "" in place of missing ones. Tested without training on LVIS, by AP with a fixed number of boxes for each class, on
# the 5,000 images of minival. docs/tasks/detect.md says how the files are made.
_base_ = ['./mamba_yolo_world_objects365.py']
custom_imports = dict(imports=['linescan.openmmlab', 'linescan.openmmlab.yolo', 'linescan.openmmlab.lvis'])
phrases = 'data/texts/goldg.safetensors'
flickr = dict(
    type='MultiImageMixDataset',
    dataset=dict(
        type='PhraseDataset',
        embeddings=phrases,
        data_root='data/flickr/',
        ann_file='annotations/final_flickr_separateGT_train_vg.json',
        data_prefix=dict(img='full_images/'),
        pipeline={{_base_.load_pipeline}}),
    pipeline={{_base_.phrase_pipeline}})
gqa = dict(
    type='MultiImageMixDataset',
    dataset=dict(
        type='PhraseDataset',
        embeddings=phrases,
        data_root='data/mixed_grounding/',
        ann_file='annotations/final_mixed_train_no_coco_vg.json',
        data_prefix=dict(img='gqa/images/'),
        pipeline={{_base_.load_pipeline}}),
    pipeline={{_base_.phrase_pipeline}})
train_dataloader = dict(
    dataset=dict(
        _delete_=True, type='MixedDatasets', datasets=[{{_base_.train_dataloader.dataset}}, flickr, gqa]))
lvis_file = 'lvis/lvis_v1_minival_inserted_image_name.json'
val_dataloader = dict(
    dataset=dict(
        type='LVISImages', data_root='data/coco/', ann_file=lvis_file, data_prefix=dict(_delete_=True, img='')))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='LVISFixedAP', ann_file='data/coco/' + lvis_file)
test_evaluator = val_evaluator
model = dict(embeddings='data/texts/lvis.npz', num_prompts=1203)
