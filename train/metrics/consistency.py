"""Video consistency (Miao et al., "VSPW: a large-scale dataset for video scene parsing in the wild", CVPR 2021).

| question | how it is done |
| --- | --- |
| window of n | n consecutive frames, from every start that has n frames left |
| pixels of a window | those whose truth is one class in all n frames; a negative truth is none |
| score of a window | the share of those pixels whose prediction is that class in all n frames |
| score of a video | mean over its windows that have such pixels |
| mVCn | mean over the videos that have such a window; videos shorter than n frames have none |
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
    """The consistency of one video.

    Args:
        predictions: T maps (H, W) ints, or an array (T, H, W).
        truths: likewise; negative where nothing is to be scored.
        windows: numbers of frames.

    Returns:
        For each number of frames a multiple of 2**-52 (see `train.metrics.base`), None where the video has no window.

    Raises:
        ValueError: numbers or sizes of the maps differ, or they do not hold whole numbers.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"There are {len(predictions)} predictions and {len(truths)} truths of one video.")
    shares: list[list[int]] = [[] for _ in windows]
    for same, right in _streaks(predictions, truths):
        for window, shares_of_window in zip(windows, shares, strict=True):
            constant = same >= window
            pixels = int(np.count_nonzero(constant))
            if pixels:
                # Right in so many frames of constant truth: the prediction was constant, too.
                shares_of_window.append(as_fixed(np.count_nonzero(constant & (right >= window)), pixels))
    return [sum(listed) // len(listed) if listed else None for listed in shares]


def _streaks(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of every frame (H, W): how many frames the truth has stayed, and the prediction been right, up to this one."""
    same = right = before = None
    for prediction, truth in zip(predictions, truths, strict=True):
        prediction, truth = check_maps(prediction, truth)
        known = truth >= 0
        if before is None:
            same, right = (np.zeros(truth.shape, dtype=np.int32) for _ in range(2))
        elif truth.shape != before.shape:
            raise ValueError(f"The frames of a video must be of one size, got {before.shape} and {truth.shape}.")
        else:
            same *= truth == before
        same, right = (same + 1) * known, (right + 1) * (prediction == truth)
        before = truth
        yield same, right


class VideoConsistencyMetric(Metric):
    """Video consistency over a dataset of videos; see the table of this module.

    Args:
        windows: numbers of frames.
    """

    settings = ("windows",)
    sums = ("consistency_sums", "videos")
    exact_sums = ("consistency_sums",)

    def __init__(self, windows: Sequence[int] = (8, 16)):
        self.windows = check_windows(windows)
        self.consistency_sums = exact_sum(len(self.windows))
        self.videos = np.zeros(len(self.windows), dtype=np.int64)

    def update(self, predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> None:
        """Add one whole video; arguments and errors as of `video_consistency`."""
        for place, value in enumerate(video_consistency(predictions, truths, self.windows)):
            if value is not None:
                add_fixed(self.consistency_sums, place, value)
                self.videos[place] += 1

    def compute(self) -> dict[str, Any]:
        """`mVC8`, `mVC16` and so on (0 to 1, None without a window), and the `videos` that each is a mean over."""
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
        """See `Score`."""
        return cls(VideoConsistencyMetric())

    def frame(self, sample: Sample, prediction: Prediction) -> tuple:
        """Class maps of prediction and truth, in 16 bits."""
        return prediction.classes.astype(np.int16), sample.truth.astype(np.int16)

    def update_video(self, frames: list[tuple]) -> None:
        """See `VideoScore`."""
        predictions, truths = (np.stack(maps) for maps in zip(*frames, strict=True))
        self.metric.update(predictions, truths)


SCORES = (VideoConsistencyScore,)
