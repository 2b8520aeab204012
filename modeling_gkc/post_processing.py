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
"""Post-processing of model outputs: semantic, instance and panoptic segmentation at any size.

Letters: B images, Q queries, K classes (class K of the logits is "no object"), h x w grid of the mask logits, H x W
target pixels, N segments. All sizes are (height, width).

By default, mask logits are resampled once, directly from the grid to the target pixels of the image content, before
the sigmoid. The other values of `resampling` reproduce Mask2Former, as published results do: see `MASK_RESAMPLINGS`.
The computation proceeds in row tiles, so that memory use never reaches Q x H x W or K x H x W numbers.

Pixels become void if their score is below `void_threshold`, or if they are assigned to a class of `void_label_ids`.
Void classes compete for pixels like all other classes, but are not part of the result. The score of a pixel is its
class score in a semantic map, and class score times mask probability in the other maps. Void pixels have the value
`void_id`, which is not the number of a class or segment: by default `void_label(K)` in a semantic map (255, or 65535
if 255 is a class), 0 in a panoptic map and -1 in an instance map. Segment ids count from 1.

All computation is in fp32, also under autocast, and without gradients. Logits must be finite, except that a class
logit may be -inf, which excludes the class.
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
    """Thresholds of a segmentation, and the pixels that become void.

    The fields have the meaning of the arguments with these names of `panoptic_segmentation` and
    `instance_segmentation`. Semantic segmentation uses `void_threshold`, `void_label_ids` and `void_id` only.
    """

    threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_mask_area_threshold: float = 0.0
    void_threshold: float | None = None
    void_label_ids: Collection[int] = ()
    void_id: int | None = None

    def check_fractions(self) -> "Thresholds":
        """Check the thresholds of segments, and return a copy with numpy and torch numbers converted to float.

        Raises:
            ValueError: A threshold is not between 0 and 1.
        """
        names = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "void_threshold")
        values = check_fractions(**{name: getattr(self, name) for name in names})
        return dataclasses.replace(self, **dict(zip(names, values, strict=True)))

    def void_classes(self, num_classes: int) -> Tensor:
        """Return a mask (K,) bool of the classes whose pixels become void.

        Raises:
            ValueError: `void_label_ids` contains a number that is not a class.
        """
        is_void = torch.zeros(num_classes, dtype=torch.bool)
        is_void[list(check_label_ids("void_label_ids", self.void_label_ids, num_classes))] = True
        return is_void


def void_label(num_classes: int) -> int:
    """Return the default value of void pixels in a semantic map: the first of 255, 65535, 2^31 - 1 above all classes.

    Raises:
        ValueError: `num_classes` is not an integer from 0 to 2^31 - 1.
    """
    check_whole_number("num_classes", num_classes, 0, VOID_LABELS[-1])
    return next(value for value in VOID_LABELS if value >= num_classes)


def _semantic_void_id(void_id: int | None, is_void: Tensor) -> int:
    """Check or choose the value of void pixels in a semantic map, given the mask (K,) bool of void classes."""
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
    """Check the value of void pixels in an int32 map of at most `most_segments` segments."""
    void_id = check_whole_number("void_id", void_id)
    if not (-(2**31) <= void_id < 1 or most_segments < void_id < 2**31):
        raise ValueError(
            f"`void_id` {void_id} may be the id of a segment, which count from 1 to at most {most_segments}: choose "
            "0, a negative number or a larger one that fits into 32 bits."
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
    """Check the logits of one image, and return class logits (Q, K + 1) in fp32 and a mask resampler."""
    check_logits(class_logits, mask_logits)
    class_logits = class_logits.detach().float()
    # The best logit of a query is NaN or infinite if one is NaN or +inf, or if all are -inf.
    for name, numbers in (("class", class_logits.amax(dim=-1)), ("mask", mask_logits)):
        if not numbers.isfinite().all():
            raise ValueError(
                f"The {name} logits contain NaN or infinity, which often result from fp16 overflow: run the model in "
                "bf16 or fp32, for example with `dtype=torch.float32`."
            )
    return class_logits, make_resampler(mask_logits, content_size, target_size, resampling, for_scores)


def semantic_scores(
    class_logits: Tensor,
    mask_logits: Tensor,
    content_size: Size | None = None,
    target_size: Size | None = None,
    resampling: str = "direct",
) -> Tensor:
    """Compute the class scores of every pixel, the sum over queries of softmax(class logits)_k * sigmoid(mask logits).

    Source: Cheng et al., *Per-Pixel Classification is Not All You Need for Semantic Segmentation* (2021), section 3.4.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        resampling: As for `make_resampler`.

    Returns:
        (K, H, W) fp32 scores between 0 and Q. `semantic_segmentation` needs less memory.

    Raises:
        ValueError: Logits are not finite, or a size is invalid.
    """
    class_logits, resampler = _prepare(
        class_logits, mask_logits, content_size, target_size, resampling, for_scores=True
    )
    return _all_scores(resampler, class_logits)


def _all_scores(resampler: MaskResampler, class_logits: Tensor) -> Tensor:
    """Compute the scores (K, H, W) of all classes, one row tile at a time."""
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
    """Assign each pixel the class with the highest of its `semantic_scores`, one row tile at a time.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        void_threshold: Minimum score of a pixel, between 0 and Q; pixels below it become void. None keeps all pixels.
        void_label_ids: Classes whose pixels become void.
        void_id: Value of void pixels, which must not be a class of the result; None selects `void_label`.
        resampling: As for `make_resampler`.

    Returns:
        Class map (H, W) int64, and the highest score (H, W) fp32 of each pixel, including void pixels.

    Raises:
        ValueError: `void_label_ids` contains a number that is not a class, `void_id` is a class or not an integer,
            logits are not finite, or a size is invalid.
    """
    class_logits, resampler = _prepare(
        class_logits, mask_logits, content_size, target_size, resampling, for_scores=True
    )
    void = Thresholds(void_threshold=void_threshold, void_label_ids=void_label_ids, void_id=void_id)
    scores = mask_logits.new_empty(resampler.size, dtype=torch.float32)
    return _best_classes(resampler, class_logits, void, scores), scores


def semantic_segments(class_map: Tensor, scores: Tensor | None, num_classes: int) -> list[dict[str, Any]]:
    """List the classes in a result of `semantic_segmentation` as segments.

    Args:
        class_map: (H, W) class of each pixel.
        scores: (H, W) score of each pixel, or None.
        num_classes: Number of classes; all values of the map outside 0..num_classes - 1 are void. Void classes at the
            end of the vocabulary may be counted or not, since they have no pixels.

    Returns:
        A dict for each class that has a pixel: `id` and `label_id`, both the class, and `score`, the mean over its
        pixels of their scores clipped to 1, or None without scores. (The scores of several queries at one pixel may
        add up to more.)

    Raises:
        ValueError: The map has no integer type, the scores are not finite or have another shape, or `num_classes` is
            not an integer of at least 1.
    """
    check_whole_number("num_classes", num_classes, 1)
    is_map = isinstance(class_map, Tensor) and class_map.ndim == 2
    if not is_map or class_map.is_floating_point() or class_map.is_complex() or class_map.dtype == torch.bool:
        raise ValueError(f"`class_map` must be a tensor (H, W) of integers, got {shown(class_map)}.")
    if scores is not None:
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != class_map.shape:
            raise ValueError(
                f"`scores` must be a floating-point tensor of the map's shape {tuple(class_map.shape)}, got "
                f"{shown(scores)}."
            )
        if not scores.isfinite().all():
            raise ValueError("`scores` must be finite, but some are NaN or infinite.")
    # On the CPU: MPS has no fp64, and CUDA no deterministic sums per class.
    labels = class_map.flatten().cpu()
    is_class = (labels >= 0) & (labels < num_classes)
    labels = labels[is_class]
    areas = labels.bincount(minlength=num_classes)
    means = [None] * num_classes
    if scores is not None:
        scores = scores.detach().flatten().clamp(max=1).cpu()[is_class].double()
        means = (labels.bincount(scores, minlength=num_classes) / areas).tolist()
    return [{"id": index, "label_id": index, "score": means[index]} for index in areas.nonzero().flatten().tolist()]


def _best_classes(
    resampler: MaskResampler, class_logits: Tensor, void: Thresholds, scores: Tensor | None = None
) -> Tensor:
    """Compute the class map (H, W) of `semantic_segmentation`, and store the best scores in `scores`, if given."""
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
    """Compute the class probabilities (Q, K) of the queries, without "no object"."""
    return class_logits.softmax(dim=-1)[:, :-1]


def _semantic_tiles(resampler: MaskResampler, class_logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield row ranges of the target and their class scores (K, rows, W)."""
    class_scores = _class_scores(class_logits)
    num_queries, num_classes = class_scores.shape
    yield from resampler.map_tiles(
        lambda logits: _weighted_sums(class_scores, logits.sigmoid()), planes=2 * num_queries + num_classes
    )


