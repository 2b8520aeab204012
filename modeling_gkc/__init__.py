"""GKC: fast open-vocabulary segmentation for transformers.

Type any words, get masks, without a CLIP image encoder at inference (Han, Liu et al., *Global Knowledge Calibration
for Fast Open-Vocabulary Segmentation*, ICCV 2023). Importing this package registers everything with transformers'
Auto classes.
"""

from .configuration_gkc import CLIPResNetConfig, GKCConfig
from .image_processing_gkc import GKCImageProcessor
from .modeling_clip_resnet import CLIPResNetBackbone, CLIPResNetVisionModel
from .modeling_gkc import GKCForOpenVocabSegmentation, GKCModel
from .pipeline_gkc import GKCSegmentationPipeline
from .processing_gkc import GKCProcessor
from .vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "CLIPResNetBackbone",
    "CLIPResNetConfig",
    "CLIPResNetVisionModel",
    "GKCConfig",
    "GKCForOpenVocabSegmentation",
    "GKCImageProcessor",
    "GKCModel",
    "GKCProcessor",
    "GKCSegmentationPipeline",
    "Vocabulary",
]
