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
"""
Mask logits to the pixels of an image, a few rows at a time.

Letters: Q queries, h x w the grid of the mask logits, H x W the target pixels. All sizes are (height, width).
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .argument_checks import Size, check_size, shown
from .configuration_gkc import BACKBONE_STRIDES

MASK_STRIDE = BACKBONE_STRIDES[0]
TILE_BYTES = 32 * 2**20


def rows_per_tile(width: int, planes: int) -> int:
    """Rows of so many pixels with `planes` fp32 numbers each that fill 32 MiB; at least one."""
    return max(1, TILE_BYTES // (4 * width * planes))


class MaskResampler:
    """
    Bilinear resampling of mask logits to the pixels of an image, any rows at a time.

    The two axes are resampled apart, the columns of the few grid rows that a tile needs and then, by a matrix with two
    weights per row, the rows. For content that fills the whole input the result is that of
    `F.interpolate(mode="bilinear", align_corners=False, antialias=False)`, for less work. It is always computed in
    fp32, under autocast too, and without gradients.

    Args:
        mask_logits: (Q, h, w); cell (i, j) covers the input pixels 4 i .. 4 i + 3, 4 j .. 4 j + 3.
        content_size: Pixels of the input that show the image, from the top left; None means all of them.
        target_size: Pixels H, W to resample the content to; None keeps the grid and only cuts the padding off.

    Raises:
        ValueError: the logits are no tensor (Q, h, w) of floating point; a size is no pair of whole numbers of at
            least 1; the content is larger than the grid; the target has more than 2^31 - 1 pixels.
    """

    resamples_results = False

    def __init__(self, mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None):
        if not isinstance(mask_logits, Tensor) or not mask_logits.is_floating_point() or mask_logits.ndim != 3:
            raise ValueError(
                f"`mask_logits` must be a tensor (Q, h, w) of floating-point numbers, got {shown(mask_logits)}."
            )
        content_size = None if content_size is None else check_size("content_size", content_size)
        target_size = None if target_size is None else check_size("target_size", target_size)
        grid = tuple(mask_logits.shape[-2:])
        content = tuple(MASK_STRIDE * side for side in grid) if content_size is None else content_size
        cut = tuple(math.ceil(side / MASK_STRIDE) for side in content)
        if not all(0 < side <= limit for side, limit in zip(cut, grid, strict=True)):
            raise ValueError(f"content of {content} pixels does not fit masks of {grid} cells of 4 x 4 pixels.")
        self.device = mask_logits.device
        self.num_masks = len(mask_logits)
        self._mask_logits = mask_logits.detach()[:, : cut[0], : cut[1]]
        self._queries: Tensor | None = None
        self.size = cut if target_size is None else target_size
        self._keeps_grid = target_size is None
        self._width_in_cells = content[1] / MASK_STRIDE
        if not self._keeps_grid:
            weights = _interpolation_matrix(content[0] / MASK_STRIDE, cut[0], self.size[0])
            self._row_weights = weights.to(mask_logits.device)
            self._nearest_row = weights.argmax(dim=1).tolist()

    def rows(self, start: int, stop: int) -> Tensor:
        """Mask logits (Q, stop - start, W) of the target's rows `start` .. `stop - 1`, in fp32."""
        if self._keeps_grid:
            return self._band(start, stop)
        first = max(self._nearest_row[start] - 1, 0)
        last = self._nearest_row[stop - 1] + 2
        with torch.autocast(self.device.type, enabled=False):
            band = self._resample_columns(self._band(first, last))
            return self._row_weights[start:stop, first:last] @ band

    def _band(self, start: int, stop: int) -> Tensor:
        """Rows of the grid; masks are chosen only here, since all that are chosen would be a copy of the logits."""
        band = self._mask_logits[:, start:stop]
        return (band if self._queries is None else band[self._queries]).float()

    def _resample_columns(self, band: Tensor) -> Tensor:
        extent, cells, width = self._width_in_cells, band.shape[-1], self.size[1]
        if extent == cells:
            return F.interpolate(band, size=width, mode="linear")
        if width == cells:  # interpolate would return its input, whatever the scale
            return band @ _interpolation_matrix(extent, cells, width).to(band.device).T
        # The content ends inside the last cell: its scale, not that of whole cells, decides where pixels lie.
        resampled = F.interpolate(band, scale_factor=width / extent, mode="linear", recompute_scale_factor=False)
        return resampled[..., :width]

    def select(self, queries: Tensor) -> "MaskResampler":
        """The same for the masks of these queries only, (N,) numbers."""
        part = copy.copy(self)
        part.num_masks = len(queries)
        part._queries = queries if self._queries is None else self._queries[queries]
        return part

    def map_tiles(self, function: Callable[[Tensor], Tensor], planes: int) -> Iterator[tuple[slice, Tensor]]:
        """
        Apply a function of each pixel's mask logits.

        Args:
            function: Mask logits (Q, rows, W) -> results (N, rows, W).
            planes: As for `tiles`.

        Yields:
            The rows of the target and their results (N, rows, W).
        """
        for rows, logits in self.tiles(planes):
            yield rows, function(logits)

    def tiles(self, planes: int) -> Iterator[tuple[slice, Tensor]]:
        """
        Walk over all rows in order.

        Args:
            planes: fp32 numbers per pixel that the caller holds at once; sets the height of the tiles.

        Yields:
            The rows of the target and their mask logits (Q, rows, W).
        """
        height, width = self.size
        step = rows_per_tile(width, planes)
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(start, stop), self.rows(start, stop)


