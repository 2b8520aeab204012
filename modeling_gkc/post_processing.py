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
Logits to results: semantic, instance and panoptic segmentation at any size, and COCO run-length encoding.

Letters: B images, Q queries, K classes (class K of the logits is "no object"), h x w the grid of the mask logits,
H x W the target pixels, N segments. All sizes are (height, width).

Masks are resampled once, straight from the grid to the target pixels of the true image content, before the sigmoid.
The work goes in row tiles, so that memory is bounded by the result and never reaches Q x H x W or K x H x W.

Void pixels: in a semantic map `void_label(K)`, which is 255, or 65535 where 255 is a class; in instance and panoptic
maps 0, since segment ids count from 1.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_gkc import BACKBONE_STRIDES

MASK_STRIDE = BACKBONE_STRIDES[0]
TILE_BYTES = 32 * 2**20
VOID_SEGMENT = 0

Size = tuple[int, int]


def void_label(num_classes: int) -> int:
    """Value of a void pixel in a semantic map: 255, or 65535 when 255 is one of the classes."""
    return 255 if num_classes <= 255 else 65535


class MaskResampler:
    """
    Bilinear resampling of mask logits to the pixels of an image, any rows at a time.

    The two axes are resampled apart, the columns of the few grid rows that a tile needs and then, by a matrix with two
    weights per row, the rows. For content that fills the whole input the result is that of
    `F.interpolate(mode="bilinear", align_corners=False, antialias=False)`, for less work.

    Args:
        mask_logits: (Q, h, w); cell (i, j) covers the input pixels 4 i .. 4 i + 3, 4 j .. 4 j + 3.
        content_size: Pixels of the input that show the image, from the top left; None means all of them.
        target_size: Pixels H, W to resample the content to; None keeps the grid and only cuts the padding off.

    Raises:
        ValueError: the content is empty or larger than the grid, or the target is empty.
    """

    def __init__(self, mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None):
        grid = tuple(mask_logits.shape[-2:])
        content = tuple(MASK_STRIDE * side for side in grid) if content_size is None else content_size
        cut = tuple(math.ceil(side / MASK_STRIDE) for side in content)
        if not all(0 < side <= limit for side, limit in zip(cut, grid, strict=True)):
            raise ValueError(f"content of {content} pixels does not fit masks of {grid} cells of 4 x 4 pixels.")
        if target_size is not None and min(target_size) < 1:
            raise ValueError(f"target sizes (height, width) must be at least 1 x 1, got {target_size}.")
        self.mask_logits = mask_logits[:, : cut[0], : cut[1]]
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
            return self.mask_logits[:, start:stop].float()
        first = max(self._nearest_row[start] - 1, 0)
        last = self._nearest_row[stop - 1] + 2
        band = self._resample_columns(self.mask_logits[:, first:last].float())
        return self._row_weights[start:stop, first:last] @ band

    def _resample_columns(self, band: Tensor) -> Tensor:
        extent, cells, width = self._width_in_cells, band.shape[-1], self.size[1]
        if extent == cells:
            return F.interpolate(band, size=width, mode="linear")
        if width == cells:  # interpolate would return its input, whatever the scale
            return band @ _interpolation_matrix(extent, cells, width).to(band.device).T
        # The content ends inside the last cell: its scale, not that of whole cells, decides where pixels lie.
        resampled = F.interpolate(band, scale_factor=width / extent, mode="linear", recompute_scale_factor=False)
        return resampled[..., :width]

    def tiles(self, planes: int) -> Iterator[tuple[slice, Tensor]]:
        """
        Walk over all rows in order.

        Args:
            planes: fp32 numbers per pixel that the caller holds at once; sets the height of the tiles to 32 MiB.

        Yields:
            The rows of the target and their mask logits (Q, rows, W).
        """
        height, width = self.size
        step = max(1, TILE_BYTES // (4 * width * planes))
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
    Mask logits (Q, H, W) at full size, in fp32; arguments and errors as for `MaskResampler`.

    The result holds Q x H x W numbers, which the segmentation functions below avoid.
    """
    resampler = MaskResampler(mask_logits, content_size, target_size)
    return resampler.rows(0, resampler.size[0])


def semantic_scores(
    class_logits: Tensor, mask_logits: Tensor, content_size: Size | None = None, target_size: Size | None = None
) -> Tensor:
    """
    Score of every class at every pixel: the sum over queries of softmax(class logits)_k * sigmoid(mask logits).

    Source: Cheng et al., *Per-Pixel Classification is Not All You Need for Semantic Segmentation* (2021), section 3.4.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.

    Returns:
        (K, H, W) fp32 between 0 and Q; K x H x W numbers, which `semantic_segmentation` avoids.
    """
    resampler = MaskResampler(mask_logits, content_size, target_size)
    scores = mask_logits.new_empty(class_logits.shape[1] - 1, *resampler.size, dtype=torch.float32)
    for rows, tile in _semantic_tiles(resampler, class_logits):
        scores[:, rows] = tile
    return scores


def semantic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    void_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Best class of every pixel by `semantic_scores`, of which only one row tile exists at a time.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        void_threshold: Pixels whose best score is below become void; None keeps all.

    Returns:
        Class map (H, W) int64 with void as `void_label(K)`, and the best scores (H, W) fp32.
    """
    resampler = MaskResampler(mask_logits, content_size, target_size)
    labels = mask_logits.new_empty(resampler.size, dtype=torch.int64)
    scores = mask_logits.new_empty(resampler.size, dtype=torch.float32)
    for rows, tile in _semantic_tiles(resampler, class_logits):
        scores[rows], labels[rows] = tile.max(dim=0)
    if void_threshold is not None:
        labels[scores < void_threshold] = void_label(class_logits.shape[1] - 1)
    return labels, scores


def _semantic_tiles(resampler: MaskResampler, class_logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the target and their class scores (K, rows, W)."""
    class_scores = class_logits.float().softmax(dim=-1)[:, :-1]
    num_queries, num_classes = class_scores.shape
    for rows, logits in resampler.tiles(planes=2 * num_queries + num_classes):
        yield rows, torch.einsum("qk,qhw->khw", class_scores, logits.sigmoid())


def panoptic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] = (),
) -> dict[str, Any]:
    """
    Cut an image into segments that do not overlap.

    Queries whose best class is a real one with a score above `threshold` compete for every pixel with class score *
    sigmoid(mask). A segment shows where it wins and its own mask is at least `mask_threshold`. It is dropped when it
    shows nowhere, or when it wins fewer pixels than `overlap_mask_area_threshold` times the area of its own mask, an
    area that does not depend on the class score.

    Source: Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation* (2022), and MaskFormer.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        threshold: Lowest class score, exclusive.
        mask_threshold: Lowest mask probability of a pixel inside.
        overlap_mask_area_threshold: Lowest share of a mask that has to win.
        label_ids_to_fuse: Stuff classes; all segments of such a class become one.

    Returns:
        `segmentation` (H, W) int32 with 0 as void, and `segments_info`, a list of `id` (1, 2, .. N without gaps),
        `label_id`, `was_fused` (the class is in `label_ids_to_fuse`) and `score` (class score; of fused segments the
        highest).
    """
    scores, labels = class_logits.float().softmax(dim=-1).max(dim=-1)
    kept = (labels < class_logits.shape[1] - 1) & (scores > threshold)
    scores, labels = scores[kept], labels[kept]
    resampler = MaskResampler(mask_logits[kept], content_size, target_size)
    winner, won, shown, area = _compete(resampler, scores, mask_threshold)
    valid = (shown > 0) & (won >= overlap_mask_area_threshold * area)

    segment_ids = torch.zeros(len(scores) + 1, dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
    labels, scores = labels.tolist(), scores.tolist()
    for index in valid.nonzero().flatten().tolist():
        label, score = labels[index], scores[index]
        if label in fused:
            segment = fused[label]
            segment["score"] = max(segment["score"], score)
        else:
            was_fused = label in label_ids_to_fuse
            segment = {"id": len(segments) + 1, "label_id": label, "was_fused": was_fused, "score": score}
            segments.append(segment)
            if was_fused:
                fused[label] = segment
        segment_ids[index + 1] = segment["id"]
    return {"segmentation": segment_ids.to(winner.device)[winner], "segments_info": segments}


def _compete(resampler: MaskResampler, scores: Tensor, mask_threshold: float) -> tuple[Tensor, ...]:
    """
    Let N masks compete for every pixel.

    Returns:
        The winner that shows at each pixel (H, W), counted from 1, 0 where none does; and for each mask (N,) the
        numbers of pixels that it wins, where it shows, and of its own area.
    """
    count = len(scores)
    winner = torch.zeros(resampler.size, dtype=torch.int64, device=scores.device)
    won, shown, area = torch.zeros(3, count, dtype=torch.int64, device=scores.device)
    for rows, logits in resampler.tiles(planes=3 * count + 4) if count else ():
        masks = logits.sigmoid()
        best = (scores[:, None, None] * masks).max(dim=0).indices
        shows = masks.gather(0, best[None])[0] >= mask_threshold
        won += torch.bincount(best.flatten(), minlength=count)
        shown += torch.bincount(best[shows], minlength=count)
        area += (masks >= mask_threshold).count_nonzero(dim=(1, 2))
        winner[rows] = torch.where(shows, best + 1, 0)
    return winner, won.cpu(), shown.cpu(), area.cpu().double()


def instance_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.0,
    top_k: int = 100,
    return_binary_maps: bool = False,
    return_coco_annotation: bool = False,
) -> dict[str, Any]:
    """
    Find single objects, each with a score of its own.

    The `top_k` best pairs of query and class are taken, so one query may appear under several classes. The score of a
    pair is its class score times the mean mask probability inside its mask; empty masks are dropped.

    Source: Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation* (2022).

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        threshold: Lowest score.
        mask_threshold: A pixel is inside where the mask probability is above.
        overlap_mask_area_threshold: In the map, a segment that shows less than this share of its mask is dropped.
        top_k: Pairs of query and class to consider.
        return_binary_maps: Give the whole masks, which may overlap, instead of a map.
        return_coco_annotation: Give the whole masks in COCO's run-length encoding instead of a map.

    Returns:
        `segments_info`, best score first: `id` (1, 2, .. N), `label_id`, `was_fused` (False) and `score`; and
        `segmentation`: a map (H, W) int32 where the best segment covers the others and 0 is void (segments that show
        nowhere are left out), or N masks (N, H, W) bool, or a list of N encodings; masks are in the order of the ids.

    Raises:
        ValueError: both `return_binary_maps` and `return_coco_annotation` are asked for.
    """
    if return_binary_maps and return_coco_annotation:
        raise ValueError("choose one of `return_binary_maps` and `return_coco_annotation`.")
    queries, labels, scores = _rank_instances(
        class_logits, mask_logits, content_size, target_size, threshold, mask_threshold, top_k
    )
    resampler = MaskResampler(mask_logits[queries], content_size, target_size)
    if return_binary_maps or return_coco_annotation:
        masks = _binary_masks(resampler, mask_threshold)
        segmentation = [encode_rle(mask) for mask in masks] if return_coco_annotation else masks
    else:
        segmentation, kept = _paint(resampler, mask_threshold, overlap_mask_area_threshold)
        labels, scores = labels[kept], scores[kept]
    segments = [
        {"id": index + 1, "label_id": label, "was_fused": False, "score": score}
        for index, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True))
    ]
    return {"segmentation": segmentation, "segments_info": segments}


def _rank_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None,
    target_size: Size | None,
    threshold: float,
    mask_threshold: float,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, classes and scores (N,) of the instances, best first."""
    class_scores = class_logits.float().softmax(dim=-1)[:, :-1]
    class_scores, pairs = class_scores.flatten().topk(min(top_k, class_scores.numel()))
    possible = class_scores >= threshold
    class_scores, pairs = class_scores[possible], pairs[possible]
    queries, labels = pairs // (class_logits.shape[1] - 1), pairs % (class_logits.shape[1] - 1)

    asked, position = queries.unique(return_inverse=True)
    quality = _mask_quality(MaskResampler(mask_logits[asked], content_size, target_size), mask_threshold)[position]
    scores = class_scores * quality
    kept = (quality > 0) & (scores >= threshold)
    scores, order = scores[kept].sort(descending=True, stable=True)
    return queries[kept][order], labels[kept][order], scores


def _mask_quality(resampler: MaskResampler, mask_threshold: float) -> Tensor:
    """Mean probability (Q,) inside each mask, 0 for an empty one."""
    count = len(resampler.mask_logits)
    total, area = torch.zeros(2, count, device=resampler.mask_logits.device)
    for _, logits in resampler.tiles(planes=3 * count + 1):
        inside = F.threshold(logits.sigmoid(), mask_threshold, 0.0)
        total += inside.sum(dim=(1, 2))
        area += inside.count_nonzero(dim=(1, 2))
    return total / area.clamp(min=1)


def _binary_masks(resampler: MaskResampler, mask_threshold: float) -> Tensor:
    count = len(resampler.mask_logits)
    masks = torch.zeros(count, *resampler.size, dtype=torch.bool, device=resampler.mask_logits.device)
    for rows, logits in resampler.tiles(planes=2 * count + 1):
        masks[:, rows] = logits.sigmoid() > mask_threshold
    return masks


def _paint(resampler: MaskResampler, mask_threshold: float, overlap_threshold: float) -> tuple[Tensor, Tensor]:
    """Map (H, W) of ids from 1 where earlier masks cover later ones, and which masks (N,) are in it."""
    count = len(resampler.mask_logits)
    device = resampler.mask_logits.device
    owner = torch.zeros(resampler.size, dtype=torch.int64, device=device)
    area = torch.zeros(count, dtype=torch.int64, device=device)
    precedence = torch.arange(count, 0, -1, dtype=torch.int32, device=device)[:, None, None]
    for rows, logits in resampler.tiles(planes=3 * count + 1):
        inside = logits.sigmoid() > mask_threshold
        area += inside.count_nonzero(dim=(1, 2))
        if count:
            front = (inside * precedence).amax(dim=0)
            owner[rows] = torch.where(front > 0, count + 1 - front, 0)
    shown = torch.bincount(owner.flatten(), minlength=count + 1)[1:]
    kept = (shown > 0) & (shown.cpu() >= overlap_threshold * area.cpu().double()).to(device)
    ids = torch.cat([kept.new_zeros(1), kept]).int()
    return (ids.cumsum(0, dtype=torch.int32) * ids)[owner], kept


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """
    COCO's compressed run-length encoding of one mask.

    Runs go down the columns and start with zeros. From the fourth on, a run is given as its difference from the run
    two before. A number is a string of 5-bit groups, lowest first, in characters from code 48, bit 5 meaning "more".

    Args:
        mask: (H, W), true inside.

    Returns:
        `size` [H, W] and `counts`, a string, as `pycocotools.mask.encode` gives it.
    """
    mask = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask).astype(bool)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0] if flat.size and flat[0] else [], [0], edges, [flat.size]]).astype(np.int64)
    runs = np.diff(starts)
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]

    rests = [numbers]
    while (rests[-1] >> 4 != rests[-1] >> 5).any():
        rests.append(rests[-1] >> 5)
    rest = np.stack(rests, axis=1)
    has_more = rest >> 4 != rest >> 5
    written = np.cumprod(np.pad(has_more[:, :-1], ((0, 0), (1, 0)), constant_values=True), axis=1).astype(bool)
    codes = (rest & 31) + 32 * has_more + 48
    return {"size": list(mask.shape), "counts": codes[written].astype(np.uint8).tobytes().decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Mask (H, W) bool of an encoding by `encode_rle` or pycocotools."""
    counts = rle["counts"]
    codes = counts.encode("ascii") if isinstance(counts, str) else counts
    runs: list[int] = []
    number = shift = 0
    for code in codes:
        group = code - 48
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(rle["size"], order="F")


class PostProcessingMixin:
    """`post_process_*` of the image processor and the processor, with the argument names of transformers."""

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Size] | Tensor | None = None,
        void_threshold: float | None = None,
    ) -> list[Tensor]:
        """
        Best class of every pixel, see `semantic_segmentation`.

        Args:
            outputs: Output of the model: `class_queries_logits` (B, Q, K + 1), `masks_queries_logits` (B, Q, h, w) and
                `content_sizes` (B, 2).
            target_sizes: For each image the (height, width) to return; None returns the masks' resolution.
            void_threshold: Pixels whose best score is below become void.

        Returns:
            B class maps (H, W) int64; void is 255, or 65535 with more than 255 classes.
        """
        return [
            semantic_segmentation(**image, void_threshold=void_threshold)[0]
            for image in _split_batch(outputs, target_sizes)
        ]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Size] | Tensor | None = None,
        threshold: float = 0.5,
        top_k: int = 100,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.0,
        return_binary_maps: bool = False,
        return_coco_annotation: bool = False,
    ) -> list[dict[str, Any]]:
        """
        Single objects of every image; arguments and results as for `instance_segmentation`.

        Args:
            outputs: As for `post_process_semantic_segmentation`.
            target_sizes: As for `post_process_semantic_segmentation`.
            threshold: Lowest score.
            top_k: Pairs of query and class to consider.
            mask_threshold: A pixel is inside where the mask probability is above.
            overlap_mask_area_threshold: In the map, a segment that shows less than this share of its mask is dropped.
            return_binary_maps: Give whole masks (N, H, W) instead of a map.
            return_coco_annotation: Give whole masks in COCO's run-length encoding instead of a map.

        Returns:
            B dicts of `segmentation` and `segments_info`.
        """
        return [
            instance_segmentation(
                **image,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                top_k=top_k,
                return_binary_maps=return_binary_maps,
                return_coco_annotation=return_coco_annotation,
            )
            for image in _split_batch(outputs, target_sizes)
        ]

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Size] | Tensor | None = None,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] | None = None,
    ) -> list[dict[str, Any]]:
        """
        Segments of every image that do not overlap; arguments and results as for `panoptic_segmentation`.

        Args:
            outputs: As for `post_process_semantic_segmentation`.
            target_sizes: As for `post_process_semantic_segmentation`.
            threshold: Lowest class score, exclusive.
            mask_threshold: Lowest mask probability of a pixel inside.
            overlap_mask_area_threshold: Lowest share of a mask that has to win against the others.
            label_ids_to_fuse: Stuff classes, whose segments become one; none by default.

        Returns:
            B dicts of `segmentation`, (H, W) int32 with 0 as void, and `segments_info`.
        """
        return [
            panoptic_segmentation(
                **image,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                label_ids_to_fuse=label_ids_to_fuse or (),
            )
            for image in _split_batch(outputs, target_sizes)
        ]


def _split_batch(outputs: Any, target_sizes: Sequence[Size] | Tensor | None) -> Iterator[dict[str, Any]]:
    """Logits, content size and target size of one image after the other."""
    class_logits = _field(outputs, "class_queries_logits")
    mask_logits = _field(outputs, "masks_queries_logits")
    if class_logits is None or mask_logits is None:
        raise ValueError("the outputs need `class_queries_logits` and `masks_queries_logits`, as the model's have.")
    batch = len(class_logits)
    contents = _sizes(_field(outputs, "content_sizes"), batch, "content_sizes")
    targets = _sizes(target_sizes, batch, "target_sizes")
    for image in range(batch):
        yield {
            "class_logits": class_logits[image].detach(),
            "mask_logits": mask_logits[image].detach(),
            "content_size": contents[image],
            "target_size": targets[image],
        }


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _sizes(sizes: Sequence[Size] | Tensor | None, batch: int, name: str) -> list[Size | None]:
    if sizes is None:
        return [None] * batch
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
    if len(sizes) != batch:
        raise ValueError(f"`{name}` must give one (height, width) per image: got {len(sizes)} for {batch} images.")
    return [None if size is None else (int(size[0]), int(size[1])) for size in sizes]


__all__ = [
    "MaskResampler",
    "PostProcessingMixin",
    "decode_rle",
    "encode_rle",
    "instance_segmentation",
    "panoptic_segmentation",
    "resize_masks",
    "semantic_scores",
    "semantic_segmentation",
    "void_label",
]
