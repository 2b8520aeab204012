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
"""Masked-attention transformer decoder of Mask2Former (Cheng et al., CVPR 2022, section 3.2).

Before the first layer and after each layer, every query predicts a mask, to whose inside the cross-attention of the
next layer is restricted. The attention mask of a level is computed from the mask features resized to that level:
because resizing is linear, the result equals the resized full-size mask, at a fraction of the cost.

Letters in the comments: B images, Q queries, C hidden, (h, w) size of a level, S stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import eager_attention_forward
from .configuration_gkc import NUM_FEATURE_LEVELS, GKCConfig


@dataclass
class GKCMaskDecoderStage:
    """Output of one stage of the mask decoder.

    Attributes:
        queries: (B, Q, C) queries before layer normalization, the input of the next layer.
        query_features: (B, Q, C) queries after layer normalization.
        mask_embeds: (B, Q, mask_feature_size) mask embeddings; their products with the mask features are the mask
            logits.
        self_attention: (B, heads, Q, Q) self-attention weights of the layer before this stage; None at the first
            stage and unless attention weights are requested.
        cross_attention: (B, heads, Q, h*w) cross-attention weights of that layer over the map of one level; None in
            the same cases.
    """

    queries: Tensor
    query_features: Tensor
    mask_embeds: Tensor
    self_attention: Tensor | None = None
    cross_attention: Tensor | None = None


def predict_masks(mask_embeds: Tensor, mask_features: Tensor) -> Tensor:
    """Compute mask logits (B, Q, h, w) from mask embeddings (B, Q, C) and mask features (B, C, h, w)."""
    return torch.einsum("bqc,bchw->bqhw", mask_embeds, mask_features.to(mask_embeds.device))


def predict_matched_masks(
    mask_embeds: Sequence[Tensor], mask_features: Tensor, counts: Sequence[int], queries: Tensor
) -> Tensor:
    """Compute the mask logits of selected queries only, which saves the gradients of all others.

    Args:
        mask_embeds: Mask embeddings (B, Q, C) of each of the S stages.
        mask_features: (B, C, h, w) mask features.
        counts: Number of selected queries of each image; their sum is M.
        queries: (S, M) indices of the selected queries of each stage, in the order of the images.

    Returns:
        (S, M, h, w) mask logits, equal to those of `predict_masks` for these images and queries.
    """
    masks = []
    for image, (features, selected) in enumerate(zip(mask_features, queries.split(list(counts), dim=1), strict=True)):
        embeds = torch.stack([stage[image, indices] for stage, indices in zip(mask_embeds, selected, strict=True)])
        masks.append(torch.einsum("smc,chw->smhw", embeds, features.to(embeds.device)))
    return torch.cat(masks, dim=1)


def pool_under_masks(mask_logits: Tensor, feature_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Average feature maps under soft masks.

    Args:
        mask_logits: (B, Q, h, w) mask logits at the size of the first feature map.
        feature_maps: Feature maps (B, C_i, h_i, w_i), none of them larger than the first.

    Returns:
        The pooled features (B, Q, sum of C_i), and a boolean tensor (B, Q) that is True where a mask has no positive
        logit.
    """
    weights = mask_logits.sigmoid()
    pooled = []
    for feature_map in feature_maps:
        shares = F.adaptive_avg_pool2d(weights, feature_map.shape[-2:])
        shares = shares / shares.sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        pooled.append(torch.einsum("bqhw,bchw->bqc", shares, feature_map.to(shares.device)))
    return torch.cat(pooled, dim=-1), (mask_logits < 0).flatten(2).all(dim=-1)


