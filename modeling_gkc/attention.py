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
"""Attention written out, beside the implementations that transformers' `AttentionInterface` offers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention whose weights can be looked at, with the signature that `AttentionInterface` asks for.

    Letters: B images, M heads, N queries, T keys, E channels of a head.

    Args:
        module: The attention layer that calls.
        query: (B, M, N, E).
        key, value: (B, M, T, E).
        attention_mask: Boolean, True where seen, broadcast to (B, M, N, T); every query must see something.
        scaling: Factor of the scores.
        dropout: Probability of dropping a weight; 0 outside of training.

    Returns:
        (B, N, M, E) attended values and (B, M, N, T) weights.
    """
    scores = torch.einsum("bmne,bmte->bmnt", query, key) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), p=dropout)
    return torch.einsum("bmnt,bmte->bnme", weights, value), weights


__all__ = ["eager_attention"]
