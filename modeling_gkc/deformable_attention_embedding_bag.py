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
"""CPU kernel of multi-scale deformable attention, computed as weighted sums of rows by `embedding_bag`.

A row is the value vector of one head at one cell. Every head of a query sums (4 corners x points x levels) rows, which
`embedding_bag` computes without storing the samples. Maps are padded by a border of zero cells and locations are
clamped to it, so that corners outside of the map need no masks.

Backward pass: the gradient of a weight is the inner product of a row with the gradient of its bag, which
`sampled_addmm` computes at the nonzero positions of a sparse matrix; the gradient of a row is the weighted sum of the
gradients of the bags that contain it, computed by `embedding_bag` after sorting the samples by cell.

Letters: B images, T positions of all levels together, N queries, M heads, E channels of a head, L levels, R sampling
points per head and level, S = L * R samples of a bag.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Samples(NamedTuple):
    """Positions of samples on padded maps, all of shape (bags, S), with a bag for each image, query and head.

    Attributes:
        rows: Row index of the cell at the upper left of a sample.
        x, y: Offsets of the sample from that cell as fractions of a cell in 0..1.
    """

    rows: Tensor
    x: Tensor
    y: Tensor


def embedding_bag_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `multi_scale_deformable_attention` in the precision of the locations.

    It is differentiable once, and not differentiable when traced by a compiler.

    Args:
        value: As in `multi_scale_deformable_attention`.
        spatial_shapes: As in `multi_scale_deformable_attention`.
        sampling_locations: As in `multi_scale_deformable_attention`.
        attention_weights: As in `multi_scale_deformable_attention`.

    Returns:
        (B, N, M * E) weighted sums of the concatenated heads.
    """
    precision = sampling_locations.dtype
    inputs = (value.to(precision), sampling_locations, attention_weights.to(precision))
    if torch.compiler.is_compiling():
        output, *_ = _forward(*inputs, spatial_shapes)
    else:
        output = _DeformableAttention.apply(*inputs, spatial_shapes)
    return output.to(value.dtype)


def _padded(spatial_shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(height + 2, width + 2) for height, width in spatial_shapes]


