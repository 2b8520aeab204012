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
"""Conversion of the weights of OpenAI's and OpenCLIP's CLIP towers, and of transformers' segmenters."""

from .clip import clip_convnext_from_open_clip, clip_resnet_from_openai, clip_text_from_openai, read_weights
from .fc_clip import from_fc_clip
from .mask2former import from_mask2former
from .zero_shot import open_segmenter

__all__ = [
    "clip_convnext_from_open_clip",
    "clip_resnet_from_openai",
    "clip_text_from_openai",
    "from_fc_clip",
    "from_mask2former",
    "open_segmenter",
    "read_weights",
]
