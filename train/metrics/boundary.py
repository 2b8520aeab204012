"""Boundary IoU (Cheng et al., "Boundary IoU: improving object-centric image segmentation evaluation", CVPR 2021).

| question | how it is done |
| --- | --- |
| band of a class | pixels of the class within d of its contour: the mask less its erosion by a square of 2 d + 1 |
| d | 2 % of the image's diagonal, rounded, at least one pixel |
| edge of the image | a contour, as in the paper: beyond it nothing belongs to the mask |
| score of a class | pixels that are in both bands / pixels that are in either, each summed over all images |
| pixels with negative truth | void in the prediction too before the bands are taken, then not counted |
| class without ground truth | as in `train.metrics.semantic` |

The paper scores masks one by one (for AP and PQ); here the classes' bands are summed over the dataset as mIoU does.
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
    mean,
    ratio,
)
from .score import Prediction, ReportedScore, Sample, Score

_VOID = -1


def boundary_band(classes: np.ndarray, distance: int) -> np.ndarray:
    """Where a map of classes has another class, or the outside of the image, within a distance.

    Args:
        classes: (H, W) ints, at least -1.
        distance: d in pixels, along rows and columns (the square of 2 d + 1 pixels around the pixel is looked at).

    Returns:
        (H, W) bool: for every class, its band is where this holds within its mask.
    """
    height, width = classes.shape
    band = np.ones((height, width), dtype=bool)
    if min(height, width) > 2 * distance:
        # A square is of one class if no two neighbours in it differ: all classes at once, at one price for every d.
        across = _window_sums(classes[:, 1:] != classes[:, :-1], 2 * distance + 1, 2 * distance)
        down = _window_sums(classes[1:] != classes[:-1], 2 * distance, 2 * distance + 1)
        band[distance:-distance, distance:-distance] = (across + down) > 0
    return band


def _window_sums(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(H - rows + 1, W - columns + 1) sums over all windows that lie within (H, W)."""
    totals = np.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype=np.int32)
    np.cumsum(values, axis=0, dtype=np.int32, out=totals[1:, 1:])
    np.cumsum(totals, axis=1, out=totals)
    strips = totals[rows:] - totals[:-rows]
    return strips[:, columns:] - strips[:, :-columns]


def band_width(shape: tuple[int, int], width: float = 0.02) -> int:
    """d in pixels: a share of the diagonal of an image (height, width), at least one."""
    return max(1, round(width * math.hypot(*shape)))


def boundary_counts(prediction: np.ndarray, truth: np.ndarray, num_classes: int, width: float = 0.02) -> np.ndarray:
    """Count the pixels of every class's bands.

    Args:
        prediction: (H, W) ints; what is no class is void.
        truth: (H, W) ints; pixels with a negative one are left out.
        num_classes: K.
        width: d as a share of the image's diagonal.

    Returns:
        (3, K) int64: pixels in both bands, in the band of the truth, in that of the prediction.

    Raises:
        ValueError: the sizes differ, an array does not hold whole numbers, or the truth holds K or more.
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
    """Boundary IoU over a dataset; see the table of this module.

    Args:
        num_classes: K.
        width: of the bands, as a share of the image's diagonal.
    """

    settings = ("num_classes", "width")
    sums = ("counts",)

    def __init__(self, num_classes: int, width: float = 0.02):
        if not 0 < width < 1:
            raise ValueError(f"width must be a share of the image's diagonal between 0 and 1, got {width}.")
        self.num_classes, self.width = check_num_classes(num_classes), float(width)
        self.counts = np.zeros((3, num_classes), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add one image; arguments and errors as of `boundary_counts`."""
        self.counts += boundary_counts(prediction, truth, self.num_classes, self.width)

    def compute(self, absent: str = "left_out", classes: Sequence[int] | None = None) -> dict[str, Any]:
        """The mean `boundary_iou` over the classes (all for None), and the list `iou` over all K classes.

        `absent` is as in `semantic_scores`; a class without ground truth has None.
        """
        check_absent(absent)
        both, true, found = self.counts.tolist()
        unions = [a + b - c for a, b, c in zip(true, found, both, strict=True)]
        scored = true if absent == "left_out" else unions
        iou = [ratio(both[k], unions[k]) if scored[k] else None for k in range(self.num_classes)]
        return {"boundary_iou": mean(iou[k] for k in chosen_classes(classes, self.num_classes)), "iou": iou}


class BoundaryScore(Score):
    """Dataset-level boundary IoU."""

    name = task = "boundary"
    class_means = {"boundary_iou": "iou"}
    report = (ReportedScore("boundary_iou", "boundary_iou", "boundary IoU"),)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """See `Score`."""
        return cls(BoundaryMetric(len(vocabulary)))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        self.metric.update(prediction.classes, sample.truth)


SCORES = (BoundaryScore,)
