# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Entry module through which transformers loads the code of a published checkpoint (see `remote_code`).

`auto_map` refers to all classes through this module. transformers imports a separate copy of the dependencies of
every module named there, so that several entry modules would yield several incompatible `GKCConfig` classes.
"""

import importlib

from transformers import CONFIG_MAPPING

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
    "GKCPredictor",
    "GKCProcessor",
    "GKCSegmentationPipeline",
    "GKCZeroShotConfig",
]

# If another copy of this library, installed or from another folder, is already loaded, transformers prefers its
# registered classes. All other classes must come from that copy too, because classes of two copies are incompatible.
_known = CONFIG_MAPPING["gkc"].__module__.rpartition(".")[0] if "gkc" in CONFIG_MAPPING else __package__
if _known == __package__:
    from .configuration_gkc import CLIPConvNextConfig, CLIPResNetConfig, GKCConfig
    from .configuration_gkc_zero_shot import GKCZeroShotConfig
    from .encoded_vocabulary import EncodedVocabulary
    from .image_processing_gkc import GKCImageProcessor
    from .modeling_clip_convnext import CLIPConvNextBackbone, CLIPConvNextVisionModel
    from .modeling_clip_resnet import CLIPResNetBackbone, CLIPResNetVisionModel
    from .modeling_gkc import GKCForOpenVocabSegmentation
    from .modeling_gkc_zero_shot import GKCForZeroShotSegmentation
    from .pipeline_gkc import GKCSegmentationPipeline
    from .predictor import GKCPredictor
    from .processing_gkc import GKCProcessor
else:
    _library = importlib.import_module(f"{_known}.{__name__.rpartition('.')[2]}")
    globals().update({_name: getattr(_library, _name) for _name in __all__})