class TwoStepMaskResampler(MaskResampler):
    """
    Resampling of mask logits by way of the model's input: to the pixels of the padded input, of which those of the
    content are resampled to the target.

    Mask2Former and FC-CLIP do so. Results differ from those of `MaskResampler` near outlines, and at the right and
    lower end of the content, where the cells of the padding take part. Both steps are linear, so that one matrix for
    each axis does both, with the same bounds of memory.

    Args:
        mask_logits, content_size, target_size: As for `MaskResampler`, with the same errors; without a target the two
            do the same.
    """

    def __init__(self, mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None):
        super().__init__(mask_logits, content_size, target_size)
        if self._keeps_grid:
            return
        self._mask_logits = mask_logits.detach()
        grid = mask_logits.shape[-2:]
        content = [MASK_STRIDE * cells for cells in grid] if content_size is None else content_size
        rows, columns = map(_two_step_matrix, grid, content, self.size)
        self._row_weights, self._column_weights = rows.to(self.device), columns.T.to(self.device)
        is_used = rows != 0
        self._first_row = is_used.int().argmax(dim=1).tolist()
        self._row_end = (grid[0] - is_used.flip(1).int().argmax(dim=1)).tolist()

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute the mask logits (Q, stop - start, W) of the target's rows `start` .. `stop - 1`, in fp32."""
        if self._keeps_grid:
            return self._band(start, stop)
        first, last = self._first_row[start], self._row_end[stop - 1]
        with torch.autocast(self.device.type, enabled=False):
            return self._row_weights[start:stop, first:last] @ (self._band(first, last) @ self._column_weights)


class ResultResampler(TwoStepMaskResampler):
    """
    As `TwoStepMaskResampler`, but `map_tiles` applies its function at the pixels of the input and resamples what it
    gives to the target, as Mask2Former and FC-CLIP do where they compute semantic maps only.

    Args:
        mask_logits, content_size, target_size: As for `MaskResampler`, with the same errors.
    """

    resamples_results = True

    def __init__(self, mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None):
        super().__init__(mask_logits, content_size, target_size)
        if content_size is None:
            content_size = tuple(MASK_STRIDE * cells for cells in mask_logits.shape[-2:])
        self._at_input = TwoStepMaskResampler(mask_logits, content_size, content_size)

    def map_tiles(self, function: Callable[[Tensor], Tensor], planes: int) -> Iterator[tuple[slice, Tensor]]:
        """Apply a function at the pixels of the input, and resample its results; see `MaskResampler.map_tiles`."""
        if self._keeps_grid:
            yield from super().map_tiles(function, planes)
            return
        (content_height, content_width), (height, width) = self._at_input.size, self.size
        row_weights = _interpolation_matrix(content_height, content_height, height).to(self.device)
        column_weights = _interpolation_matrix(content_width, content_width, width).T.to(self.device)
        # A tile of the target needs as many more rows of the input as that is larger.
        step = rows_per_tile(max(width, content_width), planes * max(1, math.ceil(content_height / height)))
        for start in range(0, height, step):
            stop = min(start + step, height)
            used = row_weights[start:stop].any(dim=0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            with torch.autocast(self.device.type, enabled=False):
                results = function(self._at_input.rows(first, last)) @ column_weights
                yield slice(start, stop), row_weights[start:stop, first:last] @ results


# Masks are resampled once, or by way of the input; or scores of semantic maps are computed at the input's pixels, and
# resampled themselves.
MASK_RESAMPLINGS = ("direct", "two_step", "two_step_scores")


def make_resampler(
    mask_logits: Tensor,
    content_size: Size | None,
    target_size: Size | None,
    resampling: str = "direct",
    for_scores: bool = False,
) -> MaskResampler:
    """
    Make the resampler that a name of `MASK_RESAMPLINGS` means.

    Args:
        mask_logits, content_size, target_size: As for `MaskResampler`.
        resampling: `direct`, `two_step` or `two_step_scores`.
        for_scores: Whether scores of semantic maps are computed, for which alone `two_step_scores` differs from
            `two_step`.

    Raises:
        ValueError: There is no such resampling; or as for `MaskResampler`.
    """
    if resampling not in MASK_RESAMPLINGS:
        raise ValueError(f"`resampling` must be one of {', '.join(MASK_RESAMPLINGS)}, got {shown(resampling)}.")
    if resampling == "direct":
        resampler_class = MaskResampler
    else:
        resampler_class = ResultResampler if for_scores and resampling == "two_step_scores" else TwoStepMaskResampler
    return resampler_class(mask_logits, content_size, target_size)


def _two_step_matrix(cells: int, content: int, target: int) -> Tensor:
    """Weights (target, cells) from cells to input pixels, of which the first `content` are spread over the target."""
    to_input = _interpolation_matrix(cells, cells, MASK_STRIDE * cells)
    return _interpolation_matrix(content, content, target) @ to_input[:content]


def _interpolation_matrix(extent: float, source: int, target: int) -> Tensor:
    """Weights (target, source) that spread the first `extent` of `source` cells over `target` pixels, half-centred."""
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * (extent / target) - 0.5
    distance = (centre.clamp(0, source - 1)[:, None] - torch.arange(source)).abs()
    return (1 - distance).clamp(min=0).float()


def resize_masks(mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None) -> Tensor:
    """
    Mask logits (Q, H, W) at full size, in fp32 and without gradients; arguments and errors as for `MaskResampler`.

    The result holds Q x H x W numbers, which the functions of `post_processing` avoid.
    """
    resampler = MaskResampler(mask_logits, content_size, target_size)
    return resampler.rows(0, resampler.size[0])


__all__ = [
    "MASK_RESAMPLINGS",
    "MaskResampler",
    "ResultResampler",
    "Size",
    "TwoStepMaskResampler",
    "make_resampler",
    "resize_masks",
    "rows_per_tile",
]
