"""Semantic segmentation: mIoU and accuracies, from one confusion matrix over the whole dataset.

| score | convention |
| --- | --- |
| `miou` | mean over classes of TP / (TP + FP + FN), counted over all pixels of all images (not a mean over images) |
| class without ground truth | `absent="left_out"`: not in the mean, even if predicted; `"zero"`: 0 if predicted |
| `pixel_accuracy` | correct pixels / all pixels |
| `mean_accuracy` | mean over the classes with ground truth of correct pixels / pixels of the class |
| `frequency_weighted_iou` | IoU weighted by the fraction of pixels of the class |
| pixels with negative ground truth | ignored, regardless of the prediction |
| `scored_share` | scored pixels / all pixels; the other pixels are void |
| pixels without prediction | false negatives of their class, and false positives of none |

The four means are defined by Long et al., "Fully convolutional networks for semantic segmentation" (CVPR 2015), on the
confusion matrix of the dataset as in the PASCAL VOC challenge.
"""

import math
from collections.abc import Mapping, Sequence
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
    ratio,
)
from .score import Prediction, ReportedScore, Sample, Score

LEAST_SCORED, MOST_PREDICTED = 0.5, 0.95  # fractions of pixels beyond which a warning is reported


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of every pair of true and predicted class.

    Args:
        prediction: Predicted classes (H, W). Values outside 0..K - 1 count as void.
        truth: Ground truth classes (H, W). Pixels with a negative value are ignored.
        num_classes: Number K of classes.

    Returns:
        The confusion matrix (K, K + 1) int64 of ground truth by prediction, with void predictions in the last column.

    Raises:
        ValueError: If the sizes differ, an array is not of integers, or the ground truth has a value of K or more.
    """
    prediction, truth = check_maps(prediction, truth)
    check_truth(truth, num_classes)
    counted = truth >= 0
    truths, predictions = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
    predictions[(predictions < 0) | (predictions >= num_classes)] = num_classes
    pairs = np.bincount(truths * (num_classes + 1) + predictions, minlength=num_classes * (num_classes + 1))
    return pairs.reshape(num_classes, num_classes + 1)


def semantic_scores(
    confusion: np.ndarray, absent: str = "left_out", classes: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compute the scores of a confusion matrix.

    Args:
        confusion: Confusion matrix (K, K + 1) int64 from `confusion_matrix`.
        absent: Treatment of classes without ground truth in the mean IoU: `left_out` ignores them, `zero` counts them
            as 0 if they are predicted.
        classes: Classes to average over, such as the novel classes. None takes all classes. Confusions with other
            classes count, and pixels are those whose ground truth is one of the classes.

    Returns:
        `miou`, `pixel_accuracy`, `mean_accuracy` and `frequency_weighted_iou` in 0..1, or None if there is nothing to
        score, and lists over all K classes: `iou` and `accuracy` (None without ground truth), `pixels` of the ground
        truth, and `predicted`, the number of scored pixels with this prediction.

    Raises:
        ValueError: If `absent` or a class is unknown.
    """
    check_absent(absent)
    confusion = np.asarray(confusion, dtype=np.int64)
    num_classes = len(confusion)
    chosen = chosen_classes(classes, num_classes)
    right, pixels = np.diagonal(confusion).tolist(), confusion.sum(axis=1).tolist()
    predicted = confusion[:, :num_classes].sum(axis=0).tolist()
    iou = class_ious(right, pixels, predicted, absent)
    accuracy = [ratio(right[k], pixels[k]) for k in range(num_classes)]
    total = sum(pixels[k] for k in chosen)
    weighted = math.fsum(iou[k] * pixels[k] for k in chosen if pixels[k])
    return {
        "miou": mean(iou[k] for k in chosen),
        "pixel_accuracy": ratio(sum(right[k] for k in chosen), total),
        "mean_accuracy": mean(accuracy[k] for k in chosen),
        "frequency_weighted_iou": weighted / total if total else None,
        "iou": iou,
        "accuracy": accuracy,
        "pixels": pixels,
        "predicted": predicted,
    }


class SemanticMetric(Metric):
    """Semantic segmentation scores over a dataset, with the conventions of this module.

    Args:
        num_classes: Number K of classes.
    """

    settings = ("num_classes",)
    sums = ("confusion", "all_pixels")

    def __init__(self, num_classes: int):
        self.num_classes = check_num_classes(num_classes)
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        self.all_pixels = np.zeros(1, dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add one image, with the arguments and errors of `confusion_matrix`."""
        self.confusion += confusion_matrix(prediction, truth, self.num_classes)
        self.all_pixels += np.asarray(truth).size

    def compute(self, absent: str = "left_out", classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Compute `semantic_scores` and `scored_share`, the fraction of pixels with a class, or None without any."""
        scores = semantic_scores(self.confusion, absent, classes)
        return scores | {"scored_share": ratio(int(self.confusion.sum()), int(self.all_pixels[0])) or None}


class SemanticScore(Score):
    """Dataset-level mIoU and accuracies."""

    name = task = "semantic"
    class_means = {"miou": "iou", "mean_accuracy": "accuracy"}
    report = (
        ReportedScore(
            "miou",
            "mean_iou",
            "mIoU",
            table_note="mIoU in percent: one confusion matrix over the split, ignoring classes without ground truth.",
        ),
        ReportedScore("pixel_accuracy", "accuracy", "pixel accuracy"),
    )

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Create an empty score for the classes of a benchmark."""
        return cls(SemanticMetric(len(vocabulary)))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Accumulate the prediction and the ground truth of one image."""
        self.metric.update(prediction.classes, sample.truth)

    @classmethod
    def warnings(
        cls, scores: Mapping[str, float | None], columns: Mapping[str, Sequence], labels: Sequence[str]
    ) -> list[str]:
        """Warn if most of the ground truth is void, or if one class has nearly all predictions."""
        lines = []
        share = scores.get("scored_share")
        if share is not None and share < LEAST_SCORED:
            lines.append(
                f"Only {100 * share:.1f} % of the pixels have a class and are scored: predictions on the other pixels "
                "do not affect the scores."
            )
        predicted, true = ([value or 0 for value in columns.get(name, ())] for name in ("predicted", "pixels"))
        largest = max(range(len(predicted)), key=predicted.__getitem__, default=0)
        if len(labels) > 1 and sum(predicted) and predicted[largest] >= MOST_PREDICTED * sum(predicted):
            lines.append(
                f"{labels[largest]!r} has {100 * predicted[largest] / sum(predicted):.1f} % of the predictions and "
                f"{100 * true[largest] / max(sum(true), 1):.1f} % of the ground truth: check the predictions before "
                "relying on pixel accuracy."
            )
        return lines


SCORES = (SemanticScore,)
