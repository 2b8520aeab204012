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
"""Batches of images of different sizes: padding, content sizes, and runs grouped by padded size.

The content size of an image is its size inside the padded input.

Letters: B images, Q queries, N segments of an image, (H, W) padded input size. All sizes are (height, width).
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput
from transformers.utils.import_utils import is_tracing

from .argument_checks import check_tensor
from .configuration_gkc import BACKBONE_STRIDES

SIZE_DIVISOR = BACKBONE_STRIDES[-1]
CELLS_PER_DIVISOR = SIZE_DIVISOR // BACKBONE_STRIDES[0]
EMPTY_MASK_LOGIT = -30.0
Output = TypeVar("Output", bound=ModelOutput)


def round_up(length: int) -> int:
    """Round a length in pixels up to a multiple of the coarsest stride."""
    return math.ceil(length / SIZE_DIVISOR) * SIZE_DIVISOR


def content_sizes_of(pixel_mask: Tensor) -> Tensor:
    """Compute the content sizes of a pixel mask.

    Args:
        pixel_mask: (B, H, W) mask, 1 inside the image and 0 in the padding.

    Returns:
        (B, 2) height and width of each image in pixels.

    Raises:
        ValueError: If a mask has values other than 0 and 1 or is not a rectangle at the upper left; not checked in
            traced and compiled graphs.
    """
    mask = pixel_mask.bool()
    if not is_tracing(mask) and pixel_mask.dtype != torch.bool and not torch.equal(mask.to(pixel_mask), pixel_mask):
        raise ValueError("`pixel_mask` must be 1 inside the image and 0 in the padding, got other values.")
    sizes = torch.stack([mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)], dim=1)
    if not is_tracing(mask) and not torch.equal(mask, rectangles(sizes, *mask.shape[1:])):
        raise ValueError("`pixel_mask` must be 1 on a rectangle at the upper left of each input, and 0 elsewhere.")
    return sizes


def full_content_sizes(pixel_values: Tensor, image_size: tuple[int, int]) -> Tensor | None:
    """Return the content sizes (B, 2) of images that all had one size, or None if they were not padded."""
    if tuple(image_size) == tuple(pixel_values.shape[-2:]):
        return None
    return torch.tensor([image_size], device=pixel_values.device).repeat(len(pixel_values), 1)


def check_pixel_values(pixel_values: Tensor, num_channels: int = 3) -> None:
    """Check the images that are given to a model, except in traced and compiled graphs.

    Args:
        pixel_values: (B, num_channels, H, W) images.
        num_channels: Number of channels that the backbone expects.

    Raises:
        ValueError: If the images are not a floating-point tensor of this shape with at least one image and one pixel.
    """
    if is_tracing(pixel_values):
        return
    shape = f"(B, {num_channels}, H, W)"
    check_tensor("pixel_values", pixel_values, shape)
    if pixel_values.shape[1] != num_channels or 0 in pixel_values.shape:
        raise ValueError(
            f"`pixel_values` must have the shape {shape} with at least one image and one pixel, got "
            f"{tuple(pixel_values.shape)}."
        )


def rectangles(sizes: Tensor, height: int, width: int) -> Tensor:
    """Return masks (B, height, width) that are True in upper left rectangles of the given sizes (B, 2)."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None]


def pad_to_stride(
    pixel_values: Tensor, pixel_mask: Tensor | None, mask_labels: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | None]:
    """Pad images and masks with zeros at the right and the bottom to multiples of the coarsest stride.

    Args:
        pixel_values: (B, 3, H, W) images.
        pixel_mask: (B, H, W) mask, 1 inside the image and 0 in the padding, or None.
        mask_labels: Masks (N, H, W) of the segments of each image, or None.

    Returns:
        The padded images, pixel mask and masks of segments.

    Raises:
        ValueError: If the pixel mask or the masks of a sample are not tensors, or have another size than the images.
    """
    height, width = pixel_values.shape[-2:]
    if mask_labels is not None and not isinstance(mask_labels, Sequence | Tensor):
        raise ValueError(f"`mask_labels` must be a list of tensors (N, H, W), got a {type(mask_labels).__name__}.")
    for sample, masks in enumerate(() if mask_labels is None else mask_labels):
        if not is_tracing(masks):
            check_tensor(f"mask_labels[{sample}]", masks, "(N, H, W)", "numbers")
        if masks.shape[-2:] != (height, width):
            raise ValueError(
                f"Sample {sample}: `mask_labels` are {tuple(masks.shape[-2:])}, but `pixel_values` are "
                f"{(height, width)} (height, width): resize and pad masks as the images."
            )
    expected = (len(pixel_values), height, width)
    if pixel_mask is not None and not isinstance(pixel_mask, Tensor) and not is_tracing(pixel_mask):
        raise ValueError(f"`pixel_mask` must be a tensor {expected}, got a {type(pixel_mask).__name__}.")
    if pixel_mask is not None and tuple(pixel_mask.shape) != expected:
        raise ValueError(f"`pixel_mask` must have shape {expected}, as the images, got {tuple(pixel_mask.shape)}.")
    padding = (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)
    if any(padding):
        pixel_values = F.pad(pixel_values, padding)
        pixel_mask = None if pixel_mask is None else F.pad(pixel_mask, padding)
        mask_labels = None if mask_labels is None else [F.pad(masks, padding) for masks in mask_labels]
    return pixel_values, pixel_mask, mask_labels


