"""Video consistency (Miao et al., "VSPW: a large-scale dataset for video scene parsing in the wild", CVPR 2021).

| aspect | convention |
| --- | --- |
| window of n | n consecutive frames, at every start with n frames left |
| pixels of a window | pixels whose ground truth is one class (non-negative) in all n frames |
| score of a window | the fraction of those pixels whose prediction is that class in all n frames |
| score of a video | mean over its windows with such pixels |
| mVCn | mean over the videos with such a window; videos shorter than n frames have none |
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

from .base import Metric, add_fixed, as_fixed, check_maps, check_windows, exact_sum, exact_values
from .score import Prediction, ReportedScore, Sample, VideoScore


def video_consistency(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], windows: Sequence[int] = (8, 16)
) -> list[int | None]:
    """Return the video consistency of one video.

    Args:
        predictions: Predicted class maps (T, H, W) of T frames.
        truths: Ground truth class maps (T, H, W), negative for ignored pixels.
        windows: Window lengths in frames.

    Returns:
        The consistency for each window length as a multiple of 2**-52 (see `train.metrics.base`), or None if the video
        has no window.

    Raises:
        ValueError: If the number or size of the maps differs, or they are not integers.
    """
    if len(predictions) != len(truths):
        raise ValueError(
            f"A video has {len(predictions)} predictions and {len(truths)} ground truth maps: pass one of each per "
            "frame."
        )
    shares: list[list[int]] = [[] for _ in windows]
    for same, right in _streaks(predictions, truths):
        for window, shares_of_window in zip(windows, shares, strict=True):
            constant = same >= window
            pixels = int(np.count_nonzero(constant))
            if pixels:
                # A prediction that is correct in all frames of constant ground truth is constant, too.
                shares_of_window.append(as_fixed(np.count_nonzero(constant & (right >= window)), pixels))
    return [sum(listed) // len(listed) if listed else None for listed in shares]


def _streaks(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each frame the numbers of frames (H, W) with constant ground truth and correct prediction up to it."""
    same = right = before = None
    for prediction, truth in zip(predictions, truths, strict=True):
        prediction, truth = check_maps(prediction, truth)
        known = truth >= 0
        if before is None:
            same, right = (np.zeros(truth.shape, dtype=np.int32) for _ in range(2))
        elif truth.shape != before.shape:
            raise ValueError(f"The frames of a video must have the same size, got {before.shape} and {truth.shape}.")
        else:
            same *= truth == before
        same, right = (same + 1) * known, (right + 1) * (prediction == truth)
        before = truth
        yield same, right


class VideoConsistencyMetric(Metric):
    """Video consistency over a dataset of videos, with the conventions of this module.

    Args:
        windows: Window lengths in frames.
    """

    settings = ("windows",)
    sums = ("consistency_sums", "videos")
    exact_sums = ("consistency_sums",)

    def __init__(self, windows: Sequence[int] = (8, 16)):
        self.windows = check_windows(windows)
        self.consistency_sums = exact_sum(len(self.windows))
        self.videos = np.zeros(len(self.windows), dtype=np.int64)

    def update(self, predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> None:
        """Add one whole video, with the arguments and errors of `video_consistency`."""
        for place, value in enumerate(video_consistency(predictions, truths, self.windows)):
            if value is not None:
                add_fixed(self.consistency_sums, place, value)
                self.videos[place] += 1

    def compute(self) -> dict[str, Any]:
        """Return `mVC8`, `mVC16`, ... in 0..1, or None without a window, and the number of `videos` of each mean."""
        sums, videos = exact_values(self.consistency_sums), self.videos.tolist()
        scores = {
            f"mVC{window}": total / number if number else None
            for window, total, number in zip(self.windows, sums, videos, strict=True)
        }
        return {**scores, "videos": dict(zip(map(str, self.windows), videos, strict=True))}


class VideoConsistencyScore(VideoScore):
    """Consistency of class maps over the frames of a video."""

    name = task = "video"
    report = (ReportedScore("mVC8", "mvc8", "mVC8"), ReportedScore("mVC16", "mvc16", "mVC16"))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Create an empty score; the classes are read from the label maps of the frames."""
        return cls(VideoConsistencyMetric())

    def frame(self, sample: Sample, prediction: Prediction) -> tuple:
        """Return the class maps of prediction and ground truth as 16-bit integers."""
        return prediction.classes.astype(np.int16), sample.truth.astype(np.int16)

    def update_video(self, frames: list[tuple]) -> None:
        """See `VideoScore`."""
        predictions, truths = (np.stack(maps) for maps in zip(*frames, strict=True))
        self.metric.update(predictions, truths)


SCORES = (VideoConsistencyScore,)
