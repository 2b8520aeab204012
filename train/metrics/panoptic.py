"""Panoptic quality (Kirillov et al., "Panoptic segmentation", CVPR 2019).

| aspect | convention |
| --- | --- |
| match | same class and IoU > 0.5, so that every segment has at most one match |
| ground truth void | id 0 and segments without a class (-1) are removed from the union |
| ground truth crowds | never matched and never false negatives; their pixels stay in the union |
| false positive | a segment without match, unless over half of it is on void and on crowds of its class |
| scores of a class | SQ = mean IoU of its matches (0 without one), RQ = TP / (TP + FP / 2 + FN / 2), PQ = SQ x RQ |
| mean over classes | classes with a TP, FP or FN; a predicted class without ground truth counts as 0 |
| things, stuff | the same mean over the thing or stuff classes |
| listed segments without pixels | ignored in ground truth and prediction |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

from .base import Metric, add_fixed, as_fixed, check_is_thing, chosen_classes, exact_sum, exact_values, mean
from .score import Prediction, ReportedScore, Sample, Score

VOID = 0
NO_CLASS = -1
QUALITIES = ("pq", "sq", "rq")

Segments = Sequence[Mapping[str, Any]]


@dataclass
class Matches:
    """Matches of predicted and ground truth segments in one image or one window of a video.

    Attributes:
        true_positives: Class, intersection and union of every match.
        false_positives: Class of every false positive.
        false_negatives: Class of every missed ground truth segment.
    """

    true_positives: list[tuple[int, int, int]]
    false_positives: list[int]
    false_negatives: list[int]


def match_segments(
    overlap: np.ndarray, truth_classes: Sequence[int], truth_crowd: Sequence[bool], classes: Sequence[int]
) -> Matches:
    """Match predicted and ground truth segments.

    Args:
        overlap: Shared pixels (T + 1, P + 1) of ground truth and predicted segments. Row 0 is the ground truth void,
            column 0 the predicted void.
        truth_classes: Class of every ground truth segment (T,).
        truth_crowd: Whether every ground truth segment is a crowd (T,).
        classes: Class of every predicted segment (P,).
    """
    truth_classes, classes = (np.asarray(values, dtype=np.int64) for values in (truth_classes, classes))
    crowd = np.asarray(truth_crowd, dtype=bool)
    truth_areas, areas = overlap.sum(axis=1)[1:], overlap.sum(axis=0)[1:]
    on_void, shared = overlap[0, 1:], overlap[1:, 1:]
    same_class = truth_classes[:, None] == classes
    unions = truth_areas[:, None] + (areas - on_void) - shared
    matched = same_class & ~crowd[:, None] & (2 * shared > unions)
    on_crowd = (shared * (same_class & crowd[:, None])).sum(axis=0)
    excused = 2 * (on_void + on_crowd) > areas
    false_positives = (areas > 0) & ~matched.any(axis=0) & ~excused
    false_negatives = (truth_areas > 0) & ~crowd & ~matched.any(axis=1)
    pairs = np.argwhere(matched).tolist()
    return Matches(
        [(int(classes[p]), int(shared[t, p]), int(unions[t, p])) for t, p in pairs],
        classes[false_positives].tolist(),
        truth_classes[false_negatives].tolist(),
    )


class SegmentList:
    """Checked segments of an image or video, sorted by id; segments without a class are void.

    Args:
        segments: Segments with `id`, `category_id` and, for the ground truth, `iscrowd`, as in `train.data.schema`.
        num_classes: Number K of classes.
        name: Name of the segments in error messages.

    Raises:
        ValueError: If an id is not positive or is repeated, or a class is not in -1..K - 1.
    """

    def __init__(self, segments: Segments, num_classes: int, name: str):
        self.name = name
        ordered = sorted(segments, key=lambda segment: segment["id"])
        self.listed = np.array([segment["id"] for segment in ordered], dtype=np.int64)
        classes = np.array([segment["category_id"] for segment in ordered], dtype=np.int64)
        if len(np.unique(self.listed)) < len(self.listed) or (self.listed <= VOID).any():
            raise ValueError(f"Ids of the {name} must be positive and different, got {self.listed.tolist()}.")
        if ((classes < NO_CLASS) | (classes >= num_classes)).any():
            raise ValueError(
                f"Classes of the {name} must be from -1 (none) to {num_classes - 1}, got {classes.tolist()}."
            )
        has_class = classes != NO_CLASS
        self.classes = classes[has_class]
        self.crowd = np.array([bool(segment.get("iscrowd", False)) for segment in ordered], dtype=bool)[has_class]
        # Position 0 is void; segments are numbered in the order of their ids.
        self._places = np.where(has_class, np.cumsum(has_class), 0)

    def __len__(self) -> int:
        return len(self.classes)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Return 1 + the position of the segment of each id (N,), or 0 for void.

        Raises:
            ValueError: If an id is not listed.
        """
        places = np.zeros(len(ids), dtype=np.int64)
        drawn = ids != VOID
        found = np.searchsorted(self.listed, ids[drawn])
        known = found < len(self.listed)
        known[known] = self.listed[found[known]] == ids[drawn][known]
        if not known.all():
            unknown = np.unique(ids[drawn][~known])[:10].tolist()
            raise ValueError(f"Ids {unknown} of the {self.name} are not in its segments {self.listed.tolist()[:20]}.")
        places[drawn] = self._places[found]
        return places


