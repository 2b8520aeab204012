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
"""Resampling of mask logits to the pixels of an image, tile by tile.

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
    """Return the number of rows of a tile, so that `planes` fp32 values per pixel take at most 32 MiB; at least 1."""
    return max(1, TILE_BYTES // (4 * width * planes))


class MaskResampler:
    """Bilinear resampler of mask logits to the pixels of an image, which computes any range of rows.

    The axes are resampled separately: first the columns of the grid rows that a tile needs, then the rows by a matrix
    with two weights per row. For an image that fills the whole input the result equals that of
    `F.interpolate(mode="bilinear", align_corners=False, antialias=False)`, at a lower cost. It is always computed in
    fp32, also under autocast, and without gradients.

    Args:
        mask_logits: (Q, h, w) logits; cell (i, j) covers the input pixels 4 i .. 4 i + 3, 4 j .. 4 j + 3.
        content_size: Size of the image within the padded input, at the top left. Default: the whole input.
        target_size: Size (H, W) to resample the image to. Default: the grid of the logits, without the padding.

    Raises:
        ValueError: If the logits are not a floating-point tensor (Q, h, w), a size is not a pair of integers of at
            least 1, the content is larger than the grid, or the target has more than 2^31 - 1 pixels.
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
            raise ValueError(
                f"`content_size` {content} must fit into the {grid} cells of 4 x 4 pixels of `mask_logits`."
            )
        self.device = mask_logits.device
        self.num_masks = len(mask_logits)
        self._mask_logits = mask_logits.detach()[:, : cut[0], : cut[1]]
        self._queries: Tensor | None = None
        self.size = cut if target_size is None else target_size
        self._keeps_grid = target_size is None
        self._width_in_cells = content[1] / MASK_STRIDE
        if not self._keeps_grid:
            self._make_weights(mask_logits, content)

    def _make_weights(self, mask_logits: Tensor, content: Size) -> None:
        """Make the weights of the rows of the target, for whole `mask_logits` (Q, h, w) with this content size."""
        weights = _interpolation_matrix(content[0] / MASK_STRIDE, self._mask_logits.shape[1], self.size[0])
        self._row_weights = weights.to(self.device)
        self._nearest_row = weights.argmax(dim=1).tolist()

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute the mask logits (Q, stop - start, W) of the target's rows `start` .. `stop - 1` in fp32."""
        if self._keeps_grid:
            return self._band(start, stop)
        first = max(self._nearest_row[start] - 1, 0)
        last = self._nearest_row[stop - 1] + 2
        with torch.autocast(self.device.type, enabled=False):
            band = self._resample_columns(self._band(first, last))
            return self._row_weights[start:stop, first:last] @ band

    def _band(self, start: int, stop: int) -> Tensor:
        """Return rows of the grid; queries are selected here, because selecting all rows would copy the logits."""
        band = self._mask_logits[:, start:stop]
        return (band if self._queries is None else band[self._queries]).float()

    def _resample_columns(self, band: Tensor) -> Tensor:
        """Resample rows of the grid (Q, rows, w) to the width of the target (Q, rows, W)."""
        extent, cells, width = self._width_in_cells, band.shape[-1], self.size[1]
        if extent == cells:
            return F.interpolate(band, size=width, mode="linear")
        if width == cells:  # interpolate would ignore the scale and return its input
            return band @ _interpolation_matrix(extent, cells, width).to(band.device).T
        # The content ends within the last cell, so that its own scale, not that of whole cells, must be used.
        resampled = F.interpolate(band, scale_factor=width / extent, mode="linear", recompute_scale_factor=False)
        return resampled[..., :width]

    def select(self, queries: Tensor) -> "MaskResampler":
        """Return a resampler of the masks of the given queries, (N,) indices."""
        part = copy.copy(self)
        part.num_masks = len(queries)
        part._queries = queries if self._queries is None else self._queries[queries]
        return part

    def map_tiles(self, function: Callable[[Tensor], Tensor], planes: int) -> Iterator[tuple[slice, Tensor]]:
        """Apply a pixelwise function to the mask logits, tile by tile.

        Args:
            function: Function from mask logits (Q, rows, W) to results (N, rows, W).
            planes: As in `tiles`.

        Yields:
            The rows of the target as a slice, and their results (N, rows, W).
        """
        for rows, logits in self.tiles(planes):
            yield rows, function(logits)

    def tiles(self, planes: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows in order, tile by tile.

        Args:
            planes: Number of fp32 values per pixel that the caller keeps in memory, which limits the tile height.

        Yields:
            The rows of the target as a slice, and their mask logits (Q, rows, W).
        """
        height, width = self.size
        step = rows_per_tile(width, planes)
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(start, stop), self.rows(start, stop)


class TwoStepMaskResampler(MaskResampler):
    """Resampler of mask logits in two steps: to the pixels of the padded input, and from its content to the target.

    This is the resampling of Mask2Former (Cheng et al., CVPR 2022) and FC-CLIP (Yu et al., NeurIPS 2023). Its results
    differ from those of `MaskResampler` near outlines, and at the right and lower borders of the content, where cells
    of the padding contribute. Both steps are linear, so that one matrix per axis combines them, with the same memory.

    Args:
        mask_logits, content_size, target_size: As in `MaskResampler`, with the same errors. Without a target size both
            resamplers are equal.
    """

    def _make_weights(self, mask_logits: Tensor, content: Size) -> None:
        """Make the weights of the rows and columns of the target, including cells of the padding."""
        self._mask_logits = mask_logits.detach()
        grid = mask_logits.shape[-2:]
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
    """Two-step resampler whose `map_tiles` computes results at the pixels of the input and resamples the results.

    Mask2Former and FC-CLIP resample the scores of semantic segmentation in this way.

    Args:
        mask_logits, content_size, target_size: As in `MaskResampler`, with the same errors.
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
        # The number of input rows that a tile of the target needs grows with the ratio of their heights.
        step = rows_per_tile(max(width, content_width), planes * max(1, math.ceil(content_height / height)))
        for start in range(0, height, step):
            stop = min(start + step, height)
            used = row_weights[start:stop].any(dim=0).nonzero()
            first, last = int(used[0]), int(used[-1]) + 1
            with torch.autocast(self.device.type, enabled=False):
                results = function(self._at_input.rows(first, last)) @ column_weights
                yield slice(start, stop), row_weights[start:stop, first:last] @ results


# Masks are resampled directly to the target, or in two steps through the pixels of the input; or the scores of
# semantic segmentation are computed at the pixels of the input and resampled instead of the masks.
MASK_RESAMPLINGS = ("direct", "two_step", "two_step_scores")


def make_resampler(
    mask_logits: Tensor,
    content_size: Size | None,
    target_size: Size | None,
    resampling: str = "direct",
    for_scores: bool = False,
) -> MaskResampler:
    """Create a resampler of mask logits by the name of its method.

    Args:
        mask_logits: As in `MaskResampler`.
        content_size: As in `MaskResampler`.
        target_size: As in `MaskResampler`.
        resampling: `direct`, `two_step` or `two_step_scores`.
        for_scores: Whether scores of semantic segmentation are computed; otherwise `two_step_scores` equals
            `two_step`.

    Returns:
        The resampler.

    Raises:
        ValueError: If the resampling is unknown, or as in `MaskResampler`.
    """
    if resampling not in MASK_RESAMPLINGS:
        raise ValueError(f"`resampling` must be one of {', '.join(MASK_RESAMPLINGS)}, got {shown(resampling)}.")
    if resampling == "direct":
        resampler_class = MaskResampler
    else:
        resampler_class = ResultResampler if for_scores and resampling == "two_step_scores" else TwoStepMaskResampler
    return resampler_class(mask_logits, content_size, target_size)


def _two_step_matrix(cells: int, content: int, target: int) -> Tensor:
    """Return weights (target, cells) of resampling to input pixels, of which the first `content` span the target."""
    to_input = _interpolation_matrix(cells, cells, MASK_STRIDE * cells)[:content]
    return to_input if content == target else _interpolation_matrix(content, content, target) @ to_input


def _interpolation_matrix(extent: float, source: int, target: int) -> Tensor:
    """Return weights (target, source) that interpolate the first `extent` of `source` cells at `target` pixels.

    Pixel centers are at half-integer positions, as with `align_corners=False`.
    """
    center = (torch.arange(target, dtype=torch.float64) + 0.5) * (extent / target) - 0.5
    distance = (center.clamp(0, source - 1)[:, None] - torch.arange(source)).abs()
    return (1 - distance).clamp(min=0).float()


def resize_masks(mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None) -> Tensor:
    """Resample mask logits in one step, in fp32 and without gradients.

    Post-processing resamples tile by tile instead, since the result has Q x H x W values.

    Args:
        mask_logits: As in `MaskResampler`.
        content_size: As in `MaskResampler`.
        target_size: As in `MaskResampler`.

    Returns:
        (Q, H, W) mask logits.

    Raises:
        ValueError: As in `MaskResampler`.
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
