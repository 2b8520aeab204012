"""COCO panoptic, ImageNet ResNet-101 image tower: the R-101 row of the paper (Table 1).

Command:  accelerate launch -m train coco_r101  (to come, with the preparation of COCO)
Hardware: 56 images of 512 x 512 a step, such as 7 on each of 8 GPUs; not run here, so no hours.
Expect:   mIoU 51.2 COCO, 83.2 PAS-20, 34.8 Cityscapes, 18.8 A-150, 3.5 A-847, 45.2 PC-59, 7.1 PC-459
          (paper, Table 1; with caption grounding of weight 10, which this recipe has not yet).
"""

from dataclasses import replace

from configuration.recipes import coco_clip_r50

RECIPE = replace(
    coco_clip_r50.RECIPE,
    model={"backbone_config": {"model_type": "resnet", "depths": [3, 4, 23, 3]}},
    batch_size=56,
    class_weight=10.0,
)
