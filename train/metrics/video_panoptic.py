"""Video panoptic quality (Kim et al., "Video panoptic segmentation", CVPR 2020).

| aspect | convention |
| --- | --- |
| tube | all pixels of a segment id within a window of k consecutive annotated frames |
| windows | every start with k frames left; a video with fewer than k frames does not count for that k |
| match, void, crowd, false positives | those of `train.metrics.panoptic`, for tubes instead of segments |
| VPQ of one k | mean PQ over classes, from TP, FP, FN and IoU per class summed over all windows of all videos |
| VPQ | mean over k = 1, 2, 4, 6 frames, as in VIPSeg (Miao et al., CVPR 2022) |

Other published variants take the mean of the VPQ of each video, or the windows 0, 5, 10, 15 of Cityscapes-VPS, which
annotates every fifth frame; these are `windows=(1, 2, 3, 4)` here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

from .base import Metric, check_windows, mean
from .panoptic import Matches, QualityCounts, SegmentList, Segments, match_segments, shared_runs
from .score import Prediction, ReportedScore, Sample, VideoScore

Frame = tuple[np.ndarray, Segments, np.ndarray, Segments]
Overlaps = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def match_windows(frames: Sequence[Frame], window: int, num_classes: int) -> Iterator[Matches]:
    """Match the tubes of every window of a video.

    Args:
        frames: Predicted ids (H, W), predicted segments, ground truth ids and ground truth segments of each frame, as
            for `PanopticMetric.update`. An id is the same object in all frames.
        window: Window length in frames.
        num_classes: Number K of classes.

    Raises:
        ValueError: If `PanopticMetric.update` would reject a frame, or an id has several classes in a video.
    """
    yield from _slide(*_overlaps(frames, num_classes), window)


def _overlaps(frames: Sequence[Frame], num_classes: int) -> tuple[Overlaps, SegmentList, SegmentList]:
    """Return the shared pixels of segment pairs in every frame, with segments numbered over the video."""
    found = SegmentList(_all_segments([frame[1] for frame in frames], "prediction"), num_classes, "prediction")
    truth = SegmentList(_all_segments([frame[3] for frame in frames], "truth"), num_classes, "truth")
    overlaps = []
    for ids, _, truth_ids, _ in frames:
        run_ids, run_truths, lengths = shared_runs(ids, truth_ids)
        pairs, inverse = np.unique(
            truth.places(run_truths) * (len(found) + 1) + found.places(run_ids), return_inverse=True
        )
        pixels = np.zeros(len(pairs), dtype=np.int64)
        np.add.at(pixels, inverse, lengths)
        overlaps.append((*np.divmod(pairs, len(found) + 1), pixels))
    return overlaps, truth, found


def _all_segments(frames: Sequence[Segments], name: str) -> list[Mapping[str, Any]]:
    """Merge the segments of all frames of a video; a segment that is a crowd in any frame is a crowd."""
    merged: dict[int, dict[str, Any]] = {}
    for segments in frames:
        if len({segment["id"] for segment in segments}) < len(segments):
            raise ValueError(f"Ids of the {name} must be different within a frame.")
        for segment in segments:
            known = merged.setdefault(segment["id"], {**segment, "iscrowd": False})
            if known["category_id"] != segment["category_id"]:
                raise ValueError(
                    f"Id {segment['id']} of the {name} has the classes {known['category_id']} and "
                    f"{segment['category_id']} in one video; an id must keep its class."
                )
            known["iscrowd"] |= bool(segment.get("iscrowd", False))
    return list(merged.values())


def _slide(overlaps: Overlaps, truth: SegmentList, found: SegmentList, window: int) -> Iterator[Matches]:
    total = np.zeros((len(truth) + 1, len(found) + 1), dtype=np.int64)
    for end, (rows, columns, pixels) in enumerate(overlaps):
        total[rows, columns] += pixels
        if end >= window:
            rows, columns, pixels = overlaps[end - window]
            total[rows, columns] -= pixels
        if end >= window - 1:
            yield match_segments(total, truth.classes, truth.crowd, found.classes)


class VideoPanopticMetric(QualityCounts):
    """VPQ over a dataset of videos, with the conventions of this module.

    Args:
        is_thing: Whether each class is a thing.
        windows: Window lengths in frames.
    """

    settings = ("is_thing", "windows")

    def __init__(self, is_thing: Sequence[bool], windows: Sequence[int] = (1, 2, 4, 6)):
        self.windows = check_windows(windows)
        super().__init__(is_thing, len(self.windows))

    def update(self, frames: Sequence[Frame]) -> None:
        """Add one whole video, with the frames and errors of `match_windows`."""
        overlaps = _overlaps(frames, len(self.is_thing))
        for quality, window in enumerate(self.windows):
            for matches in _slide(*overlaps, window):
                self._add(quality, matches)

    def compute(self, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Compute the scores of classes in 0..1.

        Args:
            classes: Classes to average over. None takes all classes.

        Returns:
            `vpq`, `vpq_things` and `vpq_stuff`, means over the window lengths with something to score, or None without
            any; and `windows`, the result of `PanopticMetric.compute` for each window length.
        """
        windows = {str(k): self._scores(quality, classes) for quality, k in enumerate(self.windows)}
        return {
            "vpq": mean(scores["pq"] for scores in windows.values()),
            **{f"vpq_{kind}": mean(scores[kind]["pq"] for scores in windows.values()) for kind in ("things", "stuff")},
            "windows": windows,
        }


