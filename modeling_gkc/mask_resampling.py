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
from collections.abc import Iterator

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


__all__ = ["MaskResampler", "Size", "resize_masks", "rows_per_tile"]
