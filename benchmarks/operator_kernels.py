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
"""Multi-scale deformable attention alone: all kernels, forward and backward, at the sizes of the pixel decoder.

8 heads of 32 channels, 4 points on each of the levels of stride 32, 16 and 8, one query for every position. Sampling
points lie within a few cells of their query's position, as in a trained model. Before anything is timed, the outputs
of the kernels are checked to agree.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling_gkc.deformable_attention import multi_scale_deformable_attention
from modeling_gkc.pixel_decoder import reference_points

from .harness import DTYPES, Options, Result, Rounds, compare, missing_compiler, time_interleaved
from .models import Preset

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (32, 16, 8)
CPU_KERNELS, CUDA_KERNELS = ("grid_sample", "embedding_bag"), ("grid_sample", "triton")
BOUNDS = {"fp32": 1e-3, "bf16": 0.05}
FORWARD, BOTH = "forward", "forward and backward"


def operator_inputs(size: int, device: str, dtype: str, requires_grad: bool = False) -> tuple[Any, ...]:
    """Return value, spatial shapes, sampling locations and weights of one image of `size` x `size` pixels."""
    shapes = [(size // stride, size // stride) for stride in STRIDES]
    generator = torch.Generator().manual_seed(0)
    positions = sum(height * width for height, width in shapes)
    value = torch.randn(1, positions, HEADS, CHANNELS, generator=generator)
    points = reference_points(shapes, torch.device("cpu"), torch.float32).view(positions, 1, 1, 1, 2)
    offsets = torch.randn(1, positions, HEADS, len(shapes), POINTS, 2, generator=generator)
    cells = torch.tensor([[width, height] for height, width in shapes]).view(1, 1, 1, len(shapes), 1, 2)
    locations = points + 2 * offsets / cells
    weights = torch.randn(1, positions, HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    weights = weights.unflatten(-1, (len(shapes), POINTS))
    kinds = (DTYPES[dtype], torch.float32, DTYPES[dtype])
    value, locations, weights = (
        each.to(device, kind).requires_grad_(requires_grad)
        for each, kind in zip((value, locations, weights), kinds, strict=True)
    )
    return value, shapes, locations, weights


def forward_call(inputs: tuple[Any, ...], kernel: str, compiled: bool = False) -> Callable[[], Tensor]:
    """Return a call of the operator without gradients."""

    @torch.no_grad()
    def run() -> Tensor:
        return operator(*inputs)

    def operator(value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> Tensor:
        return multi_scale_deformable_attention(value, shapes, locations, weights, kernel=kernel)

    if compiled:
        operator = torch.compile(operator, dynamic=False)
    return run


def backward_call(inputs: tuple[Any, ...], kernel: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call of the operator and of the gradients of value, locations and weights."""
    value, shapes, locations, weights = inputs

    def run() -> tuple[Tensor, ...]:
        output = multi_scale_deformable_attention(value, shapes, locations, weights, kernel=kernel)
        return torch.autograd.grad(output.sum(), (value, locations, weights))

    return run


def measure_operator(preset: Preset, options: Options, size: int) -> list[Result]:
    """Time all kernels of the device; the ratio is the time of `grid_sample` over that of each other kernel."""
    result = Result(f"Deformable attention alone, maps of an image of {size} x {size}")
    kernels = CPU_KERNELS if options.device == "cpu" else CUDA_KERNELS
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in options.dtypes if options.device == "cuda" else ("fp32",):
        inputs, tracked = (operator_inputs(size, options.device, dtype, grad) for grad in (False, True))
        expected = forward_call(operator_inputs(size, options.device, "fp32"), "grid_sample")()
        for kernel in kernels:
            calls[f"{kernel}, {dtype}, {FORWARD}"] = forward_call(inputs, kernel)
            calls[f"{kernel}, {dtype}, {BOTH}"] = backward_call(tracked, kernel)
            actual, name = forward_call(inputs, kernel)(), f"{kernel}, {dtype}, against grid_sample, fp32"
            result.agreement.append(compare(name, actual, expected, BOUNDS[dtype]))
    _add_compiled(calls, result, options, size)
    timings = time_interleaved(calls, 3 * preset.rounds, limit=preset.limit, device=options.device)
    result.add(timings, *_ratios(timings, calls))
    return [result]


def _add_compiled(calls: dict, result: Result, options: Options, size: int) -> None:
    """Add `embedding_bag` under torch.compile, as it runs in a compiled model."""
    candidate = f"embedding_bag compiled, fp32, {FORWARD}"
    if options.device != "cpu" or not options.compile:
        return
    if missing := missing_compiler():
        result.not_measured[candidate] = missing
        return
    inputs = operator_inputs(size, options.device, "fp32")
    calls[candidate] = forward_call(inputs, "embedding_bag", compiled=True)
    expected = forward_call(inputs, "grid_sample")()
    result.agreement.append(compare("embedding_bag compiled, against grid_sample", calls[candidate](), expected, 1e-3))


def _ratios(timings: Rounds, calls: dict) -> list[dict | None]:
    found = []
    for candidate in calls:
        kernel, dtype, passes = candidate.split(", ", 2)
        if kernel != "grid_sample":
            found.append(
                timings.ratio(
                    f"grid_sample / {kernel}, {dtype}, {passes}", f"grid_sample, {dtype}, {passes}", candidate
                )
            )
    return found
