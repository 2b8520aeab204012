"""Video panoptic quality (Kim et al., "Video panoptic segmentation", CVPR 2020).

| question | how it is done |
| --- | --- |
| tube | all pixels of a segment's id within a window of k consecutive annotated frames |
| windows | every start that has k frames left; a video of fewer frames than k adds nothing to that k |
| match, void, crowd, false positives | of tubes, as `train.metrics.panoptic` does it of segments |
| VPQ of one k | sums of TP, FP, FN and IoU per class over all windows of all videos, then the classes' mean PQ |
| VPQ | mean over k = 1, 2, 4, 6 frames, as VIPSeg (Miao et al., CVPR 2022) reports it |

Variants in print that this is not: a mean over videos of each video's VPQ; the windows 0, 5, 10, 15 of Cityscapes-VPS,
which are frames of a video with a truth at every fifth and so 1, 2, 3, 4 here (`windows=(1, 2, 3, 4)`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .base import check_windows, mean
from .panoptic import Matches, QualityCounts, SegmentList, Segments, match_segments, shared_runs

Frame = tuple[np.ndarray, Segments, np.ndarray, Segments]
Overlaps = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def match_windows(frames: Sequence[Frame], window: int, num_classes: int) -> Iterator[Matches]:
    """Match the tubes of every window of a video.

    Args:
        frames: ids (H, W), segments, ids of the truth, segments of the truth, as of `PanopticMetric.update`; an id
            means the same object in all frames.
        window: number of frames.
        num_classes: K.

    Raises:
        ValueError: as `PanopticMetric.update`, or an id has several classes in one video.
    """
    yield from _slide(*_overlaps(frames, num_classes), window)


def _overlaps(frames: Sequence[Frame], num_classes: int) -> tuple[Overlaps, SegmentList, SegmentList]:
    """The pixels shared by pairs of segments in every frame, numbered through the video."""
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
    """The segments of a whole video; one that is a crowd in some frame is a crowd."""
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
    """VPQ over a dataset of videos; see the table of this module.

    Args:
        is_thing: of each class, whether it is a thing.
        windows: numbers of frames.
    """

    settings = ("is_thing", "windows")

    def __init__(self, is_thing: Sequence[bool], windows: Sequence[int] = (1, 2, 4, 6)):
        self.windows = check_windows(windows)
        super().__init__(is_thing, len(self.windows))

    def update(self, frames: Sequence[Frame]) -> None:
        """Add one whole video; arguments and errors as of `match_windows`."""
        overlaps = _overlaps(frames, len(self.is_thing))
        for quality, window in enumerate(self.windows):
            for matches in _slide(*overlaps, window):
                self._add(quality, matches)

    def compute(self, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """The scores, 0 to 1, over these classes (all for None).

        Returns:
            `vpq`, the mean over the windows, and `vpq_things`, `vpq_stuff` (a window without anything to score is left
            out, None if all are); `windows`: of each k what `PanopticMetric.compute` gives.
        """
        windows = {str(k): self._scores(quality, classes) for quality, k in enumerate(self.windows)}
        return {
            "vpq": mean(scores["pq"] for scores in windows.values()),
            **{f"vpq_{kind}": mean(scores[kind]["pq"] for scores in windows.values()) for kind in ("things", "stuff")},
            "windows": windows,
        }
