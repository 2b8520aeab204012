"""COCO panoptic, CLIP RN50 image tower: the R-50 row of the paper (Table 1, settings of the released configuration).

Command:  accelerate launch -m train coco_clip_r50  (to come, with the preparation of COCO)
Hardware: 112 images of 512 x 512 a step, such as 14 on each of 8 GPUs; not run here, so no hours.
Expect:   mIoU 49.8 COCO, 78.7 PAS-20, 34.3 Cityscapes, 17.5 A-150, 3.2 A-847, 41.9 PC-59, 6.5 PC-459
          (paper, Table 1; with caption grounding of weight 10 and region dropout 0.5, which this recipe has not yet).
"""

from configuration.recipe import Recipe

RECIPE = Recipe(
    vocabulary="coco_panoptic_133",
    steps=50_000,
    batch_size=112,
    crop_size=512,
    scale_range=(0.8, 1.2),
    learning_rate=3e-4,
    backbone_factor=0.1,
    weight_decay=0.05,
    max_grad_norm=0.01,
    milestones=(0.8, 0.9),
    precision="bf16",  # the paper: mixed precision
    class_weight=2.0,
    mask_weight=5.0,
    dice_weight=5.0,
    no_object_weight=0.1,
    train_num_points=12544,
    oversample_ratio=3.0,
    importance_sample_ratio=0.75,
    synonym_mode="sample",
    synonym_weight=10.0,
    synonym_probabilities="teacher",
    synonym_threshold=0.1,
    synonym_logit_scale=100.0,
    distillation_weight=10.0,
    distillation_terms="joint",
    distillation_embedding="query",  # as published; "shared" was better in our own measurements
    distillation_max_regions=200,  # of each process, so up to 1600 a step on 8 GPUs
)