def _weighted_sums(class_scores: Tensor, masks: Tensor) -> Tensor:
    """Compute the sums (K, ...) of masks (Q, ...) weighted by class scores (Q, K)."""
    with torch.autocast(masks.device.type, enabled=False):
        return (class_scores.T @ masks.flatten(1)).view(-1, *masks.shape[1:])


def _winners(resampler: MaskResampler, class_logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield row ranges of the target, the highest class score of each pixel and its class, both (rows, W).

    In a small part of an image only few of many classes can have the highest score. On a CPU, the other classes are
    skipped; on other devices, finding them takes longer than computing all scores.
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
    """Compute the highest score and its class, both (rows, columns), from scores (Q, K) and masks (Q, rows, columns).

    The score that a class would have if every mask took its maximum is an upper bound of its scores. A class whose
    bound is below the highest score of every pixel is skipped.
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
    # Several times faster than `max`, which is not vectorized; both take the first of equal scores.
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
    """Compute a panoptic segmentation, whose segments do not overlap.

    Queries whose best class is not "no object" and has a score above `threshold` compete for each pixel with class
    score * sigmoid(mask); the highest product wins the pixel and is its score. A segment consists of the pixels that
    it wins where its mask is at least `mask_threshold` and the score at least `void_threshold`. It is dropped if it is
    empty, or if it wins fewer pixels than `overlap_mask_area_threshold` times the area of its mask. Neither this area
    nor the number of won pixels depends on `void_threshold`, and the area does not depend on the class score. Queries
    of void classes compete like all others, but are not segments of the result.

    Source: Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation* (2022), and MaskFormer.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        threshold: Minimum class score of a segment, exclusive.
        mask_threshold: Minimum mask probability of the pixels of a segment.
        overlap_mask_area_threshold: Minimum fraction of its mask that a segment must win.
        label_ids_to_fuse: Stuff classes; all segments of such a class are merged into one.
        void_threshold: Minimum score of a pixel, between 0 and 1; pixels below it become void. None keeps all pixels.
        void_label_ids: Classes whose pixels become void.
        void_id: Value of void pixels, below 1 or above Q; None selects 0.
        return_binary_maps: Whether to return a mask for each segment instead of a map.
        resampling: As for `make_resampler`.

    Returns:
        A dict of `segmentation`, a map (H, W) int32 or N masks (N, H, W) bool in the order of the ids, and
        `segments_info`, a list of dicts: `id` (1..N), `label_id`, `was_fused` (whether the class is in
        `label_ids_to_fuse`) and `score` (class score, for merged segments the highest one).

    Raises:
        ValueError: `void_label_ids` or `label_ids_to_fuse` contains a number that is not a class, `void_id` may be the
            id of a segment, logits are not finite, or a size is invalid.
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
    """Assign segment ids (N,) int32 to masks, 0 if not `valid`, and return them with the segments."""
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
    """Assign each pixel to one of N masks by score times mask probability.

    Returns:
        Map (H, W) int32 of mask numbers from 1, 0 for void, and three tensors (N,) of pixel counts of each mask: the
        pixels that it wins, the pixels that it has in the map, and the area of the whole mask.
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
    """Count the pixels (N,) int32 of masks (N, H, W) bool."""
    return masks.flatten(1).sum(dim=1, dtype=torch.int32)  # much faster than count_nonzero


def _relabel(owner: Tensor, ids: Tensor) -> Tensor:
    """Replace each number n of a map (H, W) by `ids[n]` in place, a few rows at a time."""
    ids = ids.to(owner.device, owner.dtype)
    for rows in owner.split(rows_per_tile(owner.shape[1], planes=4)):
        rows.copy_(ids[rows.long()])
    return owner


class _Pairs(NamedTuple):
    """Pairs (N,) of query and class, sorted by `scores`, the class scores times the mean mask probabilities."""

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
    """Compute an instance segmentation, with a score for each instance.

    The `top_k` pairs of query and class with the highest class scores are candidates, so that one query may give
    instances of several classes. The score of a pair is its class score times the mean mask probability inside its
    mask; empty masks are dropped. Pairs of void classes are ranked with the others and remove their pixels from all
    pairs with lower scores, in whole masks as in the map, but are not instances of the result. An instance without
    remaining pixels is dropped; otherwise its score does not change.

    Source: Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation* (2022).

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        content_size: As for `MaskResampler`.
        target_size: As for `MaskResampler`.
        threshold: Minimum score of an instance.
        mask_threshold: Mask probability that the pixels of an instance must exceed.
        overlap_mask_area_threshold: Minimum fraction of its mask that an instance must cover in the map. Neither area
            depends on `void_threshold`.
        top_k: Number of candidate pairs of query and class.
        return_binary_maps: Whether to return the whole masks, which may overlap, instead of a map.
        return_coco_annotation: Whether to return the whole masks in COCO run-length encoding instead of a map.
        void_threshold: Minimum class score * mask probability of a pixel, between 0 and 1. In the map it applies to
            the instance in front, in whole masks to each instance. None keeps all pixels.
        void_label_ids: Classes whose pixels become void.
        void_id: Value of void pixels in the map, below 1 or above `top_k`; None selects -1.
        resampling: As for `make_resampler`.

    Returns:
        A dict of `segments_info`, a list of dicts with the best score first: `id` (1..N), `label_id`, `was_fused`
        (False) and `score`; and `segmentation`: a map (H, W) int32 in which instances with higher scores cover the
        others (fully covered ones are dropped), or N masks (N, H, W) bool, or N encoded masks, ordered by id.

    Raises:
        ValueError: Both `return_binary_maps` and `return_coco_annotation` are set, `top_k` is below 1,
            `void_label_ids` contains a number that is not a class, `void_id` may be the id of a segment, logits are
            not finite, or a size is invalid.
    """
    thresholds = Thresholds(
        threshold, mask_threshold, overlap_mask_area_threshold, void_threshold, void_label_ids, void_id
    ).check_fractions()
    check_flags(return_binary_maps=return_binary_maps, return_coco_annotation=return_coco_annotation)
    if return_binary_maps and return_coco_annotation:
        raise ValueError("Set only one of `return_binary_maps` and `return_coco_annotation`.")
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
    """Rank the pairs of query and class with non-empty masks and scores of at least `threshold`."""
    class_scores, pairs = _class_scores(class_logits).flatten().topk(num_pairs)
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
    """Compute the mean probability (Q,) inside each mask, 0 for an empty mask."""
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
    """Return the non-empty masks (N, H, W) bool of the pairs of non-void classes, and the pair numbers (N,)."""
    first_void = _first_void_pair(resampler, pairs, is_void, thresholds.mask_threshold)
    ranks = (~is_void).nonzero().flatten()
    masks = _binary_masks(resampler, pairs, ranks, first_void, thresholds)
    seen = masks.flatten(1).any(dim=1)
    return (masks if seen.all() else masks[seen]), ranks[seen]


def _encoded_masks(
    resampler: MaskResampler, pairs: _Pairs, is_void: Tensor, thresholds: Thresholds
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the masks of `_whole_masks` run-length encoded, decoding a few at a time, and the pair numbers (N,)."""
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
    """Compute the masks (N, H, W) bool of the pairs `ranks` (N,), without void pixels."""
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
    """Return the first pair of a void class at each pixel (H, W), N if there is none; None without void pairs."""
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
    """Paint pairs into a map (H, W) int32 of pair numbers from 1, best in front, and mark the kept pairs (N,)."""
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
    """Methods `post_process_*` of both processors, whose arguments begin with those of Mask2Former's methods."""

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
        """Compute class maps, see `semantic_segmentation`.

        Args:
            outputs: Output of the model: `class_queries_logits` (B, Q, K + 1), `masks_queries_logits` (B, Q, h, w) and
                `content_sizes` (B, 2).
            target_sizes: For each image the (height, width) to return, such as the processor's `original_sizes`; None
                returns the masks' resolution.
            return_segmentation_scores: Whether to return the scores of all classes too, K x H x W numbers per image.
            void_threshold: Minimum class score of a pixel; pixels below it become void.
            void_label_ids: Classes that compete for pixels, but whose pixels become void.
            void_id: Value of void pixels; 255 by default, or 65535 with more than 255 classes.
            return_scores: Whether to return the highest class score of each pixel too, H x W numbers per image.

        Returns:
            B class maps (H, W) int64. With `return_scores` or `return_segmentation_scores`, B outputs with the map as
            `segmentation`, and `scores` (H, W), the highest score of each pixel, including void pixels, or
            `segmentation_scores` (K, H, W), the result of `semantic_scores`, as requested. `scores` equals the maximum
            of `segmentation_scores` up to rounding, but is computed one row tile at a time.

        Warns:
            UserWarning: The target size of an image has height and width swapped.
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
        """Compute instance segmentations, see `instance_segmentation`.

        Args:
            outputs: As for `post_process_semantic_segmentation`.
            threshold: Minimum score of an instance.
            mask_threshold: Mask probability that the pixels of an instance must exceed.
            overlap_mask_area_threshold: Minimum fraction of its mask that an instance must cover in the map.
            target_sizes: As for `post_process_semantic_segmentation`.
            return_coco_annotation: Whether to return whole masks in COCO run-length encoding instead of a map.
            return_binary_maps: Whether to return whole masks (N, H, W) instead of a map.
            top_k: Number of candidate pairs of query and class.
            void_threshold: Minimum class score * mask probability of a pixel; pixels below it become void.
            void_label_ids: Classes that compete for pixels, but whose pixels become void.
            void_id: Value of void pixels in the map; -1 by default. (Segment ids count from 1.)

        Returns:
            B dicts of `segmentation` and `segments_info`.

        Warns:
            UserWarning: The target size of an image has height and width swapped.
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
        """Compute panoptic segmentations, see `panoptic_segmentation`.

        Args:
            outputs: As for `post_process_semantic_segmentation`.
            threshold: Minimum class score of a segment, exclusive.
            mask_threshold: Minimum mask probability of the pixels of a segment.
            overlap_mask_area_threshold: Minimum fraction of its mask that a segment must win.
            label_ids_to_fuse: Stuff classes, whose segments are merged; none by default.
            target_sizes: As for `post_process_semantic_segmentation`.
            return_binary_maps: Whether to return masks (N, H, W), one for each segment, instead of a map.
            void_threshold: Minimum class score * mask probability of a pixel; pixels below it become void.
            void_label_ids: Classes that compete for pixels, but whose pixels become void.
            void_id: Value of void pixels; 0 by default. (Segment ids count from 1.)

        Returns:
            B dicts of `segmentation`, (H, W) int32 or masks (N, H, W) bool, and `segments_info`.

        Warns:
            UserWarning: The target size of an image has height and width swapped.
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
        """Split a batch as `_split_batch` does, and warn of target sizes with height and width swapped."""
        images = list(_split_batch(outputs, target_sizes))
        # A processor that resizes images to a fixed shape does not keep their aspect ratio.
        size = getattr(getattr(self, "image_processor", self), "size", None) or {}
        if "height" not in dict(size):
            _warn_of_transposed_targets([(content, target) for _, _, content, target in images])
        return images


def _warn_of_transposed_targets(sizes: Sequence[tuple[Size | None, Size | None]]) -> None:
    """Warn of target sizes with height and width swapped, a common mistake with `image.size` of PIL."""
    for index, (content, target) in enumerate(sizes):
        if content is None or target is None or min(*content, *target) < 1:
            continue
        shape, asked = content[0] / content[1], target[0] / target[1]
        # Sides of the content are rounded to whole pixels.
        slack = 1 + 1 / min(content) + 1 / min(target)
        is_turned = max(shape * asked, 1 / (shape * asked)) <= slack
        if is_turned and max(shape / asked, asked / shape) > slack:
            warnings.warn(
                f"`target_sizes` gives {target} (height, width) for image {index + 1} (index {index}), but the model "
                f"input is {tuple(content)}: height and width seem to be swapped. PIL's `image.size` is (width, "
                "height) and ignores the EXIF orientation: pass the processor's `original_sizes`.",
                UserWarning,
                stacklevel=4,
            )


def _split_batch(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Size | None, Size | None]]:
    """Yield class logits, mask logits, content size and target size of each image of a batch."""
    class_logits = _field(outputs, "class_queries_logits")
    mask_logits = _field(outputs, "masks_queries_logits")
    if class_logits is None or mask_logits is None:
        raise ValueError("`outputs` must have `class_queries_logits` and `masks_queries_logits`, as model outputs do.")
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
