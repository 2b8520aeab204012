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
"""Eager attention in the form that transformers' `AttentionInterface` expects."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute scaled dot-product attention and return its weights, with the signature of `AttentionInterface`.

    Letters: B images, M heads, N queries, T keys, E channels of a head.

    Args:
        module: The calling attention layer, which is not used.
        query: (B, M, N, E) queries.
        key: (B, M, T, E) keys.
        value: (B, M, T, E) values.
        attention_mask: Boolean mask that broadcasts to (B, M, N, T), True where a query may attend to a key. Every
            query must attend to at least one key.
        scaling: Factor of the dot products.
        dropout: Probability of dropping an attention weight; 0 outside of training.

    Returns:
        The attended values (B, N, M, E) and the attention weights (B, M, N, T).
    """
    scores = torch.einsum("bmne,bmte->bmnt", query, key) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), p=dropout)
    return torch.einsum("bmnt,bmte->bnme", weights, value), weights


__all__ = ["eager_attention_forward"]
