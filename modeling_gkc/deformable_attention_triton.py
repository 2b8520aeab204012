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
"""Triton kernels of multi-scale deformable attention (Zhu et al., *Deformable DETR*, ICLR 2021) for NVIDIA GPUs.

The module is imported on first use, because Triton is optional; `deformable_attention` has kernels without it.

A program computes one head of a block of queries of one image. Channels are contiguous in memory, so that a warp reads
a corner of a sample in whole cache lines. The forward and backward passes are custom operators of torch (not
`torch.library.triton_op`, whose tracing supports neither tuples of sizes nor the interpreter): `torch.compile` treats
them as single nodes of a graph and captures them in CUDA graphs. The sizes of the maps are kernel arguments, so that
no data is copied to the device and no synchronization is needed. A kernel is compiled at its first call for a
combination of dtypes, head size, levels and points.

If TRITON_INTERPRET=1 is set before Triton is imported, the kernels run slowly on the CPU, for tests.
"""

import math
import re
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_INTERPRETED = triton is not None and triton.knobs.runtime.interpret
_THREADS = 128
_BYTES_PER_LOAD = 16
# A second copy of this module, imported as remote code, must not replace the operators of the first.
_OPERATORS = re.sub(r"\W", "_", __name__)


def is_available() -> bool:
    """Return whether Triton is installed and a CUDA device or Triton's interpreter is available."""
    return triton is not None and (_INTERPRETED or torch.cuda.is_available())


