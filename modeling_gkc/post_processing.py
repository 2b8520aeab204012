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
Logits to results: semantic, instance and panoptic segmentation at any size.

Letters: B images, Q queries, K classes (class K of the logits is "no object"), h x w the grid of the mask logits,
H x W the target pixels, N segments. All sizes are (height, width).

Masks are resampled once, straight from the grid to the target pixels of the true image content, before the sigmoid.
(`resampling` gives the two ways of Mask2Former, by which published numbers were measured: see `MASK_RESAMPLINGS`.)
The work goes in row tiles, so that memory is bounded by the result and never reaches Q x H x W or K x H x W.

"None of these": pixels become void whose shown score is below `void_threshold`, and those which a class of
`void_label_ids` wins. Such classes compete for pixels as all others do, but are never shown. The shown score of a
pixel is its class score in a semantic map, and class score times mask probability at the pixel elsewhere. Void pixels
have the value `void_id`, which is never a class or a segment: by default `void_label(K)` in a semantic map (255, or
65535 where 255 is a class), 0 in a panoptic and -1 in an instance map; segment ids count from 1.

All is computed in fp32, under autocast too, and without gradients. Logits must be finite, but a class logit may be
-inf, which rules a class out.
"""

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .argument_checks import (
    check_flags,
    check_fractions,
    check_label_ids,
    check_logits,
    check_number,
    check_whole_number,
    pair,
    shown,
)
from .mask_resampling import MaskResampler, Size, make_resampler, resize_masks, rows_per_tile
from .run_length import decode_rle, encode_rle

MASKS_PER_PASS = 8
VOID_LABELS = (255, 65535, 2**31 - 1)
FEW_CLASSES = 64
LEADING_CLASSES = 8
PIXELS_PER_PART = 4096
BOUND_SLACK = 1e-4  # far above the rounding of a sum over queries
PANOPTIC_VOID = 0
INSTANCE_VOID = -1


@dataclass(frozen=True)
class Thresholds:
    """
    Thresholds of a result, and which pixels become void, as the functions of this module pass them on.

    The fields have the meanings that the arguments of these names have in `panoptic_segmentation` and
    `instance_segmentation`; of a semantic result those of void alone count.
    """

    threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_mask_area_threshold: float = 0.0
    void_threshold: float | None = None
    void_label_ids: Collection[int] = ()
    void_id: int | None = None

    def check_fractions(self) -> "Thresholds":
        """
        Check the thresholds of segments, and convert numbers of numpy and torch.

        Raises:
            ValueError: a threshold is not between 0 and 1.
        """
        names = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "void_threshold")
        values = check_fractions(**{name: getattr(self, name) for name in names})
        return dataclasses.replace(self, **dict(zip(names, values, strict=True)))

    def void_classes(self, num_classes: int) -> Tensor:
        """
        Mark the classes whose pixels become void: (K,) bool.

        Raises:
            ValueError: `void_label_ids` holds what is no class.
        """
        is_void = torch.zeros(num_classes, dtype=torch.bool)
        is_void[list(check_label_ids("void_label_ids", self.void_label_ids, num_classes))] = True
        return is_void


def void_label(num_classes: int) -> int:
    """
    Value of a void pixel in a semantic map: 255, or where that is a class 65535, or where that is one 2^31 - 1.

    Raises:
        ValueError: `num_classes` is no whole number in 0..2^31 - 1.
    """
    check_whole_number("num_classes", num_classes, 0, VOID_LABELS[-1])
    return next(value for value in VOID_LABELS if value >= num_classes)


def _semantic_void_id(void_id: int | None, is_void: Tensor) -> int:
    """The checked value of void pixels, given which classes (K,) are never shown."""
    shown = (~is_void).nonzero().flatten().tolist()
    if void_id is None:
        return void_label(shown[-1] + 1 if shown else 0)
    void_id = check_whole_number("void_id", void_id)
    if not -(2**63) <= void_id < 2**63:
        raise ValueError(f"`void_id` {void_id} does not fit into the map's 64-bit integers: choose a smaller number.")
    if void_id in shown:
        raise ValueError(
            f"`void_id` {void_id} is a class: choose a number that is none, such as {void_label(len(is_void))}."
        )
    return void_id


def _segment_void_id(void_id: int, most_segments: int) -> int:
    """The checked value of void pixels in a map of at most so many segments, in int32."""
    void_id = check_whole_number("void_id", void_id)
    if not (-(2**31) <= void_id < 1 or most_segments < void_id < 2**31):
        raise ValueError(
            f"`void_id` {void_id} may be the id of a segment, which count from 1 to at most {most_segments}: choose "
            "0, a negative number or a larger one, of 32 bits."
        )
    return void_id


def _prepare(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None,
    target_size: Size | None,
    resampling: str = "direct",
    for_scores: bool = False,
) -> tuple[Tensor, MaskResampler]:
    """The checked class logits (Q, K + 1) in fp32 and masks of one image, both without gradients."""
    check_logits(class_logits, mask_logits)
    class_logits = class_logits.detach().float()
    # The best logit of a query is NaN or infinite if one is NaN or +inf, or if all are -inf.
    for name, numbers in (("class", class_logits.amax(dim=-1)), ("mask", mask_logits)):
        if not numbers.isfinite().all():
            raise ValueError(
                f"the {name} logits hold NaN or infinity, as fp16 gives where numbers overflow: run the model in "
                "bf16 or fp32, for instance with `dtype=torch.float32`."
            )
    return class_logits, make_resampler(mask_logits, content_size, target_size, resampling, for_scores)


def semantic_scores(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    resampling: str = "direct",
) -> Tensor:
    """
    Score of every class at every pixel: the sum over queries of softmax(class logits)_k * sigmoid(mask logits).

    Source: Cheng et al., *Per-Pixel Classification is Not All You Need for Semantic Segmentation* (2021), section 3.4.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        resampling: As for `make_resampler`.

    Returns:
        (K, H, W) fp32 between 0 and Q; K x H x W numbers, which `semantic_segmentation` avoids.

    Raises:
        ValueError: logits are not finite, or a size is impossible.
    """
    class_logits, resampler = _prepare(
        class_logits, mask_logits, content_size, target_size, resampling, for_scores=True
    )
    return _all_scores(resampler, class_logits)


def _all_scores(resampler: MaskResampler, class_logits: Tensor) -> Tensor:
    """Scores (K, H, W) of all classes, computed a row tile at a time."""
    scores = class_logits.new_empty(class_logits.shape[1] - 1, *resampler.size)
    for rows, tile in _semantic_tiles(resampler, class_logits):
        scores[:, rows] = tile
    return scores


def semantic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    void_threshold: float | None = None,
    void_label_ids: Collection[int] = (),
    void_id: int | None = None,
    resampling: str = "direct",
) -> tuple[Tensor, Tensor]:
    """
    Best class of every pixel by `semantic_scores`, of which only one row tile exists at a time.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        void_threshold: Pixels whose best score, between 0 and Q, is below become void; None keeps all.
        void_label_ids: Classes whose pixels become void.
        void_id: Value of void pixels, no class that is shown; None means `void_label` of the classes that are shown.
        resampling: As for `make_resampler`.

    Returns:
        Class map (H, W) int64, and the best scores (H, W) fp32, at void pixels too.

    Raises:
        ValueError: `void_label_ids` holds what is no class, `void_id` is a class or no whole number, logits are not
            finite, or a size is impossible.
    """
    class_logits, resampler = _prepare(
        class_logits, mask_logits, content_size, target_size, resampling, for_scores=True
    )
    void = Thresholds(void_threshold=void_threshold, void_label_ids=void_label_ids, void_id=void_id)
    scores = mask_logits.new_empty(resampler.size, dtype=torch.float32)
    return _best_classes(resampler, class_logits, void, scores), scores


def semantic_segments(class_map: Tensor, scores: Tensor, num_classes: int) -> list[dict[str, Any]]:
    """
    The classes that a result of `semantic_segmentation` shows, as segments.

    Args:
        class_map: (H, W) classes and void.
        scores: (H, W) scores of the classes shown.
        num_classes: Classes that may be shown, the first ones; all other values of the map, negative ones too, are
            void. With void classes after the others leave those out, or count them: they have no pixel.

    Returns:
        For each class that has a pixel `id` and `label_id`, both the class, and `score`, the mean over its pixels of
        their scores, each at most 1: where several queries answer for one pixel, their sum exceeds it.

    Raises:
        ValueError: the map holds no integers, the scores are not finite or of another shape, or `num_classes` is no
            whole number of at least 1.
    """
    _check_semantic_map(class_map, scores, num_classes)
    # On the CPU: MPS has no fp64, and CUDA no deterministic sums per class.
    labels, scores = class_map.flatten().cpu(), scores.detach().flatten().clamp(max=1).cpu()
    is_class = (labels >= 0) & (labels < num_classes)
    labels = labels[is_class]
    areas = labels.bincount(minlength=num_classes).tolist()
    totals = labels.bincount(scores[is_class].double(), minlength=num_classes).tolist()
    return [
        {"id": index, "label_id": index, "score": total / area}
        for index, (area, total) in enumerate(zip(areas, totals, strict=True))
        if area
    ]


def _check_semantic_map(class_map: Tensor, scores: Tensor, num_classes: int) -> None:
    check_whole_number("num_classes", num_classes, 1)
    is_map = isinstance(class_map, Tensor) and class_map.ndim == 2
    if not is_map or class_map.is_floating_point() or class_map.is_complex() or class_map.dtype == torch.bool:
        raise ValueError(f"`class_map` must be a tensor (H, W) of integers, got {shown(class_map)}.")
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != class_map.shape:
        raise ValueError(
            f"`scores` must be a tensor {tuple(class_map.shape)} of floating-point numbers, as the map, got "
            f"{shown(scores)}."
        )
    if not scores.isfinite().all():
        raise ValueError("`scores` must be finite, but some are NaN or infinite.")


def _best_classes(
    resampler: MaskResampler, class_logits: Tensor, void: Thresholds, scores: Tensor | None = None
) -> Tensor:
    """Class map (H, W) of `semantic_segmentation`; the best scores are written into `scores` (H, W), if given."""
    is_void = void.void_classes(class_logits.shape[1] - 1)
    void_id, void_threshold = _semantic_void_id(void.void_id, is_void), void.void_threshold
    if void_threshold is not None:
        meaning = ", the number of queries: a score is a sum over queries"
        void_threshold = check_number("void_threshold", void_threshold, 0, len(class_logits), meaning)
    is_void = is_void.to(class_logits.device)
    labels = torch.empty(resampler.size, dtype=torch.int64, device=class_logits.device)
    for rows, best, winners in _winners(resampler, class_logits):
        becomes_void = is_void[winners]
        if void_threshold is not None:
            becomes_void |= best < void_threshold
        labels[rows] = winners.masked_fill_(becomes_void, void_id)
        if scores is not None:
            scores[rows] = best
    return labels


def _class_scores(class_logits: Tensor) -> Tensor:
    """(Q, K) probabilities of the classes."""
    return class_logits.softmax(dim=-1)[:, :-1]


def _semantic_tiles(resampler: MaskResampler, class_logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the target and their class scores (K, rows, W)."""
    class_scores = _class_scores(class_logits)
    num_queries, num_classes = class_scores.shape
    yield from resampler.map_tiles(
        lambda logits: _weighted_sums(class_scores, logits.sigmoid()), planes=2 * num_queries + num_classes
    )


