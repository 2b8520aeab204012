"""Boundary IoU (Cheng et al., "Boundary IoU: improving object-centric image segmentation evaluation", CVPR 2021).

| aspect | convention |
| --- | --- |
| band of a class | pixels of the class within d of its contour: the mask minus its erosion by a square of 2 d + 1 |
| d | 2 % of the image diagonal, rounded, at least one pixel |
| image border | a contour, as in the paper: the mask ends at the border |
| score of a class | pixels in both bands / pixels in either band, each summed over all images |
| pixels with negative ground truth | set to void in the prediction before computing bands, and not counted |
| class without ground truth | as in `train.metrics.semantic` |

The paper scores individual masks (for AP and PQ); here the bands of classes are summed over the dataset, as for mIoU.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

from .base import (
    Metric,
    check_absent,
    check_maps,
    check_num_classes,
    check_truth,
    chosen_classes,
    class_ious,
    mean,
)
from .score import Prediction, ReportedScore, Sample, Score

_VOID = -1


def boundary_band(classes: np.ndarray, distance: int) -> np.ndarray:
    """Return the pixels of a class map with another class or the image border within a distance.

    Args:
        classes: Class map (H, W) of integers of at least -1.
        distance: Distance d in pixels, along rows and columns (a square of 2 d + 1 pixels).

    Returns:
        A mask (H, W) bool. The band of a class is its part within the mask of the class.
    """
    height, width = classes.shape
    band = np.ones((height, width), dtype=bool)
    if min(height, width) > 2 * distance:
        # A square has one class if no neighbors in it differ. This handles all classes at once, in constant time in d.
        across = _window_sums(classes[:, 1:] != classes[:, :-1], 2 * distance + 1, 2 * distance)
        down = _window_sums(classes[1:] != classes[:-1], 2 * distance, 2 * distance + 1)
        band[distance:-distance, distance:-distance] = (across + down) > 0
    return band


def _window_sums(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the sums (H - rows + 1, W - columns + 1) over all windows within (H, W)."""
    totals = np.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype=np.int32)
    np.cumsum(values, axis=0, dtype=np.int32, out=totals[1:, 1:])
    np.cumsum(totals, axis=1, out=totals)
    strips = totals[rows:] - totals[:-rows]
    return strips[:, columns:] - strips[:, :-columns]


def band_width(shape: tuple[int, int], width: float = 0.02) -> int:
    """Return d in pixels, a fraction of the diagonal of an image (height, width), at least one."""
    return max(1, round(width * math.hypot(*shape)))


def boundary_counts(prediction: np.ndarray, truth: np.ndarray, num_classes: int, width: float = 0.02) -> np.ndarray:
    """Count the pixels in the boundary bands of every class.

    Args:
        prediction: Predicted classes (H, W). Values outside 0..K - 1 are void.
        truth: Ground truth classes (H, W). Pixels with a negative value are ignored.
        num_classes: Number K of classes.
        width: Width d of the bands as a fraction of the image diagonal.

    Returns:
        Pixel counts (3, K) int64: in both bands, in the ground truth band and in the predicted band.

    Raises:
        ValueError: If the sizes differ, an array is not of integers, or the ground truth has a value of K or more.
    """
    prediction, truth = check_maps(prediction, truth)
    check_truth(truth, num_classes)
    known = truth >= 0
    truth = np.where(known, truth, _VOID).astype(np.int32)
    is_class = known & (prediction >= 0) & (prediction < num_classes)
    prediction = np.where(is_class, prediction, _VOID).astype(np.int32)
    distance = band_width(truth.shape, width)
    true_band = boundary_band(truth, distance) & known
    found_band = boundary_band(prediction, distance) & is_class
    both = true_band & found_band & (truth == prediction)
    counted = (truth[both], truth[true_band], prediction[found_band])
    return np.stack([np.bincount(classes, minlength=num_classes) for classes in counted]).astype(np.int64)


class BoundaryMetric(Metric):
    """Boundary IoU over a dataset, with the conventions of this module.

    Args:
        num_classes: Number K of classes.
        width: Width of the bands as a fraction of the image diagonal.
    """

    settings = ("num_classes", "width")
    sums = ("counts",)

    def __init__(self, num_classes: int, width: float = 0.02):
        if not 0 < width < 1:
            raise ValueError(f"`width` must be a fraction of the image diagonal between 0 and 1, got {width}.")
        self.num_classes, self.width = check_num_classes(num_classes), float(width)
        self.counts = np.zeros((3, num_classes), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add one image, with the first two arguments and the errors of `boundary_counts`."""
        self.counts += boundary_counts(prediction, truth, self.num_classes, self.width)

    def compute(self, absent: str = "left_out", classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Compute the boundary IoU.

        Args:
            absent: Treatment of classes without ground truth, as in `semantic_scores`.
            classes: Classes to average over. None takes all classes.

        Returns:
            `boundary_iou`, the mean over the classes, and `iou`, a list over all K classes, None without ground truth.
        """
        check_absent(absent)
        both, true, found = self.counts.tolist()
        iou = class_ious(both, true, found, absent)
        return {"boundary_iou": mean(iou[k] for k in chosen_classes(classes, self.num_classes)), "iou": iou}


class BoundaryScore(Score):
    """Dataset-level boundary IoU."""

    name = task = "boundary"
    class_means = {"boundary_iou": "iou"}
    report = (ReportedScore("boundary_iou", "boundary_iou", "boundary IoU"),)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Create an empty score for the classes of a benchmark."""
        return cls(BoundaryMetric(len(vocabulary)))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Accumulate the prediction and the ground truth of one image."""
        self.metric.update(prediction.classes, sample.truth)


SCORES = (BoundaryScore,)
