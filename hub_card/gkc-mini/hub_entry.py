"""The classes of the installed library, where `trust_remote_code=True` looks for a checkpoint's code."""

from modeling_gkc import (
    CLIPConvNextBackbone,
    CLIPConvNextConfig,
    CLIPConvNextVisionModel,
    CLIPResNetBackbone,
    CLIPResNetConfig,
    CLIPResNetVisionModel,
    GKCConfig,
    GKCForOpenVocabSegmentation,
    GKCImageProcessor,
    GKCProcessor,
)

__all__ = [
    "CLIPConvNextBackbone",
    "CLIPConvNextConfig",
    "CLIPConvNextVisionModel",
    "CLIPResNetBackbone",
    "CLIPResNetConfig",
    "CLIPResNetVisionModel",
    "GKCConfig",
    "GKCForOpenVocabSegmentation",
    "GKCImageProcessor",
    "GKCProcessor",
]