def pool_inside_masks(masks: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """Average a feature map inside binary masks.

    Args:
        masks: (B, Q, h, w) boolean masks.
        feature_map: (B, C, h, w) feature map.

    Returns:
        The pooled features (B, Q, C), which are zero for empty masks, and a boolean tensor (B, Q) that is True where a
        mask is empty.
    """
    area = masks.flatten(2).sum(dim=-1)
    shares = masks / area.clamp(min=1)[..., None, None]
    pooled = torch.einsum("bqhw,bchw->bqc", shares.to(feature_map), feature_map)
    return pooled, area == 0


class GKCAttention(nn.Module):
    """Multi-head attention with separate position embeddings for queries and keys."""

    is_causal = False

    def __init__(self, config: GKCConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply multi-head attention.

        Args:
            query: (B, N, C) queries.
            key: (B, T, C) keys.
            value: (B, T, C) values.
            attention_mask: (B, 1, N, T) boolean mask, True where a query may attend to a key.

        Returns:
            The attended values (B, N, C) and the attention weights (B, heads, N, T). The weights are None if the
            attention implementation does not compute them.
        """
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )  # (B, heads, N or T, C / heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        scaling = query.shape[-1] ** -0.5
        attended, weights = attend(self, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
        return self.out_proj(attended.flatten(2)), weights


class GKCMaskDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention and feed-forward network, each followed by layer normalization."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        width = config.hidden_size
        self.cross_attn = GKCAttention(config)
        self.cross_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = GKCAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, queries: Tensor, query_positions: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Update the queries from the feature map of one level.

        Args:
            queries: (B, Q, C) queries.
            query_positions: (1, Q, C) learned position embeddings of the queries.
            keys: (B, h*w, C) features of the level with position embeddings.
            values: (B, h*w, C) features of the level.
            attention_mask: (B, 1, Q, h*w) boolean mask, True inside the predicted masks.

        Returns:
            The queries (B, Q, C), the self-attention weights (B, heads, Q, Q) and the cross-attention weights
            (B, heads, Q, h*w). The weights are None if the attention implementation does not compute them.
        """
        attended, cross_attention = self.cross_attn(queries + query_positions, keys, values, attention_mask)
        queries = self.cross_attn_layer_norm(queries + self.dropout(attended))
        positioned = queries + query_positions
        attended, self_attention = self.self_attn(positioned, positioned, queries)
        queries = self.self_attn_layer_norm(queries + self.dropout(attended))
        transformed = self.fc2(self.dropout(F.relu(self.fc1(queries))))
        return self.final_layer_norm(queries + self.dropout(transformed)), self_attention, cross_attention


class GKCMaskEmbedder(nn.Module):
    """Three-layer perceptron that maps normalized queries to mask embeddings."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        width = config.hidden_size
        self.layers = nn.ModuleList(
            [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, config.mask_feature_size)]
        )

    def forward(self, query_features: Tensor) -> Tensor:
        """Map normalized queries (B, Q, C) to mask embeddings (B, Q, mask_feature_size)."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(query_features)))))


class GKCMaskDecoder(nn.Module):
    """Transformer decoder whose queries attend to the maps of strides 32, 16 and 8 in turn, inside their masks."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        width = config.hidden_size
        self.query_features = nn.Embedding(config.num_queries, width)
        self.query_positions = nn.Embedding(config.num_queries, width)
        self.level_embedding = nn.Embedding(NUM_FEATURE_LEVELS, width)
        self.layers = nn.ModuleList(GKCMaskDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(width)
        self.mask_embedder = GKCMaskEmbedder(config)

    def forward(
        self,
        multi_scale_features: tuple[Tensor, ...],
        resized_mask_features: list[Tensor],
        position_embeddings: tuple[Tensor, ...],
        output_attentions: bool = False,
    ) -> list[GKCMaskDecoderStage]:
        """Decode the queries, with one mask prediction before the first layer and after each layer.

        Args:
            multi_scale_features: Feature maps (B, C, h, w) of strides 32, 16 and 8.
            resized_mask_features: The mask features (B, mask_feature_size, h, w) resized to each of the three maps.
            position_embeddings: Sine position embeddings (h * w, C) of each map.
            output_attentions: Whether to return the attention weights of every layer.

        Returns:
            The S = decoder_layers + 1 stages; the last one is the final prediction.
        """
        # Calling the embedding modules, instead of reading their weights, runs the hooks that load offloaded weights.
        device = multi_scale_features[0].device
        level_embeddings = self.level_embedding(torch.arange(NUM_FEATURE_LEVELS, device=device))
        values = [
            level.flatten(2).transpose(1, 2) + embedding  # (B, h*w, C)
            for level, embedding in zip(multi_scale_features, level_embeddings, strict=True)
        ]
        keys = [level + positions.to(level) for level, positions in zip(values, position_embeddings, strict=True)]
        index = torch.arange(self.query_features.num_embeddings, device=device)
        query_positions = self.query_positions(index)[None]
        queries = self.query_features(index).expand(multi_scale_features[0].shape[0], -1, -1)
        stages = [self._predict(queries)]
        for number, layer in enumerate(self.layers):
            level = number % NUM_FEATURE_LEVELS
            attention_mask = self._attention_mask(stages[-1].mask_embeds, resized_mask_features[level])
            queries, *attentions = layer(queries, query_positions, keys[level], values[level], attention_mask)
            stages.append(self._predict(queries, *(attentions if output_attentions else ())))
        return stages

    def _predict(self, queries: Tensor, *attentions: Tensor | None) -> GKCMaskDecoderStage:
        query_features = self.layer_norm(queries)
        return GKCMaskDecoderStage(queries, query_features, self.mask_embedder(query_features), *attentions)

    @staticmethod
    @torch.no_grad()
    def _attention_mask(mask_embeds: Tensor, resized_mask_features: Tensor) -> Tensor:
        """Return a mask (B, 1, Q, h*w) that is True inside the predicted mask, or everywhere if that mask is empty."""
        inside = predict_masks(mask_embeds, resized_mask_features).flatten(2) >= 0
        return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]


__all__ = [
    "GKCMaskDecoder",
    "GKCMaskDecoderStage",
    "pool_inside_masks",
    "pool_under_masks",
    "predict_masks",
    "predict_matched_masks",
]
