"""COCO panoptic, ImageNet-22k ConvNeXt-B image encoder: a stronger backbone than the paper's.

Before:   as for coco_clip_r50, whose CLIP gives the text encoder and the teacher
Command:  accelerate launch --config_file configuration/accelerate/8gpu.yaml -m train coco_convnext_b
          (with configuration/accelerate/fsdp.yaml on GPUs with less memory)
Hardware: 8 GPUs, 7 images of 512 x 512 on each. Not run here; the duration is unknown.
Expect:   no published result for this backbone; a higher mIoU than coco_r101 (51.2 COCO, 18.8 A-150) is the goal.
"""

from configuration.recipes import coco_clip_r50

RECIPE = coco_clip_r50.RECIPE.replace(
    {
        "model.config": {
            "backbone_config": {
                "model_type": "convnext",
                "depths": [3, 3, 27, 3],
                "hidden_sizes": [128, 256, 512, 1024],
            }
        },
        "model.backbone": "facebook/convnext-base-224-22k",
        "data.batch_size": 56,
        "optimizer.learning_rate": 1e-4,  # Mask2Former's for Swin backbones
        "matching.class_weight": 10.0,
        "distillation.embedding": "shared",
    }
)