class LinkedVideoScore(VideoScore):
    """Score of segments over a video, for image models, whose segment ids are not consistent over frames.

    Objects are tracked by `link_segments`, and stuff segments have one id per class.

    Args:
        metric: Metric whose `update` accepts the frames of a video.
        is_thing: Whether each class is a thing.
    """

    task = "video"
    needs = ("ids",)
    needs_kinds = True
    metric_class: type[Metric]

    def __init__(self, metric: Metric, is_thing: Sequence[bool]):
        super().__init__(metric)
        self.is_thing = list(is_thing)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Create an empty score for the classes of a benchmark."""
        return cls(cls.metric_class(vocabulary.is_thing), vocabulary.is_thing)

    def frame(self, sample: Sample, prediction: Prediction) -> Frame:
        """Return the ids and segments of prediction and ground truth."""
        return prediction.ids, prediction.segments, sample.ids, sample.segments

    def update_video(self, frames: list[tuple]) -> None:
        """Link the segments of a video and add it."""
        linked = link_segments([frame[:2] for frame in frames], self.is_thing)
        self.metric.update([(*new, *old[2:]) for new, old in zip(linked, frames, strict=True)])


class VideoPanopticScore(LinkedVideoScore):
    """Video panoptic quality."""

    name = "video_panoptic"
    metric_class = VideoPanopticMetric
    report = (ReportedScore("vpq", "vpq", "VPQ"),)
    task_type = "image-segmentation"
    details = ("windows_",)


def link_segments(
    frames: Sequence[tuple[np.ndarray, list[dict[str, Any]]]], is_thing: Sequence[bool]
) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Assign consistent segment ids over the frames of a video.

    Objects are matched greedily by decreasing IoU (above 0) with objects of the same class in the previous frame;
    unmatched objects get new ids. Stuff segments have the id class + 1.

    Args:
        frames: Ids (H, W) and segments with `id` and `category_id` of each frame.
        is_thing: Whether each class is a thing.

    Returns:
        The frames with consistent ids.
    """
    following, linked = len(is_thing) + 1, []
    before: tuple[np.ndarray, dict[int, int]] = (np.zeros((0, 0)), {})  # new ids, and the class of each object
    for ids, segments in frames:
        things = {segment["id"]: segment["category_id"] for segment in segments if is_thing[segment["category_id"]]}
        new_ids = _followed(ids, things, *before)
        for segment in segments:
            if segment["id"] not in things:
                new_ids[segment["id"]] = segment["category_id"] + 1
            elif segment["id"] not in new_ids:
                new_ids[segment["id"]] = following
                following += 1
        present, inverse = np.unique(ids, return_inverse=True)
        values = np.array([new_ids.get(number, 0) for number in present.tolist()], dtype=np.int32)
        renumbered = values[inverse].reshape(ids.shape)
        classes = {new_ids[segment["id"]]: segment["category_id"] for segment in segments}
        linked.append((renumbered, [{"id": number, "category_id": label} for number, label in classes.items()]))
        before = renumbered, {new_ids[number]: label for number, label in things.items()}
    return linked


def _followed(
    ids: np.ndarray, things: Mapping[int, int], before: np.ndarray, known: Mapping[int, int]
) -> dict[int, int]:
    """Return the id in the previous frame of each matched object."""
    if before.shape != ids.shape:
        return {}
    pairs, shared = np.unique(np.stack([ids.ravel(), before.ravel()]), axis=1, return_counts=True)
    areas, areas_before = (dict(zip(*np.unique(m, return_counts=True), strict=True)) for m in (ids, before))
    candidates = [
        (count / (areas[new] + areas_before[old] - count), new, old)
        for (new, old), count in zip(pairs.T.tolist(), shared.tolist(), strict=True)
        if new in things and known.get(old) == things[new]
    ]
    found: dict[int, int] = {}
    for _, new, old in sorted(candidates, key=lambda candidate: (-candidate[0], candidate[1:])):
        if new not in found and old not in found.values():
            found[new] = old
    return found


SCORES = (VideoPanopticScore,)
