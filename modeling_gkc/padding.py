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
"""Images of several sizes in one batch: padding, where the images are in it, and masks of several sizes.

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
    """The next multiple of the coarsest stride."""
    return math.ceil(length / SIZE_DIVISOR) * SIZE_DIVISOR


def content_sizes_of(pixel_mask: Tensor) -> Tensor:
    """
    Read where the images are in their padded inputs.

    Args:
        pixel_mask: (B, H, W), 1 where there is image.

    Returns:
        (B, 2) height and width of each image.

    Raises:
        ValueError: If a mask is no rectangle at the upper left; this is not checked in a graph.
    """
    mask = pixel_mask.bool()
    sizes = torch.stack([mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)], dim=1)
    if not is_tracing(mask) and not torch.equal(mask, rectangles(sizes, *mask.shape[1:])):
        raise ValueError("`pixel_mask` must be 1 on a rectangle at the upper left of each input, and 0 elsewhere.")
    return sizes


def full_content_sizes(pixel_values: Tensor, image_size: tuple[int, int]) -> Tensor | None:
    """(B, 2) sizes of images that were all padded from one size to `pixel_values`; None if they were not padded."""
    if tuple(image_size) == tuple(pixel_values.shape[-2:]):
        return None
    return torch.tensor([image_size], device=pixel_values.device).repeat(len(pixel_values), 1)


def check_pixel_values(pixel_values: Tensor, num_channels: int = 3) -> None:
    """Check the images of a model; in a graph nothing is checked.

    Args:
        pixel_values: (B, num_channels, H, W).
        num_channels: Channels that the backbone takes.

    Raises:
        ValueError: If they are no floating-point tensor of this shape with at least one image and pixel.
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
    """(B, height, width), true in the upper left rectangles of (B, 2) sizes."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None]


def pad_to_stride(
    pixel_values: Tensor, pixel_mask: Tensor | None, mask_labels: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | None]:
    """
    Pad images and masks with zeros, right and below, to multiples of the coarsest stride.

    Args:
        pixel_values: (B, 3, H, W).
        pixel_mask: (B, H, W) or None.
        mask_labels: For each image (N, H, W), or None.

    Returns:
        The same, padded.

    Raises:
        ValueError: If the pixel mask or, naming the sample, masks are no tensor or have another size than the images.
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
    """
    Run a model once per padded size, so that no image sees padding that is there for its neighbors.

    Args:
        run: Images (b, 3, h, w) of one padded size -> output with (b, Q, h/4, w/4) `masks_queries_logits` and other
            tensors whose first axis are images; its `stages` are such outputs.
        pixel_values: (B, 3, H, W), padded to the coarsest stride.
        content_sizes: (B, 2) height and width of each image.

    Returns:
        Output for all images, in their order, with masks of (H/4, W/4).

    Raises:
        ValueError: If an image is empty, or sizes differ and hidden states or attentions are in the output.
    """
    if is_tracing(pixel_values):
        return run(only_of_one_size(pixel_values, content_sizes))
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(content_sizes.tolist()):
        if not (height and width):
            raise ValueError(f"`pixel_mask` of image {index} is empty: every image needs a pixel.")
        groups.setdefault((round_up(height), round_up(width)), []).append(index)
    if list(groups) == [tuple(pixel_values.shape[-2:])]:
        return run(pixel_values)
    parts = [run(pixel_values[indices, :, :height, :width]) for (height, width), indices in groups.items()]
    if len(parts) > 1 and any(name.endswith(("hidden_states", "attentions")) for name in parts[0]):
        raise ValueError(
            f"Images of the padded sizes {', '.join(map(str, groups))} have hidden states and attentions of "
            "different shapes: ask for them with images of one size at a time."
        )
    order = torch.tensor([index for indices in groups.values() for index in indices], device=pixel_values.device)
    grid = tuple(length // BACKBONE_STRIDES[0] for length in pixel_values.shape[-2:])
    return _merge(parts, order.argsort(), grid)


def _merge(parts: Sequence[Output], order: Tensor, grid: tuple[int, int]) -> Output:
    """Put outputs for images of different sizes together, in the images' order, on one grid of masks."""
    merged = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "stages":
            merged[name] = tuple(_merge(stages, order, grid) for stages in zip(*values, strict=True))
        elif isinstance(values[0], Tensor):
            if name == "masks_queries_logits":
                values = [extend_masks(masks, grid) for masks in values]
            merged[name] = torch.cat(values)[order]
        else:  # of one part
            merged[name] = tuple(torch.cat(states)[order] for states in zip(*values, strict=True))
    return type(parts[0])(**merged)


def only_of_one_size(pixel_values: Tensor, content_sizes: Tensor) -> Tensor:
    """The images for a graph, which computes all of them at their common size, if that is the padded size of each.

    A graph cannot compute images of different sizes apart, and together an image's result would depend on its
    neighbours. Graphs of torch.compile and torch.export refuse such images when they run; those of torch.jit.trace,
    and what is made of them, cannot, and give them NaN.

    Args:
        pixel_values: (B, 3, H, W), padded to the coarsest stride.
        content_sizes: (B, 2) height and width of each image.
    """
    height, width = pixel_values.shape[-2:]
    padded = -(-content_sizes // SIZE_DIVISOR) * SIZE_DIVISOR
    fits = (padded[:, 0] == height) & (padded[:, 1] == width)
    if torch.jit.is_tracing():
        return torch.where(fits[:, None, None, None], pixel_values, math.nan)
    torch._assert_async(
        fits.all(),
        "The images of one call have different padded sizes, which a compiled or exported model cannot compute apart: "
        "give it images of one size at a time, or compile the image path alone (model.optimize_for_inference()).",
    )
    return pixel_values


def extend_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Continues (B, Q, h, w) masks by their border values to a larger size; resampling inside never sees the seam."""
    height, width = masks.shape[-2:]
    return F.pad(masks, (0, size[1] - width, 0, size[0] - height), mode="replicate")


def hide_padding(masks: Tensor, content_sizes: Tensor) -> Tensor:
    """Empties (B, Q, H/4, W/4) masks in the padding that only larger neighbours (B, 2) need."""
    seen = rectangles(-(-content_sizes // SIZE_DIVISOR) * CELLS_PER_DIVISOR, *masks.shape[-2:])
    return masks.masked_fill(~seen[:, None], EMPTY_MASK_LOGIT)


__all__ = [
    "check_pixel_values",
    "content_sizes_of",
    "full_content_sizes",
    "hide_padding",
    "pad_to_stride",
    "rectangles",
    "round_up",
    "run_by_padded_size",
]
