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
"""Region embeddings: an image-text model applied once to an image, with one pooling token for each mask.

The pooling of an image-text model is repeated for each region with the attention restricted to the patches under the
region's mask: for CLIP and MetaCLIP the class token of the last layer, for SigLIP the attention pooling head, for
CLIP's ResNet the attention pooling, for CLIP's ConvNeXt the mean of the last map. Everything after it (output
projection, MLP, normalization, projection) is that of the model. With a mask of ones, a region embedding therefore
equals the image embedding of the model. Masks that restrict CLIP's attention are the idea of MaskCLIP (Ding et al.,
ICML 2023); CorrCLIP (ICCV 2025) names the masks of segmenters with it.

Letters: B images, R regions, N = gh * gw patches, C width, D text-embedding width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gkc import BACKBONE_STRIDES

# Maximum number of attention weights (heads times regions times patches) that are in memory at a time for one image.
MAX_ATTENTION_WEIGHTS = 2**24


def embed_regions(tower: nn.Module, pixel_values: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Embed regions of images by one pass of an image-text model.

    Args:
        tower: Model of one of the types in `REGION_POOLING`, with projections.
        pixel_values: (B, 3, H, W) images, normalized for the model, whose sides are multiples of its patch size.
        masks: (B, R, h, w) masks between 0 and 1 of any resolution, which are averaged over the patches.

    Returns:
        The embeddings (B, R, D), which are not normalized, and a boolean tensor (B, R) that is True for empty masks,
        whose embeddings have no meaning.

    Raises:
        ValueError: The type of the model is not supported.
    """
    check_tower(tower.config)
    pool, num_heads = REGION_POOLING[tower.config.model_type](tower, pixel_values)
    grid = tuple(side // patch_size(tower.config) for side in pixel_values.shape[-2:])
    coverage = F.interpolate(masks.to(pixel_values), size=grid, mode="area").flatten(2)  # (B, R, N)
    is_empty = coverage.amax(dim=-1) == 0
    rows = max(1, MAX_ATTENTION_WEIGHTS // (num_heads * coverage.shape[-1] * len(coverage)))
    return torch.cat([pool(part) for part in coverage.split(rows, dim=1)], dim=1), is_empty


def check_tower(config: Any) -> None:
    """Raise a ValueError if models of a configuration cannot embed regions."""
    if config.model_type not in REGION_POOLING:
        raise ValueError(
            f"A {config.model_type!r} cannot embed regions: use an image-text model of the types "
            f"{', '.join(REGION_POOLING)}."
        )


def patch_size(config: Any) -> int:
    """Return the side of a patch in pixels, or the stride of the last map of a convolutional image encoder."""
    vision = getattr(config, "vision_config", None)
    return BACKBONE_STRIDES[-1] if vision is None else vision.patch_size


def class_token_pooling(tower: nn.Module, pixel_values: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Prepare the pooling of CLIP and MetaCLIP 2: the class token in the last layer of the transformer."""
    vision = tower.vision_model
    *layers, layer = vision.encoder.layers
    attention = layer.self_attn
    hidden_states = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    for earlier in layers:
        hidden_states = earlier(hidden_states, attention_mask=None)
        # Earlier versions of transformers return a tuple.
        hidden_states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states  # (B, 1 + N, C)
    class_token = hidden_states[:, :1]
    states = layer.layer_norm1(hidden_states)
    query, key, value = (
        projection(part).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, heads, ., C / heads)
        for projection, part in (
            (attention.q_proj, states[:, :1]),
            (attention.k_proj, states),
            (attention.v_proj, states),
        )
    )
    scores = query @ key.transpose(2, 3) * attention.scale  # (B, heads, 1, 1 + N), equal for all regions

    def pool(coverage: Tensor) -> Tensor:
        bias = F.pad(coverage, (1, 0), value=1).log()[:, None]  # the token attends to itself too
        attended = ((scores + bias).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        tokens = class_token + attention.out_proj(attended)
        tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
        return tower.visual_projection(vision.post_layernorm(tokens))

    return pool, attention.num_heads


def probe_pooling(tower: nn.Module, pixel_values: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Prepare the pooling of SigLIP: the learned probe of its attention pooling head."""
    vision = tower.vision_model
    head = vision.head
    states = vision(pixel_values, interpolate_pos_encoding=True, return_dict=True).last_hidden_state  # (B, N, C)
    num_heads = head.attention.num_heads

    def pool(coverage: Tensor) -> Tensor:
        bias = coverage.masked_fill(coverage.amax(dim=-1, keepdim=True) == 0, 1).log()  # no softmax of an empty set
        probes = head.probe.expand(len(states), coverage.shape[1], -1)
        attended = head.attention(
            probes, states, states, attn_mask=bias.repeat_interleave(num_heads, dim=0), need_weights=False
        )[0]
        return attended + head.mlp(head.layernorm(attended))

    return pool, num_heads


def attention_pooling(tower: nn.Module, pixel_values: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Prepare the pooling of CLIP's ResNet: attention of the mean feature to itself and to the positions."""
    head = tower.vision_model.attention_pooling
    query, key, value = head.project(tower.vision_model.encoder(pixel_values)[-1])
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5

    def pool(coverage: Tensor) -> Tensor:
        bias = F.pad(coverage, (1, 0), value=1).log()[:, None]
        return head.out_proj(((scores + bias).softmax(dim=-1) @ value).transpose(1, 2).flatten(2))

    return pool, head.num_heads


def mean_pooling(tower: nn.Module, pixel_values: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Prepare the pooling of CLIP's ConvNeXt: the mean of the last map, weighted by the coverage."""
    features = tower.vision_model.encoder(pixel_values)[-1].flatten(2)  # (B, C, N)

    def pool(coverage: Tensor) -> Tensor:
        shares = coverage / coverage.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(coverage.dtype).tiny)
        return tower.vision_model.head(shares @ features.transpose(1, 2))

    return pool, 1


# By model type the functions that compute the features of images (B, 3, H, W) once. They return a function from the
# coverage (B, R, N) of the patches by regions to the embeddings (B, R, D), and the number of attention heads.
REGION_POOLING = {
    "clip": class_token_pooling,
    "metaclip_2": class_token_pooling,
    "siglip": probe_pooling,
    "clip_resnet": attention_pooling,
    "clip_convnext": mean_pooling,
}

__all__ = ["REGION_POOLING", "check_tower", "embed_regions", "patch_size"]
