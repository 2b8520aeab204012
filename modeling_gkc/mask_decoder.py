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

At every stage (before the first layer and after each) a query predicts a mask; the next layer's cross-attention sees
only that mask's inside. A mask at the size of level l is the product of the mask embedding with the mask features
*resized to that level*: resizing is linear, so this equals resizing the full-size mask, at a fraction of the work.

Letters in the comments: B images, Q queries, C hidden, (h, w) size of a level, S stages.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_gkc import NUM_FEATURE_LEVELS, GKCConfig
from .pixel_decoder import sine_position_embedding


@dataclass
class GKCMaskDecoderStage:
    """What one stage of the decoder predicts.

    Attributes:
        query_features: (B, Q, C) normalised queries.
        mask_embeds: (B, Q, mask_feature_size) embeddings whose product with the mask features are the masks.
    """

    query_features: Tensor
    mask_embeds: Tensor


def predict_masks(mask_embeds: Tensor, mask_features: Tensor) -> Tensor:
    """Mask logits (B, Q, h, w) of mask embeddings (B, Q, C) on mask features (B, C, h, w)."""
    return torch.einsum("bqc,bchw->bqhw", mask_embeds, mask_features)


class GKCAttention(nn.Module):
    """Multi-head attention with separate position embeddings for queries and keys."""

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attends (B, N, C) queries to (B, T, C) keys and values; `attention_mask` (B, 1, N, T) is True where seen."""
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )  # (B, heads, N or T, C / heads)
        dropout = self.dropout if self.training else 0.0
        attend = _eager_attention if self.config._attn_implementation == "eager" else F.scaled_dot_product_attention
        attended = attend(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
    scores = torch.einsum("bhnd,bhtd->bhnt", query, key) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), p=dropout_p)
    return torch.einsum("bhnt,bhtd->bhnd", weights, value)


class GKCMaskDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention, feed-forward network, each followed by normalisation."""

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
    ) -> Tensor:
        """Updates (B, Q, C) queries from one level's keys and values (B, h*w, C)."""
        attended = self.cross_attn(queries + query_positions, keys, values, attention_mask)
        queries = self.cross_attn_layer_norm(queries + self.dropout(attended))
        positioned = queries + query_positions
        attended = self.self_attn(positioned, positioned, queries)
        queries = self.self_attn_layer_norm(queries + self.dropout(attended))
        transformed = self.fc2(self.dropout(F.relu(self.fc1(queries))))
        return self.final_layer_norm(queries + self.dropout(transformed))


class GKCMaskEmbedder(nn.Module):
    """Three-layer perceptron from a normalised query to its mask embedding."""

    def __init__(self, config: GKCConfig):
        super().__init__()
        width = config.hidden_size
        self.layers = nn.ModuleList(
            [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, config.mask_feature_size)]
        )

    def forward(self, query_features: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(query_features)))))


class GKCMaskDecoder(nn.Module):
    """Learned queries refined by layers of masked attention to strides 32, 16, 8 in turn."""

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
        self, multi_scale_features: tuple[Tensor, ...], resized_mask_features: list[Tensor]
    ) -> list[GKCMaskDecoderStage]:
        """Decodes segments.

        Args:
            multi_scale_features: Three maps (B, C, h, w) of strides 32, 16, 8.
            resized_mask_features: The mask features resized to each of the three maps.

        Returns:
            The S = decoder_layers + 1 stages, the last one the prediction.
        """
        levels = [self._keys_and_values(index, level) for index, level in enumerate(multi_scale_features)]
        batch_size = multi_scale_features[0].shape[0]
        query_positions = self.query_positions.weight[None]
        queries = self.query_features.weight[None].expand(batch_size, -1, -1)
        stages = [self._predict(queries)]
        for index, layer in enumerate(self.layers):
            level = index % NUM_FEATURE_LEVELS
            attention_mask = self._attention_mask(stages[-1].mask_embeds, resized_mask_features[level])
            queries = layer(queries, query_positions, *levels[level], attention_mask)
            stages.append(self._predict(queries))
        return stages

    def _keys_and_values(self, index: int, level: Tensor) -> tuple[Tensor, Tensor]:
        height, width = level.shape[-2:]
        values = level.flatten(2).transpose(1, 2) + self.level_embedding.weight[index]  # (B, h*w, C)
        positions = sine_position_embedding(height, width, values.shape[-1], values.device, values.dtype)
        return values + positions, values

    def _predict(self, queries: Tensor) -> GKCMaskDecoderStage:
        query_features = self.layer_norm(queries)
        return GKCMaskDecoderStage(query_features, self.mask_embedder(query_features))

    @staticmethod
    @torch.no_grad()
    def _attention_mask(mask_embeds: Tensor, resized_mask_features: Tensor) -> Tensor:
        """(B, 1, Q, h*w), True inside the predicted mask; a query with an empty mask sees everything."""
        inside = predict_masks(mask_embeds, resized_mask_features).flatten(2) >= 0
        return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]


__all__ = ["GKCMaskDecoder", "GKCMaskDecoderStage", "predict_masks"]