def _areas(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [height * width for height, width in shapes]


def _per_sample(numbers: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Repeat a number per level for every sample of a query, (M * S,); `like` has the shape (B, N, M, L, R, ...).

    The list is repeated in Python, because broadcasting over the few points of a level is slow, and compilers would
    turn a tensor repeated by torch into a broadcast again, which is not vectorized.
    """
    num_heads, _, num_points = like.shape[2:5]
    written_out = [number for number in numbers for _ in range(num_points)] * num_heads
    return torch.tensor(written_out, device=like.device, dtype=dtype or like.dtype)


def pad_maps(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Pad the maps of values (B, T, M, E) by a border of one cell of zeros, as rows (B * padded T * M, E)."""
    levels = value.split(_areas(spatial_shapes), dim=1)
    padded = [
        F.pad(level.unflatten(1, shape), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)
        for level, shape in zip(levels, spatial_shapes, strict=True)
    ]
    return torch.cat(padded, dim=1).flatten(0, 2)


def _cells(locations: Tensor, lengths: Sequence[int]) -> Tensor:
    """Convert locations along one axis to positions (B, N, M * S) in cells of the padded map, whose border is cell 0.

    Positions beyond the border are clamped to it, where values are zero.
    """
    length = _per_sample(lengths, locations)
    positions = (locations.flatten(2) * length).add_(0.5)
    return torch.minimum(positions.clamp_(min=0), length.add_(1))


def _split(positions: Tensor, lengths: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Split positions into cell indices, at most that of the last cell before the border, and fractions of a cell."""
    cells = torch.minimum(positions.floor(), _per_sample(lengths, like))
    return cells, positions - cells


def locate(locations: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Samples:
    """Find the cells of relative locations (B, N, M, L, R, 2).

    The fractions of a NaN location are NaN, and so are the outputs computed from them.

    Args:
        locations: (B, N, M, L, R, 2) locations (x, y) in 0..1.
        spatial_shapes: (height, width) of the map of each level.

    Returns:
        The positions of the samples.
    """
    batch_size, _, num_heads, num_levels, num_points = locations.shape[:5]
    heights, widths = zip(*spatial_shapes, strict=True)
    columns, x = _split(_cells(locations[..., 0], widths), widths, locations)
    lines, y = _split(_cells(locations[..., 1], heights), heights, locations)

    shapes = _padded(spatial_shapes)
    *starts, area = accumulate(_areas(shapes), initial=0)
    num_rows = batch_size * area * num_heads
    dtype = torch.int32 if num_rows < 2**31 else torch.int64
    heads = [head for head in range(num_heads) for _ in range(num_levels * num_points)]
    images = torch.arange(batch_size, device=locations.device, dtype=dtype)[:, None, None] * (area * num_heads)
    rows = lines.to(dtype) * _per_sample([width * num_heads for _, width in shapes], locations, dtype)
    rows += columns.to(dtype) * num_heads
    rows += _per_sample([start * num_heads for start in starts], locations, dtype)
    rows += torch.tensor(heads, device=locations.device, dtype=dtype)
    rows += images
    rows, x, y = (each.view(-1, num_levels * num_points) for each in (rows, x, y))
    return Samples(rows.clamp_(0, num_rows - 1), x, y)


def corner_steps(spatial_shapes: Sequence[tuple[int, int]], num_heads: int, like: Tensor) -> list[Tensor | int]:
    """Return the offsets of the rows of a sample's four corners from its upper left one, each a number or (S,).

    Args:
        spatial_shapes: (height, width) of the map of each level.
        num_heads: Number of heads M.
        like: (bags, S) tensor whose device and dtype are used.
    """
    num_points = like.shape[1] // len(spatial_shapes)
    below = [width * num_heads for _, width in _padded(spatial_shapes) for _ in range(num_points)]
    below = torch.tensor(below, device=like.device, dtype=like.dtype)
    return [0, num_heads, below, below + num_heads]


def corner_weights(samples: Samples, weights: Tensor) -> list[Tensor]:
    """Compute the bilinear weights (bags, S) of the upper left, upper right, lower left and lower right corners."""
    lower = weights * samples.y
    upper = weights - lower
    upper_right, lower_right = upper * samples.x, lower * samples.x
    return [upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right]


def _forward(
    value: Tensor, locations: Tensor, attention_weights: Tensor, spatial_shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Samples]:
    """Compute the weighted sums (B, N, M * E), and return them with the padded rows and the samples."""
    rows = pad_maps(value, spatial_shapes)
    samples = locate(locations, spatial_shapes)
    shares = corner_weights(samples, attention_weights.reshape(samples.rows.shape))
    steps = corner_steps(spatial_shapes, value.shape[2], samples.rows)
    output = torch.zeros(len(samples.rows), value.shape[-1], device=value.device, dtype=value.dtype)
    for step, share in zip(steps, shares, strict=True):
        output += F.embedding_bag(samples.rows + step, rows, per_sample_weights=share, mode="sum")
    return output.view(*locations.shape[:2], value.shape[2] * value.shape[3]), rows, samples


class _DeformableAttention(torch.autograd.Function):
    """Autograd function that saves rows, samples and weights, but not the sampled values, for the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        value: Tensor,
        locations: Tensor,
        attention_weights: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        output, rows, samples = _forward(value, locations, attention_weights, spatial_shapes)
        ctx.save_for_backward(rows, locations, attention_weights, *samples)
        ctx.spatial_shapes = spatial_shapes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, locations, attention_weights, *samples = ctx.saved_tensors
        samples = Samples(*samples)
        weights = attention_weights.reshape(samples.rows.shape)
        bags = grad_output.reshape(-1, rows.shape[-1])  # (B * N * M, E)
        grad_value = grad_locations = grad_weights = None
        if ctx.needs_input_grad[0]:
            sums = _row_sums(bags, samples, weights, len(rows))
            num_heads = attention_weights.shape[2]
            grad_value = _gather_corners(
                [each.view(len(locations), -1, num_heads, bags.shape[-1]) for each in sums], ctx.spatial_shapes
            )
        if any(ctx.needs_input_grad[1:3]):
            steps = corner_steps(ctx.spatial_shapes, attention_weights.shape[2], samples.rows)
            products = [_products(bags, samples.rows + step, rows) for step in steps]
            grad_locations, grad_weights = _sample_gradients(products, samples, weights, locations, ctx.spatial_shapes)
            grad_weights = grad_weights.view_as(attention_weights)
        return grad_value, grad_locations, grad_weights, None


def _row_sums(bags: Tensor, samples: Samples, weights: Tensor, num_rows: int) -> list[Tensor]:
    """Sum for each of the four corners the gradients (bags, E) of the bags with a sample in a cell, as (rows, E).

    For every corner the rows are those of the samples' upper left cells, so that they are sorted only once.
    """
    order = samples.rows.flatten().sort(stable=True).indices
    counts = torch.bincount(samples.rows.flatten(), minlength=num_rows)
    ends = F.pad(counts.cumsum(0), (1, 0)).to(samples.rows.dtype)
    holders = order.div(samples.rows.shape[1], rounding_mode="floor").to(samples.rows.dtype)
    x, y, weights = (each.flatten()[order] for each in (samples.x, samples.y, weights))
    return [
        F.embedding_bag(holders, bags, ends, per_sample_weights=share, mode="sum", include_last_offset=True)
        for share in corner_weights(Samples(holders, x, y), weights)
    ]


def _gather_corners(sums: Sequence[Tensor], spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Add up the sums of the four corners (B, padded T, M, E) at the cells of the unpadded maps (B, T, M, E).

    The sums of a corner are stored at the upper left cell of its samples and are shifted to the right and down.
    """
    shapes = _padded(spatial_shapes)
    corners = [each.split(_areas(shapes), dim=1) for each in sums]
    gradient = []
    for level, (height, width) in enumerate(shapes):
        upper_left, upper_right, lower_left, lower_right = (
            corner[level].unflatten(1, (height, width)) for corner in corners
        )
        cells = upper_left[:, 1:-1, 1:-1] + upper_right[:, 1:-1, :-2]
        cells += lower_left[:, :-2, 1:-1]
        cells += lower_right[:, :-2, :-2]
        gradient.append(cells.flatten(1, 2))
    return torch.cat(gradient, dim=1)


def _sample_gradients(
    products: Sequence[Tensor],
    samples: Samples,
    weights: Tensor,
    locations: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the locations (B, N, M, L, R, 2) and of the weights (bags, S).

    Args:
        products: Inner products (bags, S) of the rows of the four corners with the gradients of their bags.
        samples: Positions of the samples.
        weights: (bags, S) attention weights.
        locations: (B, N, M, L, R, 2) locations.
        spatial_shapes: (height, width) of the map of each level.
    """
    upper_left, upper_right, lower_left, lower_right = products
    upper_slope, lower_slope = upper_right.sub_(upper_left), lower_right.sub_(lower_left)
    upper = upper_left.addcmul_(samples.x, upper_slope)
    y_slope = lower_left.addcmul_(samples.x, lower_slope).sub_(upper)
    x_slope = lower_slope.sub_(upper_slope).mul_(samples.y).add_(upper_slope)
    heights, widths = zip(*spatial_shapes, strict=True)
    slopes = torch.stack(
        [
            _cell_gradient(slope * weights, locations[..., axis], lengths)
            for axis, (slope, lengths) in enumerate(((x_slope, widths), (y_slope, heights)))
        ],
        dim=-1,
    )
    return slopes.view_as(locations), upper.addcmul_(samples.y, y_slope)


def _cell_gradient(slopes: Tensor, locations: Tensor, lengths: Sequence[int]) -> Tensor:
    """Convert gradients of positions in cells to those of relative locations (B, N, M * S), zero beyond the border."""
    length = _per_sample(lengths, locations)
    positions = locations.flatten(2) * length
    is_inside = (positions > -0.5) & (positions < length + 0.5)
    return slopes.view_as(positions).mul_(length).mul_(is_inside)


def _products(bags: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Compute inner products (bags, S) of the gradients (bags, E) of bags with the rows (rows, E) at `indices`."""
    _silence_beta_warning()
    places = torch.sparse_csr_tensor(
        torch.arange(len(bags) + 1, dtype=indices.dtype) * indices.shape[1],
        indices.flatten(),
        rows.new_zeros(indices.numel()),
        size=(len(bags), len(rows)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(places, bags, rows.T, beta=0.0).values().view(indices.shape)


@cache
def _silence_beta_warning() -> None:
    """Trigger and ignore torch's warning about the beta state of sparse tensors, issued once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], torch.empty(0), size=(1, 1), check_invariants=False)


__all__ = ["embedding_bag_deformable_attention"]
