"""COCO panoptic, CLIP RN50, on four consumer GPUs: the settings of OpenTrans' re-run of the method.

Before:   as for coco_clip_r50, without the synonyms
Command:  accelerate launch --config_file configuration/accelerate/8gpu.yaml --num_processes 4 \\
          -m train coco_clip_r50_opentrans
Hardware: 4 GPUs, 7 images of 512 x 512 on each (theirs: RTX 4090). Not run here, so no hours.
Expect:   mIoU 46.0 COCO, 71.2 PAS-20, 33.9 Cityscapes, 16.6 A-150, 2.5 A-847, 39.0 PC-59, 7.1 PC-459
          (OpenTrans, CVPR 2024). They name SGD as optimiser where this recipe has AdamW, and no weight of synonyms,
          which this recipe leaves out. Freezing the first stages of the backbone, we do not know how many, gave them
          0.7 mIoU more: such as frozen_stages=2.
"""

from dataclasses import replace

from configuration.recipes import coco_clip_r50

RECIPE = replace(
    coco_clip_r50.RECIPE,
    batch_size=28,
    learning_rate=1.5e-4,
    synonym_mode="none",
    distillation_weight=2.0,
    distillation_embedding="query",  # their head stands before the projection
    distillation_max_regions=800,  # 200 of each of 4 processes
    grounding_weight=2.0,
)