def run_by_padded_size(run: Callable[[Tensor], Output], pixel_values: Tensor, content_sizes: Tensor) -> Output:
    """Run a model once for each padded size, so that no result depends on the other images of the batch.

    Args:
        run: Function from images (b, 3, h, w) of one padded size to an output whose `masks_queries_logits` are
            (b, Q, h/4, w/4), whose other tensors have images as their first axis, and whose `stages` are such outputs.
        pixel_values: (B, 3, H, W) images, padded to the coarsest stride.
        content_sizes: (B, 2) height and width of each image in pixels.

    Returns:
        The output for all images in their order, with mask logits (B, Q, H/4, W/4).

    Raises:
        ValueError: If an image is empty, or if the output has hidden states or attentions and the padded sizes differ.
    """
    if is_tracing(pixel_values):
        return run(only_of_one_size(pixel_values, content_sizes))
    return run_by_size(run, pixel_values, [tuple(map(round_up, size)) for size in content_sizes.tolist()])


def run_by_size(run: Callable[[Tensor], Output], pixel_values: Tensor, sizes: Sequence[tuple[int, int]]) -> Output:
    """Run a model once for each size of images, on the upper left corner of the input that has this size.

    Args:
        run: As in `run_by_padded_size`, for images (b, 3, h, w) of one of the sizes.
        pixel_values: As in `run_by_padded_size`.
        sizes: (height, width) of each of the B images in pixels.

    Returns:
        As `run_by_padded_size`.

    Raises:
        ValueError: As in `run_by_padded_size`.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        if 0 in size:
            raise ValueError(f"`pixel_mask` of image {index} is empty: every image must have at least one pixel.")
        groups.setdefault(size, []).append(index)
    if list(groups) == [tuple(pixel_values.shape[-2:])]:
        return run(pixel_values)
    parts = [run(pixel_values[indices, :, :height, :width]) for (height, width), indices in groups.items()]
    if len(parts) > 1 and any(name.endswith(("hidden_states", "attentions")) for name in parts[0]):
        raise ValueError(
            f"Images of the padded sizes {', '.join(map(str, groups))} have hidden states and attentions of "
            "different shapes: request them for images of one size at a time."
        )
    order = torch.tensor([index for indices in groups.values() for index in indices], device=pixel_values.device)
    grid = tuple(length // BACKBONE_STRIDES[0] for length in pixel_values.shape[-2:])
    return _merge(parts, order.argsort(), grid)


def _merge(parts: Sequence[Output], order: Tensor, grid: tuple[int, int]) -> Output:
    """Concatenate the outputs of all padded sizes, in the order of the images, with masks of one size."""
    merged = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "stages":
            merged[name] = tuple(_merge(stages, order, grid) for stages in zip(*values, strict=True))
        elif isinstance(values[0], Tensor):
            if name == "masks_queries_logits":
                values = [extend_masks(masks, grid) for masks in values]
            merged[name] = torch.cat(values)[order]
        else:  # hidden states or attentions, which only a single part can have
            merged[name] = tuple(torch.cat(states)[order] for states in zip(*values, strict=True))
    return type(parts[0])(**merged)


def only_of_one_size(pixel_values: Tensor, content_sizes: Tensor) -> Tensor:
    """Check inside a graph that the padded input has the padded size of every image.

    A graph cannot group images by size, and the results of images of different sizes in one batch would depend on the
    other images. Graphs of torch.compile and torch.export raise an error for such images when they run. Graphs of
    torch.jit.trace, and exports of them, cannot raise errors and return NaN for the images of other sizes.

    Args:
        pixel_values: (B, 3, H, W) images, padded to the coarsest stride.
        content_sizes: (B, 2) height and width of each image in pixels.

    Returns:
        The images, NaN where an image has another padded size in a graph of torch.jit.trace.
    """
    height, width = pixel_values.shape[-2:]
    padded = -(-content_sizes // SIZE_DIVISOR) * SIZE_DIVISOR
    fits = (padded[:, 0] == height) & (padded[:, 1] == width)
    if torch.jit.is_tracing():
        return torch.where(fits[:, None, None, None], pixel_values, math.nan)
    torch._assert_async(
        fits.all(),
        "The images of one call have different padded sizes, which a compiled or exported model cannot separate: "
        "give it images of one size at a time, or compile the image path alone (model.optimize_for_inference()).",
    )
    return pixel_values


def extend_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad masks (B, Q, h, w) to a larger size with their border values, so that resampling does not change inside."""
    height, width = masks.shape[-2:]
    return F.pad(masks, (0, size[1] - width, 0, size[0] - height), mode="replicate")


def hide_padding(masks: Tensor, content_sizes: Tensor) -> Tensor:
    """Set mask logits (B, Q, H/4, W/4) to -30 outside of the padded size of each image, given content sizes (B, 2)."""
    inside = rectangles(-(-content_sizes // SIZE_DIVISOR) * CELLS_PER_DIVISOR, *masks.shape[-2:])
    return masks.masked_fill(~inside[:, None], EMPTY_MASK_LOGIT)


__all__ = [
    "check_pixel_values",
    "content_sizes_of",
    "full_content_sizes",
    "hide_padding",
    "pad_to_stride",
    "rectangles",
    "round_up",
    "run_by_padded_size",
    "run_by_size",
]
