"""Segmentation and tracking quality (Weber et al., "STEP: segmenting and tracking every pixel", NeurIPS 2021).

| score | convention |
| --- | --- |
| SQ | mean IoU of the classes, from one confusion matrix over all frames of all videos (`train.metrics.semantic`) |
| track | all pixels of an id in a video: non-crowd things of the ground truth, things of the prediction |
| AQ of a ground truth track g | sum over predicted tracks p of TPA(p, g) x IoU(p, g), divided by the pixels of g |
| AQ | mean over all ground truth tracks of all videos |
| TPA, IoU | TPA = pixels shared by p and g; IoU = TPA / (TPA + FPA + FNA), over the whole video |
| class of p | irrelevant for AQ; SQ scores the class |
| ground truth void and crowds | void pixels are ignored in SQ and AQ; crowd pixels are ignored in AQ only |
| STQ | square root of SQ x AQ; None if the ground truth has no track |

The mean over classes of SQ ignores classes without ground truth; `absent="zero"` counts them as 0 if predicted.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Metric, add_fixed, as_fixed, check_is_thing, exact_sum, exact_values
from .panoptic import SegmentList, shared_runs
from .score import ReportedScore
from .semantic import semantic_scores
from .video_panoptic import Frame, LinkedVideoScore


class _Runs:
    """Runs of one frame, with class and id of ground truth and prediction, and their numbers of pixels."""

    def __init__(self, frame: Frame, is_thing: np.ndarray):
        ids, segments, truth_ids, truth_segments = frame
        found = SegmentList(segments, len(is_thing), "prediction")
        truth = SegmentList(truth_segments, len(is_thing), "truth")
        self.ids, self.truth_ids, self.lengths = shared_runs(ids, truth_ids)
        places, truth_places = found.places(self.ids), truth.places(self.truth_ids)
        self.classes = np.append(-1, found.classes)[places]
        self.truth_classes = np.append(-1, truth.classes)[truth_places]
        self.crowd = np.append(False, truth.crowd)[truth_places]
        things = np.append(is_thing, False)  # the last entry is for class -1
        counted = (self.truth_classes >= 0) & ~(things[self.truth_classes] & self.crowd)
        self.on_track = things[self.truth_classes] & counted
        self.found_track = things[self.classes] & counted


def association(runs_of_frames: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Return the association quality of one video, summed over its ground truth tracks.

    Args:
        runs_of_frames: For each frame the ground truth and predicted track ids of N runs (0 for none) and their
            numbers of pixels, each (N,).

    Returns:
        The sum as a multiple of 2**-52 (see `train.metrics.base`), and the number of ground truth tracks.
    """
    truths, ids, pixels = (np.concatenate(parts) for parts in zip(*runs_of_frames, strict=True))
    truth_names, truth_index = np.unique(truths, return_inverse=True)
    names, index = np.unique(ids, return_inverse=True)
    truth_areas, areas = _sums(truth_index, pixels, len(truth_names)), _sums(index, pixels, len(names))
    pairs, pair_index = np.unique(truth_index * len(names) + index, return_inverse=True)
    total = 0
    for pair, shared in zip(pairs.tolist(), _sums(pair_index, pixels, len(pairs)), strict=True):
        g, p = divmod(pair, len(names))
        if truth_names[g] and names[p]:
            total += as_fixed(shared * shared, truth_areas[g] * (truth_areas[g] + areas[p] - shared))
    return total, int(np.count_nonzero(truth_names))


def _sums(index: np.ndarray, pixels: np.ndarray, length: int) -> list[int]:
    sums = np.zeros(length, dtype=np.int64)
    np.add.at(sums, index, pixels)
    return sums.tolist()


class TrackingQualityMetric(Metric):
    """STQ over a dataset of videos, with the conventions of this module.

    Args:
        is_thing: Whether each class is a thing.
    """

    settings = ("is_thing",)
    sums = ("confusion", "association_sum", "tracks")
    exact_sums = ("association_sum",)

    def __init__(self, is_thing: Sequence[bool]):
        self.is_thing = check_is_thing(is_thing)
        self.confusion = np.zeros((len(self.is_thing), len(self.is_thing) + 1), dtype=np.int64)
        self.association_sum = exact_sum(1)
        self.tracks = np.zeros(1, dtype=np.int64)

    def update(self, frames: Sequence[Frame]) -> None:
        """Add one whole video.

        Args:
            frames: Predicted ids (H, W), predicted segments, ground truth ids and ground truth segments of each frame,
                as for `PanopticMetric.update`. An id is the same object in all frames.

        Raises:
            ValueError: If `PanopticMetric.update` would reject a frame.
        """
        if not len(frames):
            return
        things, confusion, tracks = np.array(self.is_thing), np.zeros_like(self.confusion), []
        for frame in frames:
            runs = _Runs(frame, things)
            known = runs.truth_classes >= 0
            # The last column of the confusion matrix, index -1, is for void predictions.
            np.add.at(confusion, (runs.truth_classes[known], runs.classes[known]), runs.lengths[known])
            truths, ids = np.where(runs.on_track, runs.truth_ids, 0), np.where(runs.found_track, runs.ids, 0)
            tracks.append((truths, ids, runs.lengths))
        quality, number = association(tracks)
        self.confusion += confusion
        add_fixed(self.association_sum, 0, quality)
        self.tracks += number

    def compute(self, absent: str = "left_out", classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Compute the scores in 0..1.

        Args:
            absent: Treatment of classes without ground truth in SQ, as in `semantic_scores`.
            classes: Classes to average over in SQ. None takes all classes.

        Returns:
            `stq`, `sq` and `aq`, or None if there is nothing to score; the number of `tracks`; and `iou` of every
            class.
        """
        scores, tracks = semantic_scores(self.confusion, absent, classes), int(self.tracks[0])
        sq, aq = scores["miou"], exact_values(self.association_sum)[0] / tracks if tracks else None
        stq = None if sq is None or aq is None else math.sqrt(sq * aq)
        return {"stq": stq, "sq": sq, "aq": aq, "tracks": tracks, "iou": scores["iou"]}


class TrackingQualityScore(LinkedVideoScore):
    """Segmentation and tracking quality."""

    name = "tracking"
    metric_class = TrackingQualityMetric
    report = (ReportedScore("stq", "stq", "STQ"),)
    task_type = "image-segmentation"


SCORES = (TrackingQualityScore,)
