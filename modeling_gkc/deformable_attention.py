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
"""Multi-scale deformable attention (Zhu et al., *Deformable DETR*, ICLR 2021): one function, kernels behind it.

`GKC_DEFORMABLE_ATTENTION` in the environment names the kernel to be used, as does `GKCConfig.deformable_attention`:

* `grid_sample`: plain torch, for any device, and for graphs that are exported;
* `embedding_bag`: for processors, where it is several times faster;
* `triton`: for CUDA, where Triton is installed.
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
    """Sums values sampled bilinearly at given locations of several feature maps.

    Letters: B images, T positions of all levels together, N queries, M heads, E channels of a head, L levels,
    R sampling points per head and level.

    Args:
        value: (B, T, M, E) values, the levels' maps flattened row by row and concatenated, T = sum of h * w.
        spatial_shapes: (height, width) of each level's map.
        sampling_locations: (B, N, M, L, R, 2) locations (x, y) relative to the map, 0..1 from edge to edge; outside of
            it values are zero. In fp32 at least: half precision misses a position of a large map by a cell.
        attention_weights: (B, N, M, L, R) weights of the samples.
        kernel: `grid_sample`, `embedding_bag` or `triton`; default: what the environment's `GKC_DEFORMABLE_ATTENTION`
            names, else the fastest for the device. `torch.jit.trace` always records `grid_sample`.

    Returns:
        (B, N, M * E) weighted sums, heads concatenated.

    Raises:
        ValueError: if `spatial_shapes` do not add up to the positions of `value`, or there is no such kernel.
    """
    num_positions = sum(height * width for height, width in spatial_shapes)
    if num_positions != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {spatial_shapes} hold {num_positions} positions, `value` {value.shape[1]}."
        )
    kernel = kernel or os.environ.get(KERNEL_VARIABLE) or fastest_kernel(value, sampling_locations, attention_weights)
    if kernel not in KERNELS:
        raise ValueError(f"The kernel of deformable attention must be one of {', '.join(KERNELS)}, got {kernel!r}.")
    if torch.jit.is_tracing():  # which records no autograd function and no kernel of Triton's
        kernel = "grid_sample"
    return KERNELS[kernel](value, spatial_shapes, sampling_locations, attention_weights)


def fastest_kernel(*inputs: Tensor) -> str:
    """Name of the kernel for these inputs.

    `embedding_bag` computes its own gradients, which a compiler cannot trace: there it is taken only without them.
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


def _triton_kernel(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Triton takes a while to import, so this is done when it is used."""
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
