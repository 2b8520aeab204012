"""COCO panoptic, ImageNet ResNet-101 image encoder: the R-101 row of the paper.

Before:   as for coco_clip_r50, whose CLIP gives the text encoder and the teacher
Command:  accelerate launch --config_file configuration/accelerate/8gpu.yaml -m train coco_r101
Hardware: 8 GPUs, 7 images of 512 x 512 on each. Not run here; the duration is unknown.
Expect:   mIoU 51.2 COCO, 83.2 PAS-20, 34.8 Cityscapes, 18.8 A-150, 3.5 A-847, 45.2 PC-59, 7.1 PC-459
          (Han, Liu et al., ICCV 2023, Table 1).
"""

from configuration.recipes import coco_clip_r50

RECIPE = coco_clip_r50.RECIPE.replace(
    {
        "model.config": {"backbone_config": {"model_type": "resnet", "depths": [3, 4, 23, 3]}},
        "model.backbone": "microsoft/resnet-101",
        "data.batch_size": 56,
        "matching.class_weight": 10.0,
    }
)
