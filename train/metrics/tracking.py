"""Segmentation and tracking quality (Weber et al., "STEP: segmenting and tracking every pixel", NeurIPS 2021).

| number | how it is taken |
| --- | --- |
| SQ | mean IoU of the classes, from one confusion matrix over all frames of all videos (`train.metrics.semantic`) |
| track | all pixels of an id in a video: of the truth, things that are no crowd; of the prediction, things |
| AQ of a true track g | sum over predicted tracks p of TPA(p, g) x IoU(p, g), divided by the pixels of g |
| AQ | mean over all true tracks of all videos |
| TPA, IoU | pixels that p and g share; TPA / (TPA + FPA + FNA) = shared / (p or g), over the whole video |
| class of p | does not matter to AQ: a track of the wrong class still tracks; SQ pays for the class |
| void and crowd of the truth | void pixels leave SQ and AQ; crowd pixels leave AQ and count in SQ |
| STQ | square root of SQ x AQ; None where the truth has no track |

The mean over classes of SQ leaves classes without ground truth out; `absent="zero"` scores them 0 if predicted.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Metric, add_fixed, as_fixed, exact_sum, exact_values
from .panoptic import SegmentList, shared_runs
from .score import ReportedScore
from .semantic import semantic_scores
from .video_panoptic import Frame, LinkedVideoScore


class _Runs:
    """Runs of one frame: class and id of the truth and of the prediction, and how many pixels."""

    def __init__(self, frame: Frame, is_thing: np.ndarray):
        ids, segments, truth_ids, truth_segments = frame
        found = SegmentList(segments, len(is_thing), "prediction")
        truth = SegmentList(truth_segments, len(is_thing), "truth")
        self.ids, self.truth_ids, self.lengths = shared_runs(ids, truth_ids)
        places, truth_places = found.places(self.ids), truth.places(self.truth_ids)
        self.classes = np.append(-1, found.classes)[places]
        self.truth_classes = np.append(-1, truth.classes)[truth_places]
        self.crowd = np.append(False, truth.crowd)[truth_places]
        things = np.append(is_thing, False)  # the last for -1
        counted = (self.truth_classes >= 0) & ~(things[self.truth_classes] & self.crowd)
        self.on_track = things[self.truth_classes] & counted
        self.found_track = things[self.classes] & counted


def association(runs_of_frames: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """The association quality of one video, summed over the tracks of its truth.

    Args:
        runs_of_frames: ids of truth and prediction, 0 where there is no track, and numbers of pixels, (N,) each.

    Returns:
        The sum as a multiple of 2**-52 (see `train.metrics.base`), and the number of tracks.
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
    """STQ over a dataset of videos; see the table of this module.

    Args:
        is_thing: of each class, whether it is a thing.
    """

    settings = ("is_thing",)
    sums = ("confusion", "association_sum", "tracks")
    exact_sums = ("association_sum",)

    def __init__(self, is_thing: Sequence[bool]):
        if not len(is_thing):
            raise ValueError("is_thing must tell of at least one class.")
        self.is_thing = [bool(thing) for thing in is_thing]
        self.confusion = np.zeros((len(self.is_thing), len(self.is_thing) + 1), dtype=np.int64)
        self.association_sum = exact_sum(1)
        self.tracks = np.zeros(1, dtype=np.int64)

    def update(self, frames: Sequence[Frame]) -> None:
        """Add one whole video.

        Args:
            frames: ids (H, W), segments, ids of the truth, segments of the truth, as of `PanopticMetric.update`; an id
                means the same object in all frames.

        Raises:
            ValueError: as `PanopticMetric.update`.
        """
        if not len(frames):
            return
        things, confusion, tracks = np.array(self.is_thing), np.zeros_like(self.confusion), []
        for frame in frames:
            runs = _Runs(frame, things)
            known = runs.truth_classes >= 0
            # The last column of the confusion matrix, place -1, is that of void predictions.
            np.add.at(confusion, (runs.truth_classes[known], runs.classes[known]), runs.lengths[known])
            truths, ids = np.where(runs.on_track, runs.truth_ids, 0), np.where(runs.found_track, runs.ids, 0)
            tracks.append((truths, ids, runs.lengths))
        quality, number = association(tracks)
        self.confusion += confusion
        add_fixed(self.association_sum, 0, quality)
        self.tracks += number

    def compute(self, absent: str = "left_out", classes: Sequence[int] | None = None) -> dict[str, Any]:
        """`stq`, `sq`, `aq` (0 to 1; None where nothing is to be scored), number of `tracks`, `iou` of every class.

        `absent` and `classes` bear on SQ alone, as in `semantic_scores`.
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
