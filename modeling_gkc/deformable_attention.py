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
"""Multi-scale deformable attention (Zhu et al., *Deformable DETR*, ICLR 2021) with a choice of kernels.

The environment variable `GKC_DEFORMABLE_ATTENTION` or `GKCConfig.deformable_attention` selects the kernel:

* `grid_sample`: plain torch for any device and for exported graphs;
* `embedding_bag`: several times faster on CPUs;
* `triton`: for CUDA devices, if Triton is installed.
"""

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_gkc import DEFORMABLE_ATTENTION_KERNELS
from .deformable_attention_embedding_bag import embedding_bag_deformable_attention

KERNEL_VARIABLE = "GKC_DEFORMABLE_ATTENTION"


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    kernel: str | None = None,
) -> Tensor:
    """Compute weighted sums of values sampled bilinearly from several feature maps.

    Letters: B images, T positions of all levels together, N queries, M heads, E channels of a head, L levels,
    R sampling points per head and level.

    Args:
        value: (B, T, M, E) values; the maps of all levels are flattened row by row and concatenated, T = sum of h * w.
        spatial_shapes: (height, width) of the map of each level.
        sampling_locations: (B, N, M, L, R, 2) locations (x, y) in 0..1 relative to the edges of the map; values
            outside of it are zero. Use at least fp32: in half precision, positions in a large map are off by a cell.
        attention_weights: (B, N, M, L, R) weights of the samples.
        kernel: `grid_sample`, `embedding_bag` or `triton`. Default: the environment variable
            `GKC_DEFORMABLE_ATTENTION`, else the fastest for the device. `torch.jit.trace` always uses `grid_sample`.

    Returns:
        (B, N, M * E) weighted sums of the concatenated heads.

    Raises:
        ValueError: If `spatial_shapes` do not add up to the number of positions of `value`, or the kernel is unknown.
    """
    num_positions = sum(height * width for height, width in spatial_shapes)
    if num_positions != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {spatial_shapes} have {num_positions} positions, but `value` has {value.shape[1]}."
        )
    kernel = kernel or os.environ.get(KERNEL_VARIABLE) or fastest_kernel(value, sampling_locations, attention_weights)
    if kernel not in KERNELS:
        raise ValueError(f"The kernel of deformable attention must be one of {', '.join(KERNELS)}, got {kernel!r}.")
    if torch.jit.is_tracing():  # tracing supports neither custom autograd functions nor Triton kernels
        kernel = "grid_sample"
    return KERNELS[kernel](value, spatial_shapes, sampling_locations, attention_weights)


def fastest_kernel(*inputs: Tensor) -> str:
    """Return the name of the fastest kernel for the given inputs.

    `embedding_bag` has a custom backward pass that cannot be compiled, so that under compilation it is chosen only
    without gradients.
    """
    device = inputs[0].device.type
    if torch.compiler.is_exporting():
        return "grid_sample"
    if device == "cuda" and _has_triton():
        return "triton"
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    if device == "cpu" and not (wants_gradient and torch.compiler.is_compiling()):
        return "embedding_bag"
    return "grid_sample"


def _grid_sample_kernel(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute deformable attention in plain torch: one `grid_sample` per level, in the precision of the locations."""
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


def _triton_kernel(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute deformable attention with Triton, which is slow to import and therefore imported on first use."""
    from .deformable_attention_triton import triton_deformable_attention

    return triton_deformable_attention(value, spatial_shapes, sampling_locations, attention_weights)


@cache
def _has_triton() -> bool:
    from .deformable_attention_triton import is_available

    return is_available()


KERNELS = dict(
    zip(
        DEFORMABLE_ATTENTION_KERNELS,
        (_grid_sample_kernel, embedding_bag_deformable_attention, _triton_kernel),
        strict=True,
    )
)

__all__ = ["multi_scale_deformable_attention"]