def triton_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute weighted sums of values sampled bilinearly from several feature maps; differentiable once.

    Letters: B images, T positions of all levels together, N queries, M heads, E channels of a head, L levels,
    R sampling points per head and level. All dtypes are computed in fp32 (in fp64 if an input is fp64). Gradients of
    the values are summed by atomic additions, so that their last bits are not deterministic.

    Args:
        value: (B, T, M, E) values; the maps of all levels are flattened row by row and concatenated, T = sum of h * w.
        spatial_shapes: (height, width) of the map of each level.
        sampling_locations: (B, N, M, L, R, 2) locations (x, y) in 0..1 relative to the edges of the map; values
            outside of it and at locations that are not finite are zero.
        attention_weights: (B, N, M, L, R) weights of the samples.

    Returns:
        (B, N, M * E) weighted sums of the concatenated heads in the dtype of `value`.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the tensors are not floating-point tensors on a CUDA device, or their shapes do not match.
    """
    _check_place(value, sampling_locations, attention_weights)
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    sizes = [length for shape in spatial_shapes for length in shape]
    return _forward(value, sizes, sampling_locations, attention_weights)


def _check_place(*tensors: Tensor) -> None:
    if triton is None:
        raise ImportError("The Triton kernel needs Triton: pip install triton, or choose the kernel 'grid_sample'.")
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise ValueError(
            f"Put all inputs on one device, not on {', '.join(str(tensor.device) for tensor in tensors)}."
        )
    if device.type != "cuda" and not _INTERPRETED:
        raise ValueError(f"The Triton kernel needs CUDA tensors, not {device}: choose the kernel 'grid_sample'.")
    if not all(tensor.is_floating_point() for tensor in tensors):
        raise ValueError(
            f"Inputs must be of floating point, not {', '.join(str(tensor.dtype) for tensor in tensors)}."
        )


def _check_shapes(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    # The kernels do not check shapes: a wrong one would access memory out of bounds.
    num_positions = sum(height * width for height, width in spatial_shapes)
    if num_positions != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {spatial_shapes} have {num_positions} positions, but `value` has {value.shape[1]}."
        )
    batch_size, _, num_heads, _ = value.shape
    num_queries, num_points = sampling_locations.shape[1], sampling_locations.shape[4]
    samples = (batch_size, num_queries, num_heads, len(spatial_shapes), num_points)
    if tuple(sampling_locations.shape) != (*samples, 2) or tuple(attention_weights.shape) != samples:
        raise ValueError(
            f"`sampling_locations` {tuple(sampling_locations.shape)} and `attention_weights` "
            f"{tuple(attention_weights.shape)} do not fit `value` {tuple(value.shape)} of {len(spatial_shapes)} maps."
        )


@torch.library.custom_op(f"{_OPERATORS}::forward", mutates_args=())
def _forward(value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    batch_size, _, num_heads, head_dim = value.shape
    output = value.new_empty(batch_size, sampling_locations.shape[1], num_heads * head_dim)
    inputs = [tensor.contiguous() for tensor in (value, sampling_locations, attention_weights)]
    _launch(_forward_kernel, inputs, [output], sizes, value.dtype)
    return output


@_forward.register_fake
def _(value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    batch_size, _, num_heads, head_dim = value.shape
    return value.new_empty(batch_size, sampling_locations.shape[1], num_heads * head_dim)


@torch.library.custom_op(f"{_OPERATORS}::backward", mutates_args=())
def _backward(
    grad_output: Tensor, value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_determinism(value)
    inputs = [tensor.contiguous() for tensor in (value, sampling_locations, attention_weights, grad_output)]
    # Atomic additions sum many small terms, and therefore use the precision of the computation, not of the values.
    # The values are read in its layout too, so that products need not be exchanged between threads.
    precision = _precision(*inputs[:3])
    grad_value = torch.zeros_like(inputs[0], dtype=precision)
    grads = [grad_value, torch.empty_like(inputs[1]), torch.empty_like(inputs[2])]
    block_samples = triton.next_power_of_2(math.prod(sampling_locations.shape[3:5]))
    _launch(_backward_kernel, inputs, grads, sizes, precision, BLOCK_SAMPLES=block_samples)
    return grad_value.to(value.dtype), grads[1], grads[2]


@_backward.register_fake
def _(
    grad_output: Tensor, value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.sizes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _differentiate(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grads = _backward(grad_output, value, ctx.sizes, sampling_locations, attention_weights)
    return grads[0], None, *grads[1:]


def _raise_on_second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("Deformable attention is differentiable only once, with every kernel.")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_raise_on_second_derivative)


def _check_determinism(value: Tensor) -> None:
    """Raise or warn if deterministic algorithms are requested, as torch does in the backward of `grid_sample`."""
    if value.is_cuda and torch.are_deterministic_algorithms_enabled():
        message = "The gradient of deformable attention is not deterministic on a GPU: compute it on the CPU."
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _launch(kernel, inputs: list[Tensor], outputs: list[Tensor], sizes: list[int], loaded: torch.dtype, **blocks: int):
    """Launch a kernel with as many queries per program as its threads can load values of dtype `loaded` at once."""
    value, sampling_locations = inputs[:2]
    batch_size, num_positions, num_heads, head_dim = value.shape
    num_queries, _, num_levels, num_points = sampling_locations.shape[1:5]
    block_channels = triton.next_power_of_2(head_dim)
    block_queries = _queries_of_a_program(block_channels, loaded)
    num_programs = batch_size * triton.cdiv(num_queries, block_queries) * num_heads
    if num_programs == 0:
        return
    with torch.cuda.device_of(value):
        kernel[(num_programs,)](
            *inputs,
            *outputs,
            # As floats, exact up to 2**24, because Triton specializes kernels for some integer values.
            tuple(float(length) for length in sizes),
            num_positions,
            num_queries,
            LEVELS=num_levels,
            POINTS=num_points,
            HEADS=num_heads,
            CHANNELS=head_dim,
            BLOCK_QUERIES=block_queries,
            BLOCK_CHANNELS=block_channels,
            PRECISION=tl.float64 if _precision(*inputs[:3]) == torch.float64 else tl.float32,
            num_warps=_THREADS // 32,
            **blocks,
        )


def _queries_of_a_program(block_channels: int, loaded: torch.dtype) -> int:
    return min(max(_THREADS * _BYTES_PER_LOAD // loaded.itemsize // block_channels, 1), 64)


if triton is not None:

    @triton.jit
    def _program_rows(num_queries, HEADS: tl.constexpr, BLOCK_QUERIES: tl.constexpr):
        """Return this program's image and head, its rows of (image, query, head), and whether their queries exist."""
        head = tl.program_id(0) % HEADS
        block = tl.program_id(0) // HEADS
        num_blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
        image = (block // num_blocks).to(tl.int64)
        queries = block % num_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        return image, head, (image * num_queries + queries) * HEADS + head, queries < num_queries

    @triton.jit
    def _cell_before(locations, exists, length, PRECISION: tl.constexpr):
        """Return the index of the cell whose center is at or before each location, and the weight of the next cell.

        Locations beyond the reach of every cell, also infinite ones, become -2: that cell and its next are outside.
        """
        location = tl.load(locations, mask=exists, other=-1).to(PRECISION) * length - 0.5
        location = tl.where((location >= -1) & (location < length), location, -2)
        before = tl.floor(location)
        return before.to(tl.int32), location - before

    @triton.jit
    def _cell(row, column, height, width, first, used, STRIDE: tl.constexpr):
        """Return the offsets of cells from the first value, and the mask of cells and channels that exist."""
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return ((first + row.to(tl.int64) * width + column) * STRIDE)[:, None], inside[:, None] & used[None, :]

    @triton.jit(do_not_specialize=["num_positions", "num_queries"])
    def _forward_kernel(
        value,
        locations,
        weights,
        output,
        sizes,
        num_positions,
        num_queries,
        LEVELS: tl.constexpr,
        POINTS: tl.constexpr,
        HEADS: tl.constexpr,
        CHANNELS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        image, head, rows, exists = _program_rows(num_queries, HEADS, BLOCK_QUERIES)
        channels = tl.arange(0, BLOCK_CHANNELS)
        used = channels < CHANNELS
        value += (head * CHANNELS + channels)[None, :]
        first = image * num_positions
        STRIDE: tl.constexpr = HEADS * CHANNELS
        total = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), PRECISION)
        for level in tl.static_range(LEVELS):
            height, width = tl.cast(sizes[2 * level], tl.int32), tl.cast(sizes[2 * level + 1], tl.int32)
            # Unrolled by two to overlap the reads of two points; a remainder would multiply the compilation time.
            for point in tl.range(0, POINTS, loop_unroll_factor=2 - POINTS % 2):
                samples = (rows * LEVELS + level) * POINTS + point
                weight = tl.load(weights + samples, mask=exists, other=0).to(PRECISION)
                left, right_share = _cell_before(locations + 2 * samples, exists, sizes[2 * level + 1], PRECISION)
                top, bottom_share = _cell_before(locations + 2 * samples + 1, exists, sizes[2 * level], PRECISION)
                for below in tl.static_range(2):
                    for right in tl.static_range(2):
                        offsets, mask = _cell(top + below, left + right, height, width, first, used, STRIDE)
                        share = weight * (bottom_share if below else 1 - bottom_share)
                        share *= right_share if right else 1 - right_share
                        total += share[:, None] * tl.load(value + offsets, mask=mask, other=0).to(PRECISION)
            first += height.to(tl.int64) * width
        tl.store(output + rows[:, None] * CHANNELS + channels[None, :], total, mask=exists[:, None] & used[None, :])

    @triton.jit(do_not_specialize=["num_positions", "num_queries"])
    def _backward_kernel(
        value,
        locations,
        weights,
        grad_output,
        grad_value,
        grad_locations,
        grad_weights,
        sizes,
        num_positions,
        num_queries,
        LEVELS: tl.constexpr,
        POINTS: tl.constexpr,
        HEADS: tl.constexpr,
        CHANNELS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_SAMPLES: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        image, head, rows, exists = _program_rows(num_queries, HEADS, BLOCK_QUERIES)
        channels = tl.arange(0, BLOCK_CHANNELS)
        used = channels < CHANNELS
        value += (head * CHANNELS + channels)[None, :]
        grad_value += (head * CHANNELS + channels)[None, :]
        grad_output += rows[:, None] * CHANNELS + channels[None, :]
        grad = tl.load(grad_output, mask=exists[:, None] & used[None, :], other=0).to(PRECISION)
        # Gradients of locations and weights are accumulated in registers and stored at the end in whole rows.
        grad_weight_tile = tl.zeros((BLOCK_QUERIES, BLOCK_SAMPLES), PRECISION)
        grad_x_tile = tl.zeros((BLOCK_QUERIES, BLOCK_SAMPLES), PRECISION)
        grad_y_tile = tl.zeros((BLOCK_QUERIES, BLOCK_SAMPLES), PRECISION)
        first = image * num_positions
        STRIDE: tl.constexpr = HEADS * CHANNELS
        for level in tl.static_range(LEVELS):
            height, width = tl.cast(sizes[2 * level], tl.int32), tl.cast(sizes[2 * level + 1], tl.int32)
            for point in tl.range(0, POINTS):
                samples = (rows * LEVELS + level) * POINTS + point
                weight = tl.load(weights + samples, mask=exists, other=0).to(PRECISION)
                left, x = _cell_before(locations + 2 * samples, exists, sizes[2 * level + 1], PRECISION)
                top, y = _cell_before(locations + 2 * samples + 1, exists, sizes[2 * level], PRECISION)
                # All reads precede the atomic additions, across which reads are not reordered.
                cell_00, mask_00 = _cell(top, left, height, width, first, used, STRIDE)
                cell_01, mask_01 = _cell(top, left + 1, height, width, first, used, STRIDE)
                cell_10, mask_10 = _cell(top + 1, left, height, width, first, used, STRIDE)
                cell_11, mask_11 = _cell(top + 1, left + 1, height, width, first, used, STRIDE)
                value_00 = tl.load(value + cell_00, mask=mask_00, other=0).to(PRECISION)
                value_01 = tl.load(value + cell_01, mask=mask_01, other=0).to(PRECISION)
                value_10 = tl.load(value + cell_10, mask=mask_10, other=0).to(PRECISION)
                value_11 = tl.load(value + cell_11, mask=mask_11, other=0).to(PRECISION)
                dot_00, dot_01 = tl.sum(grad * value_00, axis=1), tl.sum(grad * value_01, axis=1)
                dot_10, dot_11 = tl.sum(grad * value_10, axis=1), tl.sum(grad * value_11, axis=1)

                this = tl.arange(0, BLOCK_SAMPLES)[None, :] == level * POINTS + point
                grad_weight = (1 - y) * ((1 - x) * dot_00 + x * dot_01) + y * ((1 - x) * dot_10 + x * dot_11)
                grad_x = weight * width * ((1 - y) * (dot_01 - dot_00) + y * (dot_11 - dot_10))
                grad_y = weight * height * ((1 - x) * (dot_10 - dot_00) + x * (dot_11 - dot_01))
                grad_weight_tile = tl.where(this, grad_weight[:, None], grad_weight_tile)
                grad_x_tile = tl.where(this, grad_x[:, None], grad_x_tile)
                grad_y_tile = tl.where(this, grad_y[:, None], grad_y_tile)

                above, below = weight * (1 - y), weight * y
                _add(grad_value + cell_00, (above * (1 - x))[:, None] * grad, mask_00)
                _add(grad_value + cell_01, (above * x)[:, None] * grad, mask_01)
                _add(grad_value + cell_10, (below * (1 - x))[:, None] * grad, mask_10)
                _add(grad_value + cell_11, (below * x)[:, None] * grad, mask_11)
            first += height.to(tl.int64) * width

        samples = tl.arange(0, BLOCK_SAMPLES)[None, :]
        mask = exists[:, None] & (samples < LEVELS * POINTS)
        samples += rows[:, None] * (LEVELS * POINTS)
        tl.store(grad_weights + samples, grad_weight_tile, mask=mask)
        tl.store(grad_locations + 2 * samples, grad_x_tile, mask=mask)
        tl.store(grad_locations + 2 * samples + 1, grad_y_tile, mask=mask)

    @triton.jit
    def _add(pointers, values, mask):
        # Relaxed ordering is sufficient and faster, because the sums are read only after the kernel.
        tl.atomic_add(pointers, values, mask=mask, sem="relaxed")


__all__ = ["is_available", "triton_deformable_attention"]
