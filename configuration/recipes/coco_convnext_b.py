"""COCO panoptic, ImageNet-22k ConvNeXt-B image tower: a stronger backbone than the paper's.

Before:   as for coco_clip_r50, whose CLIP gives the text tower and the teacher
Command:  accelerate launch --config_file configuration/accelerate/8gpu.yaml -m train coco_convnext_b
          (GPUs that it does not fit on: configuration/accelerate/fsdp.yaml)
Hardware: 8 GPUs, 7 images of 512 x 512 on each. Not run here, so no hours.
Expect:   no published number: nobody has reported this method with this backbone. The R-101 row (coco_r101, mIoU 51.2
          COCO, 18.8 A-150) is what it should pass.
"""

from dataclasses import replace

from configuration.recipes import coco_clip_r50

RECIPE = replace(
    coco_clip_r50.RECIPE,
    model={
        "backbone_config": {
            "model_type": "convnext",
            "depths": [3, 3, 27, 3],
            "hidden_sizes": [128, 256, 512, 1024],
        }
    },
    backbone="facebook/convnext-base-224-22k",
    batch_size=56,
    learning_rate=1e-4,  # Mask2Former's for Swin backbones
    class_weight=10.0,
    distillation_embedding="shared",
)
