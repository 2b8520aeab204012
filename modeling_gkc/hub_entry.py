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
"""The one module by which transformers loads a published folder's code (see `remote_code`).

`auto_map` names all classes in this module. transformers gives every module that is named there its own copy of what
it imports, so that from several of them would come several `GKCConfig`, none of which the other's Auto class knows.
"""

import importlib

from transformers import CONFIG_MAPPING

# A copy of this library that is there already, installed or from another folder, has its classes registered, which
# transformers prefers to those of a folder. The others then come from it too: two copies do not know each other.
_known = CONFIG_MAPPING["gkc"].__module__.rpartition(".")[0] if "gkc" in CONFIG_MAPPING else __package__
if _known == __package__:
    from .configuration_gkc import CLIPConvNextConfig, CLIPResNetConfig, GKCConfig
    from .encoded_vocabulary import EncodedVocabulary
    from .image_processing_gkc import GKCImageProcessor
    from .modeling_clip_convnext import CLIPConvNextBackbone, CLIPConvNextVisionModel
    from .modeling_clip_resnet import CLIPResNetBackbone, CLIPResNetVisionModel
    from .modeling_gkc import GKCForOpenVocabSegmentation
    from .pipeline_gkc import GKCSegmentationPipeline
    from .predictor import GKCPredictor
    from .processing_gkc import GKCProcessor
else:
    _library = importlib.import_module(f"{_known}.{__name__.rpartition('.')[2]}")
    CLIPConvNextBackbone = _library.CLIPConvNextBackbone
    CLIPConvNextConfig = _library.CLIPConvNextConfig
    CLIPConvNextVisionModel = _library.CLIPConvNextVisionModel
    CLIPResNetBackbone = _library.CLIPResNetBackbone
    CLIPResNetConfig = _library.CLIPResNetConfig
    CLIPResNetVisionModel = _library.CLIPResNetVisionModel
    EncodedVocabulary = _library.EncodedVocabulary
    GKCConfig = _library.GKCConfig
    GKCForOpenVocabSegmentation = _library.GKCForOpenVocabSegmentation
    GKCImageProcessor = _library.GKCImageProcessor
    GKCPredictor = _library.GKCPredictor
    GKCProcessor = _library.GKCProcessor
    GKCSegmentationPipeline = _library.GKCSegmentationPipeline

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
    "GKCImageProcessor",
    "GKCPredictor",
    "GKCProcessor",
    "GKCSegmentationPipeline",
]