def shared_runs(ids: np.ndarray, truth_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide two id maps (H, W) into runs where both are constant.

    Looking up ids once per run instead of once per pixel takes a tenth of the time.

    Returns:
        The predicted id, the ground truth id and the length of each run.

    Raises:
        ValueError: If the maps differ in size or are not of integers.
    """
    ids, truth_ids = np.asarray(ids), np.asarray(truth_ids)
    if ids.ndim != 2 or ids.shape != truth_ids.shape:
        raise ValueError(
            f"Ids of prediction and ground truth must have the same size (height, width), got {ids.shape} and "
            f"{truth_ids.shape}: resize the prediction to the ground truth."
        )
    for name, array in (("prediction", ids), ("ground truth", truth_ids)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"The ids of the {name} must be integers, got {array.dtype}.")
    ids, truth_ids = ids.ravel(), truth_ids.ravel()
    changes = np.flatnonzero((ids[1:] != ids[:-1]) | (truth_ids[1:] != truth_ids[:-1])) + 1
    edges = np.concatenate([[0], changes, [len(ids)]]) if len(ids) else np.zeros(1, dtype=np.int64)
    return ids[edges[:-1]], truth_ids[edges[:-1]], np.diff(edges)


def overlap_of(ids: np.ndarray, found: SegmentList, truth_ids: np.ndarray, truth: SegmentList) -> np.ndarray:
    """Return the shared pixels (T + 1, P + 1) int64 of every pair of segments, for `match_segments`."""
    run_ids, run_truths, lengths = shared_runs(ids, truth_ids)
    overlap = np.zeros((len(truth) + 1, len(found) + 1), dtype=np.int64)
    np.add.at(overlap, (truth.places(run_truths), found.places(run_ids)), lengths)
    return overlap


def match_image(
    ids: np.ndarray, segments: Segments, truth_ids: np.ndarray, truth_segments: Segments, num_classes: int
) -> Matches:
    """Match the segments of one image, with the arguments and errors of `PanopticMetric.update`."""
    found = SegmentList(segments, num_classes, "prediction")
    truth = SegmentList(truth_segments, num_classes, "truth")
    return match_segments(overlap_of(ids, found, truth_ids, truth), truth.classes, truth.crowd, found.classes)


class QualityCounts(Metric):
    """Accumulated matches of K classes for N qualities.

    Args:
        is_thing: Whether each class is a thing.
        num_qualities: Number N of qualities, such as window lengths.
    """

    sums = ("counts", "iou_sums")
    exact_sums = ("iou_sums",)

    def __init__(self, is_thing: Sequence[bool], num_qualities: int):
        self.is_thing = check_is_thing(is_thing)
        self.counts = np.zeros((num_qualities, 3, len(self.is_thing)), dtype=np.int64)
        self.iou_sums = exact_sum(num_qualities, len(self.is_thing))

    def _add(self, quality: int, matches: Matches) -> None:
        for index, shared, union in matches.true_positives:
            self.counts[quality, 0, index] += 1
            add_fixed(self.iou_sums[quality], index, as_fixed(shared, union))
        np.add.at(self.counts[quality, 1], matches.false_positives, 1)
        np.add.at(self.counts[quality, 2], matches.false_negatives, 1)

    def _scores(self, quality: int, classes: Sequence[int] | None) -> dict[str, Any]:
        chosen = chosen_classes(classes, len(self.is_thing))
        counts, sums = self.counts[quality].T.tolist(), exact_values(self.iou_sums[quality])
        per_class = [_class_quality(*count, iou) for count, iou in zip(counts, sums, strict=True)]
        kinds = {kind: [k for k in chosen if self.is_thing[k] == is_thing] for kind, is_thing in _KINDS.items()}
        return {
            **_means(per_class[k] for k in chosen),
            **{kind: _means(per_class[k] for k in members) for kind, members in kinds.items()},
            "per_class": per_class,
        }


_KINDS = {"things": True, "stuff": False}


def _class_quality(true_positives: int, false_positives: int, false_negatives: int, iou: float) -> dict[str, Any]:
    weight = true_positives + false_positives / 2 + false_negatives / 2
    return {
        "pq": iou / weight if weight else None,
        "sq": (iou / true_positives if true_positives else 0.0) if weight else None,
        "rq": true_positives / weight if weight else None,
        "true_positives": true_positives,
        "false_positives": false_positives,
        "false_negatives": false_negatives,
    }


def _means(per_class: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    listed = list(per_class)
    return {name: mean(scores[name] for scores in listed) for name in QUALITIES}


class PanopticMetric(QualityCounts):
    """PQ, SQ and RQ over a dataset, with the conventions of this module.

    Args:
        is_thing: Whether each class is a thing.
    """

    settings = ("is_thing",)

    def __init__(self, is_thing: Sequence[bool]):
        super().__init__(is_thing, 1)

    def update(self, ids: np.ndarray, segments: Segments, truth_ids: np.ndarray, truth_segments: Segments) -> None:
        """Accumulate the prediction and the ground truth of one image.

        Args:
            ids: Predicted segment id of each pixel (H, W), 0 for void.
            segments: Predicted segments with `id` and `category_id`.
            truth_ids: Ground truth segment id of each pixel (H, W), 0 for void.
            truth_segments: Ground truth segments with `id`, `category_id` (-1 for none, which is void) and `iscrowd`.

        Raises:
            ValueError: If the sizes differ, an id is not listed, repeated or 0, or a class is unknown.
        """
        self._add(0, match_image(ids, segments, truth_ids, truth_segments, len(self.is_thing)))

    def compute(self, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Compute the scores of classes in 0..1.

        Args:
            classes: Classes to average over. None takes all classes.

        Returns:
            `pq`, `sq` and `rq`; `things` and `stuff` with the same scores, or None if there is nothing to score; and
            `per_class`, a list over all classes of the same scores and `true_positives`, `false_positives` and
            `false_negatives`.
        """
        return self._scores(0, classes)


class PanopticScore(Score):
    """Panoptic quality."""

    name = task = "panoptic"
    needs = ("ids",)
    needs_kinds = True
    class_means = {"pq": "pq", "sq": "sq", "rq": "rq"}
    report = (ReportedScore("pq", "panoptic_quality", "PQ"),)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Create an empty score for the classes of a benchmark."""
        return cls(PanopticMetric(vocabulary.is_thing))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Accumulate the prediction and the ground truth of one image."""
        self.metric.update(prediction.ids, prediction.segments, sample.ids, sample.segments)


SCORES = (PanopticScore,)
