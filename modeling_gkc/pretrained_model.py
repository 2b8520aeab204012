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
"""Base class of the segmentation models: weight initialization, loading and attention implementations."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .classifiers import MAX_TEMPERATURE, ConvexClassifier, FCCLIPClassifier
from .configuration_gkc import GKCConfig
from .mask_decoder import GKCMaskDecoder
from .modeling_clip_resnet import CLIPResNetAttentionPooling, GKCModelMixin
from .open_vocabulary import OpenVocabularyMixin
from .pixel_decoder import GKCDeformableAttention, GKCPixelDecoder


class GKCPreTrainedModel(GKCModelMixin, PreTrainedModel):
    """Base class of the segmentation models: weight initialization, loading and attention implementations."""

    config_class = GKCConfig
    config: GKCConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["GKCPixelDecoder", "GKCMaskDecoder", "CLIPEncoderLayer"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint as in transformers, and freeze CLIP's parts again, which loading makes trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_clip()
        return loaded

    def freeze_clip(self) -> None:
        """Exclude CLIP's text encoder and the head that embeds regions in its space from training."""
        for module in (getattr(self, "text_model", None), self.base_model.region_head):
            if module is not None:
                module.requires_grad_(False)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Set the attention implementation as in transformers; with "sdpa", parts without SDPA keep their own."""
        requested, has_text_model = attn_implementation, hasattr(self, "text_model")
        if isinstance(requested, str):
            parts = {"backbone_config": self.base_model.backbone}
            if has_text_model:
                parts["text_config"] = self.text_model
            supporting = [name for name, part in parts.items() if part._supports_sdpa or requested != "sdpa"]
            attn_implementation = {"": requested} | dict.fromkeys(supporting, requested)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if isinstance(requested, str) and not has_text_model:
            self.config.text_config._attn_implementation = requested

    def enable_input_require_grads(self) -> None:
        """Make the images require gradients, which adapters need in re-entrant gradient checkpointing."""
        self._require_grads_hook = self.base_model.backbone.register_forward_pre_hook(_require_gradients)
        self._require_grads_hooks = [self._require_grads_hook]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, GKCDeformableAttention):
            _init_deformable_attention(module)
        elif isinstance(module, GKCPixelDecoder):
            init.normal_(module.level_embedding)
        elif isinstance(module, GKCMaskDecoder):
            for embedding in (module.query_features, module.query_positions, module.level_embedding):
                init.normal_(embedding.weight)
        elif isinstance(module, ConvexClassifier):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
            init.ones_(module.typical_distance)
        elif isinstance(module, FCCLIPClassifier):
            init.zeros_(module.seen_embeds)
            init.constant_(module.clip_logit_scale, math.log(MAX_TEMPERATURE))
        elif isinstance(module, CLIPResNetAttentionPooling):
            init.normal_(module.position_embedding, std=module.q_proj.in_features**-0.5)
        elif isinstance(module, OpenVocabularyMixin):
            # Initialized after the classifier, so that a seed gives the same weights as in earlier versions.
            if not isinstance(module.classifier, ConvexClassifier):
                init.normal_(module.classifier.no_object_embedding)
            init.constant_(module.classifier.logit_scale, self.config.logit_scale_init_value)
            if module.vocabulary_embeds is not None:
                init.zeros_(module.vocabulary_embeds)
                init.zeros_(module.vocabulary_class_ids)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not isinstance(module, nn.Embedding):
            super()._init_weights(module)


def _require_gradients(module: nn.Module, args: tuple) -> tuple:
    return args[0].detach().requires_grad_(True), *args[1:]


def _init_deformable_attention(module: GKCDeformableAttention) -> None:
    """Initialize deformable attention: each head samples points 1, 2, ... cells away in a direction of its own.

    This is the initialization of Deformable DETR (Zhu et al., ICLR 2021). The attention weights start uniform.
    """
    angles = torch.arange(module.num_heads) * (2 * math.pi / module.num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, module.num_points + 1)
    num_levels = module.sampling_offsets.out_features // (module.num_heads * module.num_points * 2)
    offsets = torch.einsum("md,r->mrd", directions, steps)[:, None].expand(-1, num_levels, -1, -1)
    init.zeros_(module.sampling_offsets.weight)
    init.copy_(module.sampling_offsets.bias, offsets.flatten())
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)


__all__ = ["GKCPreTrainedModel"]