def _weighted_sums(class_scores: Tensor, masks: Tensor) -> Tensor:
    """Sums (K, ...) of masks (Q, ...) weighted with the class scores (Q, K)."""
    with torch.autocast(masks.device.type, enabled=False):
        return (class_scores.T @ masks.flatten(1)).view(-1, *masks.shape[1:])


def _winners(resampler: MaskResampler, class_logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the target, the best class score of their pixels and which class has it, both (rows, W).

    Of many classes few can win anywhere in a small part of an image: on a CPU the others are left out. Elsewhere
    finding them takes longer than computing them all.
    """
    class_scores = _class_scores(class_logits)
    computes_all = class_scores.device.type != "cpu" or class_scores.shape[1] <= FEW_CLASSES
    if computes_all or resampler.resamples_results:
        for rows, scores in _semantic_tiles(resampler, class_logits):
            yield rows, *scores.max(dim=0)
        return
    for rows, logits in resampler.tiles(planes=2 * len(class_scores)):
        parts = logits.sigmoid().split(max(1, PIXELS_PER_PART // logits.shape[1]), dim=2)
        best, winners = zip(*(_part_winners(class_scores, part) for part in parts), strict=True)
        yield rows, torch.cat(best, dim=1), torch.cat(winners, dim=1)


def _part_winners(class_scores: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Best of the class scores (Q, K) under masks (Q, rows, columns), and which class it is, (rows, columns).

    No pixel has more of a class than a pixel would have where every mask is at its highest. A class whose score is
    even there less than what some class has at every pixel wins nowhere.
    """
    shape, masks = masks.shape[1:], masks.flatten(1)
    bounds = class_scores.T @ masks.amax(dim=1)  # (K,)
    candidates = bounds.topk(LEADING_CLASSES).indices.sort().values
    scores = _weighted_sums(class_scores[:, candidates], masks)
    could_win = bounds >= scores.amax(dim=0).min() * (1 - BOUND_SLACK)
    if could_win.sum() > LEADING_CLASSES:
        candidates = could_win.nonzero().flatten()
        scores = _weighted_sums(class_scores[:, candidates], masks)
    best = scores.amax(dim=0)
    # Several times faster than `max`, which is not vectorised; of equals both take the first.
    winners = torch.where(scores == best, torch.arange(len(scores), dtype=torch.float32)[:, None], torch.inf).amin(
        dim=0
    )
    return best.view(shape), candidates[winners.long()].view(shape)


def panoptic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] = (),
    void_threshold: float | None = None,
    void_label_ids: Collection[int] = (),
    void_id: int | None = None,
    return_binary_maps: bool = False,
    resampling: str = "direct",
) -> dict[str, Any]:
    """
    Cut an image into segments that do not overlap.

    Queries whose best class is a real one with a score above `threshold` compete for every pixel with class score *
    sigmoid(mask), which is the score of the pixel they win. A segment shows where it wins, its own mask is at least
    `mask_threshold` and the pixel's score at least `void_threshold`. It is dropped when it shows nowhere, or when it
    wins fewer pixels than `overlap_mask_area_threshold` times the area of its own mask; neither that area nor the
    pixels won depend on `void_threshold`, nor the area on the class score. Queries of void classes compete as all
    others, but are no segments.

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
        void_threshold: Lowest score of a pixel, between 0 and 1; None keeps all.
        void_label_ids: Classes whose pixels become void.
        void_id: Value of void pixels, below 1 or above Q; None means 0.
        return_binary_maps: Give a mask for each segment instead of a map.
        resampling: As for `make_resampler`.

    Returns:
        `segmentation`, a map (H, W) int32 or N masks (N, H, W) bool in the order of the ids, and `segments_info`, a
        list of `id` (1, 2, .. N without gaps), `label_id`, `was_fused` (the class is in `label_ids_to_fuse`) and
        `score` (class score; of fused segments the highest).

    Raises:
        ValueError: `void_label_ids` or `label_ids_to_fuse` holds what is no class, `void_id` may be a segment, logits
            are not finite, or a size is impossible.
    """
    thresholds = Thresholds(
        threshold, mask_threshold, overlap_mask_area_threshold, void_threshold, void_label_ids, void_id
    ).check_fractions()
    check_flags(return_binary_maps=return_binary_maps)
    class_logits, resampler = _prepare(class_logits, mask_logits, content_size, target_size, resampling)
    num_queries, num_classes = class_logits.shape[0], class_logits.shape[1] - 1
    void_id = _segment_void_id(PANOPTIC_VOID if void_id is None else void_id, num_queries)
    is_void = thresholds.void_classes(num_classes)
    label_ids_to_fuse = check_label_ids("label_ids_to_fuse", label_ids_to_fuse, num_classes)
    scores, labels = class_logits.softmax(dim=-1).max(dim=-1)
    kept = (labels < num_classes) & (scores > thresholds.threshold)
    scores, labels = scores[kept], labels[kept].cpu()
    resampler = resampler.select(kept.nonzero().flatten())
    owner, won, shown, area = _compete(resampler, scores, thresholds)
    valid = (shown > 0) & (won >= thresholds.overlap_mask_area_threshold * area) & ~is_void[labels]
    ids, segments = _number_segments(valid, labels.tolist(), scores.tolist(), label_ids_to_fuse)
    ids = torch.cat([ids.new_zeros(1), ids])
    segmentation = _relabel(owner, ids.where(ids > 0, void_id))
    if return_binary_maps:
        masks = segmentation.new_zeros((len(segments), *segmentation.shape), dtype=torch.bool)
        for mask, segment in zip(masks, segments, strict=True):
            torch.eq(segmentation, segment["id"], out=mask)
        segmentation = masks
    return {"segmentation": segmentation, "segments_info": segments}


