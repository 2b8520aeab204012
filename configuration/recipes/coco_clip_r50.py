"""COCO panoptic, CLIP RN50 image encoder: the R-50 row of the paper.

Before:   gkc convert clip-resnet RN50.pt --text --out clip-rn50
          python -m train.cache nouns data/coco
          python -m train.cache teacher data/coco-nouns --clip clip-rn50
          python -m train.cache synonyms data/coco-nouns --clip clip-rn50 --vocabulary coco_panoptic_133
          (each cache also with --split val; the published probabilities are those of CLIP ViT-B/32)
Command:  accelerate launch --config_file configuration/accelerate/8gpu.yaml -m train coco_clip_r50
Hardware: 8 GPUs, 14 images of 512 x 512 on each. Not run here; the duration is unknown.
Expect:   mIoU 49.8 COCO, 78.7 PAS-20, 34.3 Cityscapes, 17.5 A-150, 3.2 A-847, 41.9 PC-59, 6.5 PC-459
          (Han, Liu et al., ICCV 2023, Table 1; settings of the released configuration).

Base classes only: data.category_split=ignore or data.category_split=delete.
"""

from configuration.recipe import Recipe
from configuration.sections import (
    DataSection,
    DistillationSection,
    GroundingSection,
    MatchingSection,
    ModelSection,
    OptimizerSection,
    SynonymsSection,
)

RECIPE = Recipe(
    data=DataSection(
        dataset="data/coco-nouns",
        vocabulary="coco_panoptic_133",
        eval_split="val",
        batch_size=112,
        crop_size=512,
        scale_range=(0.8, 1.2),
        region_dropout=0.5,
    ),
    model=ModelSection(clip="clip-rn50"),
    optimizer=OptimizerSection(
        steps=50_000,
        learning_rate=3e-4,
        backbone_factor=0.1,
        weight_decay=0.05,
        max_grad_norm=0.01,
        milestones=(0.8, 0.9),
        precision="bf16",  # the paper: mixed precision
    ),
    matching=MatchingSection(
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
        no_object_weight=0.1,
        train_num_points=12544,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
    ),
    synonyms=SynonymsSection(
        mode="sample",
        weight=10.0,
        probabilities="boxes",
        threshold=0.1,
        logit_scale=100.0,
    ),
    distillation=DistillationSection(
        weight=10.0,
        terms="joint",
        embedding="query",  # as published; "shared" was better in our own measurements
        max_regions=1600,  # 200 of each of 8 processes
    ),
    grounding=GroundingSection(weight=10.0),
)
