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
"""Multi-scale deformable attention (Zhu et al., *Deformable DETR*, ICLR 2021): one function, kernels behind it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sums values sampled bilinearly at given locations of several feature maps.

    Letters: B images, T positions of all levels together, N queries, M heads, E channels of a head, L levels,
    R sampling points per head and level.

    Args:
        value: (B, T, M, E) values, the levels' maps flattened row by row and concatenated, T = sum of h * w.
        spatial_shapes: (height, width) of each level's map.
        sampling_locations: (B, N, M, L, R, 2) locations (x, y) relative to the map, 0..1 from edge to edge; outside of
            it values are zero. In fp32 at least: half precision misses a position of a large map by a cell.
        attention_weights: (B, N, M, L, R) weights of the samples.

    Returns:
        (B, N, M * E) weighted sums, heads concatenated.

    Raises:
        ValueError: if `spatial_shapes` do not add up to the positions of `value`.
    """
    num_positions = sum(height * width for height, width in spatial_shapes)
    if num_positions != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {spatial_shapes} hold {num_positions} positions, `value` {value.shape[1]}."
        )
    return _grid_sample_kernel(value, spatial_shapes, sampling_locations, attention_weights)


def _grid_sample_kernel(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Plain torch: one `grid_sample` per level, heads folded into the batch, in the precision of the locations."""
    batch_size, _, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]
    grids = (2 * sampling_locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, N, R, 2)
    weights = attention_weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, B*M, N, R)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, E, T)

    output = grids.new_zeros(batch_size * num_heads, head_dim, num_queries)
    levels = maps.split([height * width for height, width in spatial_shapes], dim=-1)
    for level, shape, grid, weight in zip(levels, spatial_shapes, grids, weights, strict=True):
        level = level.unflatten(-1, shape).to(grid.dtype)
        sampled = F.grid_sample(level, grid, padding_mode="zeros", align_corners=False)
        output = output + torch.einsum("benr,bnr->ben", sampled, weight.to(grid.dtype))
    output = output.to(value.dtype)
    return output.unflatten(0, (batch_size, num_heads)).permute(0, 3, 1, 2).flatten(2)


__all__ = ["multi_scale_deformable_attention"]