def _number_segments(
    valid: Tensor, labels: list[int], scores: list[float], label_ids_to_fuse: Collection[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The id (N,) int32 of each mask, 0 of those that are not `valid`, and the segments that the ids mean."""
    ids = torch.zeros(len(valid), dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
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
        ids[index] = segment["id"]
    return ids, segments


def _compete(resampler: MaskResampler, scores: Tensor, thresholds: Thresholds) -> tuple[Tensor, ...]:
    """
    Let N masks compete for every pixel.

    Returns:
        The mask that shows at each pixel (H, W) int32, counted from 1, 0 where none does; and for each mask (N,) the
        numbers of pixels that it wins, where it shows, and of its own area.
    """
    count, mask_threshold = len(scores), thresholds.mask_threshold
    owner = torch.zeros(resampler.size, dtype=torch.int32, device=scores.device)
    won, shown, area = torch.zeros(3, count, dtype=torch.int64, device=scores.device)
    for rows, logits in resampler.tiles(planes=3 * count + 4) if count else ():
        masks = logits.sigmoid()
        best, winner = (scores[:, None, None] * masks).max(dim=0)
        shows = masks.gather(0, winner[None])[0] >= mask_threshold
        if thresholds.void_threshold is not None:
            shows &= best >= thresholds.void_threshold
        won += torch.bincount(winner.flatten(), minlength=count)
        shown += torch.bincount(winner[shows], minlength=count)
        area += _areas(masks >= mask_threshold)
        owner[rows] = torch.where(shows, winner + 1, 0)
    return owner, won.cpu(), shown.cpu(), area.cpu().double()


def _areas(masks: Tensor) -> Tensor:
    """Pixels (N,) int32 in each of the masks (N, H, W) bool."""
    return masks.flatten(1).sum(dim=1, dtype=torch.int32)  # much faster than count_nonzero


def _relabel(owner: Tensor, ids: Tensor) -> Tensor:
    """Replaces each number n of a map (H, W) by `ids[n]`, in place, a few rows at a time."""
    ids = ids.to(owner.device, owner.dtype)
    for rows in owner.split(rows_per_tile(owner.shape[1], planes=4)):
        rows.copy_(ids[rows.long()])
    return owner


class _Pairs(NamedTuple):
    """Pairs (N,) of query and class, best score first: `class_scores`, and `scores` that weigh the masks too."""

    queries: Tensor
    labels: Tensor
    class_scores: Tensor
    scores: Tensor

    def take(self, which: Tensor) -> "_Pairs":
        return _Pairs(*(values[which] for values in self))


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
    void_threshold: float | None = None,
    void_label_ids: Collection[int] = (),
    void_id: int | None = None,
    resampling: str = "direct",
) -> dict[str, Any]:
    """
    Find single objects, each with a score of its own.

    The `top_k` best pairs of query and class are taken, so one query may appear under several classes. The score of a
    pair is its class score times the mean mask probability inside its mask; empty masks are dropped. Pairs of void
    classes are ranked with the others and take their pixels from every pair of a lower score, in whole masks as in
    the map, but are no instances. An instance left without a pixel is dropped; what is left of one keeps its score.

    Source: Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation* (2022).

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        threshold: Lowest score.
        mask_threshold: A pixel is inside where the mask probability is above.
        overlap_mask_area_threshold: In the map, a segment that covers less than this share of its mask is dropped.
            (`void_threshold` changes neither.)
        top_k: Pairs of query and class to consider.
        return_binary_maps: Give the whole masks, which may overlap, instead of a map.
        return_coco_annotation: Give the whole masks in COCO's run-length encoding instead of a map.
        void_threshold: Lowest class score * mask probability of a pixel, between 0 and 1: in the map of the segment
            that covers it, in whole masks of each by itself; None keeps all.
        void_label_ids: Classes whose pixels become void.
        void_id: Value of void pixels in the map, below 1 or above `top_k`; None means -1.
        resampling: As for `make_resampler`.

    Returns:
        `segments_info`, best score first: `id` (1, 2, .. N), `label_id`, `was_fused` (False) and `score`; and
        `segmentation`: a map (H, W) int32 where the best segment covers the others (segments that show nowhere are
        left out), or N masks (N, H, W) bool, or a list of N encodings; masks are in the order of the ids.

    Raises:
        ValueError: both `return_binary_maps` and `return_coco_annotation` are asked for, `top_k` is below 1,
            `void_label_ids` holds what is no class, `void_id` may be a segment, logits are not finite, or a size is
            impossible.
    """
    thresholds = Thresholds(
        threshold, mask_threshold, overlap_mask_area_threshold, void_threshold, void_label_ids, void_id
    ).check_fractions()
    check_flags(return_binary_maps=return_binary_maps, return_coco_annotation=return_coco_annotation)
    if return_binary_maps and return_coco_annotation:
        raise ValueError("choose one of `return_binary_maps` and `return_coco_annotation`.")
    top_k = check_whole_number("top_k", top_k, 1)
    class_logits, resampler = _prepare(class_logits, mask_logits, content_size, target_size, resampling)
    num_pairs = min(top_k, class_logits[:, :-1].numel())
    void_id = _segment_void_id(INSTANCE_VOID if void_id is None else void_id, num_pairs)
    is_void_class = thresholds.void_classes(class_logits.shape[1] - 1).to(class_logits.device)
    pairs = _rank_pairs(class_logits, resampler, thresholds, num_pairs)
    is_void = is_void_class[pairs.labels]
    if return_binary_maps:
        segmentation, kept = _whole_masks(resampler, pairs, is_void, thresholds)
    elif return_coco_annotation:
        segmentation, kept = _encoded_masks(resampler, pairs, is_void, thresholds)
    else:
        owner, kept = _paint(resampler, pairs, is_void, thresholds)
        ids = torch.cat([kept.new_zeros(1), kept]).int()
        segmentation = _relabel(owner, torch.where(ids > 0, ids.cumsum(0), void_id))
    segments = [
        {"id": index + 1, "label_id": label, "was_fused": False, "score": score}
        for index, (label, score) in enumerate(
            zip(pairs.labels[kept].tolist(), pairs.scores[kept].tolist(), strict=True)
        )
    ]
    return {"segmentation": segmentation, "segments_info": segments}


def _rank_pairs(class_logits: Tensor, resampler: MaskResampler, thresholds: Thresholds, num_pairs: int) -> _Pairs:
    """The pairs with a mask and a score of at least `threshold`, best first."""
    class_scores = class_logits.softmax(dim=-1)[:, :-1]
    class_scores, pairs = class_scores.flatten().topk(num_pairs)
    possible = class_scores >= thresholds.threshold
    class_scores, pairs = class_scores[possible], pairs[possible]
    queries, labels = pairs // (class_logits.shape[1] - 1), pairs % (class_logits.shape[1] - 1)

    asked, position = queries.unique(return_inverse=True)
    quality = _mask_quality(resampler.select(asked), thresholds.mask_threshold)[position]
    scores = class_scores * quality
    kept = (quality > 0) & (scores >= thresholds.threshold)
    ranked = _Pairs(queries, labels, class_scores, scores).take(kept)
    return ranked.take(ranked.scores.argsort(descending=True, stable=True))


def _mask_quality(resampler: MaskResampler, mask_threshold: float) -> Tensor:
    """Mean probability (Q,) inside each mask, 0 for an empty one."""
    count = resampler.num_masks
    total, area = torch.zeros(2, count, device=resampler.device)
    for _, logits in resampler.tiles(planes=3 * count + 1):
        masks = logits.sigmoid()
        area += _areas(masks > mask_threshold)
        total += F.threshold(masks, mask_threshold, 0.0).sum(dim=(1, 2))
    return total / area.clamp(min=1)


def _whole_masks(
    resampler: MaskResampler, pairs: _Pairs, is_void: Tensor, thresholds: Thresholds
) -> tuple[Tensor, Tensor]:
    """Masks (N, H, W) bool of the pairs that are left, and their numbers (N,)."""
    first_void = _first_void_pair(resampler, pairs, is_void, thresholds.mask_threshold)
    ranks = (~is_void).nonzero().flatten()
    masks = _binary_masks(resampler, pairs, ranks, first_void, thresholds)
    seen = masks.flatten(1).any(dim=1)
    return (masks if seen.all() else masks[seen]), ranks[seen]


def _encoded_masks(
    resampler: MaskResampler, pairs: _Pairs, is_void: Tensor, thresholds: Thresholds
) -> tuple[list[dict[str, Any]], Tensor]:
    """As `_whole_masks`, with encodings, of which only the masks of a few exist at a time."""
    first_void = _first_void_pair(resampler, pairs, is_void, thresholds.mask_threshold)
    encodings, seen = [], []
    for ranks in (~is_void).nonzero().flatten().split(MASKS_PER_PASS):
        masks = _binary_masks(resampler, pairs, ranks, first_void, thresholds)
        left = masks.flatten(1).any(dim=1)
        encodings += [encode_rle(mask) for mask in masks[left]]
        seen.append(ranks[left])
    return encodings, torch.cat(seen)


def _binary_masks(
    resampler: MaskResampler,
    pairs: _Pairs,
    ranks: Tensor,
    first_void: Tensor | None,
    thresholds: Thresholds,
) -> Tensor:
    """Masks (N, H, W) bool of the pairs `ranks` (N,), without their void pixels."""
    resampler, class_scores = resampler.select(pairs.queries[ranks]), pairs.class_scores[ranks]
    masks = torch.zeros(len(ranks), *resampler.size, dtype=torch.bool, device=ranks.device)
    for rows, logits in resampler.tiles(planes=3 * len(ranks) + 1):
        probabilities = logits.sigmoid()
        inside = probabilities > thresholds.mask_threshold
        if thresholds.void_threshold is not None:
            inside &= class_scores[:, None, None] * probabilities >= thresholds.void_threshold
        if first_void is not None:
            inside &= ranks[:, None, None] < first_void[rows]
        masks[:, rows] = inside
    return masks


def _first_void_pair(resampler: MaskResampler, pairs: _Pairs, is_void: Tensor, mask_threshold: float) -> Tensor | None:
    """The best pair of a void class that covers each pixel (H, W), where none does N; None without such pairs."""
    ranks, count = is_void.nonzero().flatten().int(), len(is_void)
    if not len(ranks):
        return None
    resampler = resampler.select(pairs.queries[ranks])
    first = torch.empty(resampler.size, dtype=torch.int32, device=ranks.device)
    for rows, logits in resampler.tiles(planes=3 * len(ranks) + 1):
        inside = logits.sigmoid() > mask_threshold
        first[rows] = torch.where(inside, ranks[:, None, None], count).amin(dim=0)
    return first


def _paint(resampler: MaskResampler, pairs: _Pairs, is_void: Tensor, thresholds: Thresholds) -> tuple[Tensor, Tensor]:
    """Map (H, W) int32 of pairs, from 1, where earlier ones cover later ones and 0 is none; which (N,) are kept."""
    count, device, void_threshold = len(is_void), is_void.device, thresholds.void_threshold
    owner = torch.zeros(resampler.size, dtype=torch.int32, device=device)
    area, covered, shown = torch.zeros(3, count, dtype=torch.int64, device=device)
    precedence = torch.arange(count, 0, -1, dtype=torch.int32, device=device)[:, None, None]
    for rows, logits in resampler.select(pairs.queries).tiles(planes=3 * count + 4) if count else ():
        masks = logits.sigmoid()
        inside = masks > thresholds.mask_threshold
        front = count - (inside * precedence).amax(dim=0).long()  # `count` where there is none
        shows = front < count
        area += _areas(inside)
        covered += torch.bincount(front[shows], minlength=count)
        if void_threshold is not None:
            front = front.clamp(max=count - 1)
            shows &= pairs.class_scores[front] * masks.gather(0, front[None])[0] >= void_threshold
            shown += torch.bincount(front[shows], minlength=count)
        owner[rows] = torch.where(shows, front + 1, 0)
    if void_threshold is None:
        shown = covered
    has_share = (covered.cpu() >= thresholds.overlap_mask_area_threshold * area.cpu().double()).to(device)
    return owner, (shown > 0) & has_share & ~is_void


class PostProcessingMixin:
    """`post_process_*` of the image processor and the processor, whose arguments begin with those of Mask2Former's."""

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Size] | Tensor | None = None,
        return_segmentation_scores: bool = False,
        *,
        void_threshold: float | None = None,
        void_label_ids: Collection[int] = (),
        void_id: int | None = None,
        return_scores: bool = False,
    ) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        Best class of every pixel, see `semantic_segmentation`.

        Args:
            outputs: Output of the model: `class_queries_logits` (B, Q, K + 1), `masks_queries_logits` (B, Q, h, w) and
                `content_sizes` (B, 2).
            target_sizes: For each image the (height, width) to return, such as the processor's `original_sizes`; None
                returns the masks' resolution.
            return_segmentation_scores: Give the scores of all classes too, K x H x W numbers for each image.
            void_threshold: Pixels whose best class score is below become void.
            void_label_ids: Classes that compete for pixels, but whose pixels become void.
            void_id: Value of void pixels; 255 by default, or 65535 with more than 255 classes.
            return_scores: Give the best class score of every pixel too, H x W numbers for each image.

        Returns:
            B class maps (H, W) int64; with one of the two kinds of scores B outputs of `segmentation`, the same map,
            and of those that are asked for `scores` (H, W), the best score of every pixel, at void pixels too, and
            `segmentation_scores` (K, H, W), those of `semantic_scores`. `scores` is the maximum of
            `segmentation_scores` over the classes, to rounding, but never needs memory for more than one row tile of
            them.

        Warns:
            UserWarning: a target is the transpose of its image.
        """
        check_flags(return_segmentation_scores=return_segmentation_scores, return_scores=return_scores)
        void = Thresholds(void_threshold=void_threshold, void_label_ids=void_label_ids, void_id=void_id)
        results = []
        for image in self._images(outputs, target_sizes):
            class_logits, resampler = _prepare(*image, self._resampling, for_scores=True)
            scores = class_logits.new_empty(resampler.size) if return_scores else None
            data = {"segmentation": _best_classes(resampler, class_logits, void, scores)}
            if return_scores:
                data["scores"] = scores
            if return_segmentation_scores:
                data["segmentation_scores"] = _all_scores(resampler, class_logits)
            has_scores = return_scores or return_segmentation_scores
            results.append(SemanticSegmentationPostProcessorOutput(data=data) if has_scores else data["segmentation"])
        return results

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.0,
        target_sizes: Sequence[Size] | Tensor | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        *,
        top_k: int = 100,
        void_threshold: float | None = None,
        void_label_ids: Collection[int] = (),
        void_id: int | None = None,
    ) -> list[dict[str, Any]]:
        """
        Single objects of every image; arguments and results as for `instance_segmentation`.

        Args:
            outputs: As for `post_process_semantic_segmentation`.
            threshold: Lowest score.
            mask_threshold: A pixel is inside where the mask probability is above.
            overlap_mask_area_threshold: In the map, a segment that covers less than this share of its mask is dropped.
            target_sizes: As for `post_process_semantic_segmentation`.
            return_coco_annotation: Give whole masks in COCO's run-length encoding instead of a map.
            return_binary_maps: Give whole masks (N, H, W) instead of a map.
            top_k: Pairs of query and class to consider.
            void_threshold: Pixels where class score * mask probability is below become void.
            void_label_ids: Classes that compete for pixels, but whose pixels become void.
            void_id: Value of void pixels in the map; -1 by default. (Ids count from 1.)

        Returns:
            B dicts of `segmentation` and `segments_info`.

        Warns:
            UserWarning: a target is the transpose of its image.
        """
        return [
            instance_segmentation(
                *image,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                top_k=top_k,
                return_binary_maps=return_binary_maps,
                return_coco_annotation=return_coco_annotation,
                void_threshold=void_threshold,
                void_label_ids=void_label_ids,
                void_id=void_id,
                resampling=self._resampling,
            )
            for image in self._images(outputs, target_sizes)
        ]

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: Sequence[Size] | Tensor | None = None,
        *,
        return_binary_maps: bool = False,
        void_threshold: float | None = None,
        void_label_ids: Collection[int] = (),
        void_id: int | None = None,
    ) -> list[dict[str, Any]]:
        """
        Segments of every image that do not overlap; arguments and results as for `panoptic_segmentation`.

        Args:
            outputs: As for `post_process_semantic_segmentation`.
            threshold: Lowest class score, exclusive.
            mask_threshold: Lowest mask probability of a pixel inside.
            overlap_mask_area_threshold: Lowest share of a mask that has to win against the others.
            label_ids_to_fuse: Stuff classes, whose segments become one; none by default.
            target_sizes: As for `post_process_semantic_segmentation`.
            return_binary_maps: Give a mask (N, H, W) for each segment instead of a map.
            void_threshold: Pixels where class score * mask probability is below become void.
            void_label_ids: Classes that compete for pixels, but whose pixels become void.
            void_id: Value of void pixels; 0 by default. (Ids count from 1.)

        Returns:
            B dicts of `segmentation`, (H, W) int32 or masks (N, H, W) bool, and `segments_info`.

        Warns:
            UserWarning: a target is the transpose of its image.
        """
        return [
            panoptic_segmentation(
                *image,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                label_ids_to_fuse=() if label_ids_to_fuse is None else label_ids_to_fuse,
                void_threshold=void_threshold,
                void_label_ids=void_label_ids,
                void_id=void_id,
                return_binary_maps=return_binary_maps,
                resampling=self._resampling,
            )
            for image in self._images(outputs, target_sizes)
        ]

    @property
    def _resampling(self) -> str:
        return getattr(getattr(self, "image_processor", self), "mask_resampling", None) or "direct"

    def _images(self, outputs: Any, target_sizes: Sequence[Size] | Tensor | None) -> list[tuple]:
        """The images of a batch, as `_split_batch`; warns of targets that are the transpose of their image."""
        images = list(_split_batch(outputs, target_sizes))
        # A processor that squashes images to one shape tells nothing of their own.
        size = getattr(getattr(self, "image_processor", self), "size", None) or {}
        if "height" not in dict(size):
            _warn_of_transposed_targets([(content, target) for _, _, content, target in images])
        return images


def _warn_of_transposed_targets(sizes: Sequence[tuple[Size | None, Size | None]]) -> None:
    """Warn where the target has the shape of its content turned by a quarter, as `image.size` of PIL often has."""
    for index, (content, target) in enumerate(sizes):
        if content is None or target is None or min(*content, *target) < 1:
            continue
        shape, asked = content[0] / content[1], target[0] / target[1]
        # Sides of the content are rounded to pixels.
        slack = 1 + 1 / min(content) + 1 / min(target)
        is_turned = max(shape * asked, 1 / (shape * asked)) <= slack
        if is_turned and max(shape / asked, asked / shape) > slack:
            warnings.warn(
                f"`target_sizes` gives {target} (height, width) for image {index + 1} (index {index}), but the model "
                f"saw it as {tuple(content)}: one is the other turned by a quarter. PIL's `image.size` is (width, "
                "height), and is not turned by the image's EXIF orientation: give the processor's `original_sizes`.",
                UserWarning,
                stacklevel=4,
            )


def _split_batch(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Size | None, Size | None]]:
    """Class logits, mask logits, content size and target size of one image after the other."""
    class_logits = _field(outputs, "class_queries_logits")
    mask_logits = _field(outputs, "masks_queries_logits")
    if class_logits is None or mask_logits is None:
        raise ValueError("the outputs need `class_queries_logits` and `masks_queries_logits`, as the model's have.")
    check_logits(class_logits, mask_logits, ("class_queries_logits", "masks_queries_logits"), batch=True)
    batch = len(class_logits)
    contents = _sizes(_field(outputs, "content_sizes"), batch, "content_sizes")
    targets = _sizes(target_sizes, batch, "target_sizes")
    for image in range(batch):
        yield class_logits[image], mask_logits[image], contents[image], targets[image]


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _sizes(sizes: Sequence[Size] | Tensor | None, batch: int, name: str) -> list[Size | None]:
    if sizes is None:
        return [None] * batch
    sizes = sizes.tolist() if isinstance(sizes, Tensor | np.ndarray) else sizes
    expected = f"`{name}` must give one (height, width) per image, such as [(480, 640)] for one image"
    if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
        raise ValueError(f"{expected}: got {shown(sizes)}.")
    if len(sizes) != batch:
        raise ValueError(f"{expected}: got {len(sizes)} for {batch} images.")
    for size in sizes:
        if size is not None and pair(size) is None:
            raise ValueError(f"{expected}: got {shown(size)} for one of them.")
    return [None if size is None else pair(size) for size in sizes]


__all__ = [
    "MaskResampler",
    "PostProcessingMixin",
    "Thresholds",
    "decode_rle",
    "encode_rle",
    "instance_segmentation",
    "panoptic_segmentation",
    "resize_masks",
    "semantic_scores",
    "semantic_segmentation",
    "semantic_segments",
    "void_label",
]
