"""GKC: fast open-vocabulary segmentation for transformers.

Type any words, get masks, without a CLIP image encoder at inference (Han, Liu et al., *Global Knowledge Calibration
for Fast Open-Vocabulary Segmentation*, ICCV 2023). Importing this package registers everything with transformers'
Auto classes; torch and transformers themselves are imported when they are needed.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .auto_registration import register
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .configuration_gkc import CLIPConvNextConfig, CLIPResNetConfig, GKCConfig
    from .configuration_gkc_zero_shot import GKCZeroShotConfig
    from .encoded_vocabulary import EncodedVocabulary
    from .image_processing_gkc import GKCImageProcessor
    from .modeling_clip_convnext import CLIPConvNextBackbone, CLIPConvNextVisionModel
    from .modeling_clip_resnet import CLIPResNetBackbone, CLIPResNetVisionModel
    from .modeling_gkc import GKCForOpenVocabSegmentation, GKCModel
    from .modeling_gkc_zero_shot import GKCForZeroShotSegmentation
    from .pipeline_gkc import GKCSegmentationPipeline
    from .predictor import GKCPredictor
    from .processing_gkc import GKCProcessor
    from .vocabulary import Vocabulary

__all__ = [
    "CLIPConvNextBackbone",
    "CLIPConvNextConfig",
    "CLIPConvNextVisionModel",
    "CLIPResNetBackbone",
    "CLIPResNetConfig",
    "CLIPResNetVisionModel",
    "EncodedVocabulary",
    "GKCConfig",
    "GKCForOpenVocabSegmentation",
    "GKCForZeroShotSegmentation",
    "GKCImageProcessor",
    "GKCModel",
    "GKCPredictor",
    "GKCProcessor",
    "GKCSegmentationPipeline",
    "GKCZeroShotConfig",
    "Vocabulary",
]

_MODULES = {
    "CLIPConvNextBackbone": "modeling_clip_convnext",
    "CLIPConvNextConfig": "configuration_gkc",
    "CLIPConvNextVisionModel": "modeling_clip_convnext",
    "CLIPResNetBackbone": "modeling_clip_resnet",
    "CLIPResNetConfig": "configuration_gkc",
    "CLIPResNetVisionModel": "modeling_clip_resnet",
    "EncodedVocabulary": "encoded_vocabulary",
    "GKCConfig": "configuration_gkc",
    "GKCForOpenVocabSegmentation": "modeling_gkc",
    "GKCForZeroShotSegmentation": "modeling_gkc_zero_shot",
    "GKCImageProcessor": "image_processing_gkc",
    "GKCModel": "modeling_gkc",
    "GKCPredictor": "predictor",
    "GKCProcessor": "processing_gkc",
    "GKCSegmentationPipeline": "pipeline_gkc",
    "GKCZeroShotConfig": "configuration_gkc_zero_shot",
    "Vocabulary": "vocabulary",
}


def __getattr__(name: str) -> Any:
    """Import a public class, or a module of this package, when it is first used."""
    if name in _MODULES:
        found = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        found = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
