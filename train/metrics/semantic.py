"""Semantic segmentation: mIoU and its relatives, from one confusion matrix over the whole dataset.

| number | how it is taken |
| --- | --- |
| `miou` | mean over classes of TP / (TP + FP + FN), counted over all pixels of all images (not a mean over images) |
| class without ground truth | `absent="left_out"`: not in the mean, even if predicted; `"zero"`: 0 if predicted |
| `pixel_accuracy` | right pixels / all pixels |
| `mean_accuracy` | mean over the classes with ground truth of right pixels / pixels of the class |
| `frequency_weighted_iou` | IoU weighted by the class's share of the pixels |
| pixels with negative truth | left out of everything, whatever is predicted there |
| `scored_share` | scored pixels / all pixels: what the numbers above say nothing of is void |
| pixels without prediction | missed pixels of their class; no class is charged with them |

The four means are those of Long et al., "Fully convolutional networks for semantic segmentation" (CVPR 2015), on the
dataset's confusion matrix as in the PASCAL VOC challenge.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

from .base import Metric, check_absent, check_maps, check_num_classes, check_truth, chosen_classes, mean, ratio
from .score import Prediction, ReportedScore, Sample, Score

LEAST_SCORED, MOST_PREDICTED = 0.5, 0.95  # shares of pixels beyond which scores are warned of


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of every pair of true and predicted class.

    Args:
        prediction: (H, W) ints; what is no class (negative, or `num_classes` and beyond) counts as void.
        truth: (H, W) ints; pixels with a negative one are left out.
        num_classes: K.

    Returns:
        (K, K + 1) int64: truth by prediction, the last column for void predictions.

    Raises:
        ValueError: the sizes differ, an array does not hold whole numbers, or the truth holds K or more.
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
    """The scores of a confusion matrix.

    Args:
        confusion: (K, K + 1) int64, see `confusion_matrix`.
        absent: what a class without ground truth does to the mean IoU, `left_out` or `zero` (0 where it is predicted).
        classes: those that the means are taken over, such as the novel ones; all for None. Confusions with the other
            classes count, and the pixels are those whose truth is among the classes.

    Returns:
        `miou`, `pixel_accuracy`, `mean_accuracy`, `frequency_weighted_iou` (0 to 1; None where nothing is to be
        scored), and lists over all K classes: `iou`, `accuracy` (None without ground truth), `pixels` and
        `predicted`, the pixels that a class takes of those that are scored.

    Raises:
        ValueError: an unknown convention or class.
    """
    check_absent(absent)
    confusion = np.asarray(confusion, dtype=np.int64)
    num_classes = len(confusion)
    chosen = chosen_classes(classes, num_classes)
    right, pixels = np.diagonal(confusion).tolist(), confusion.sum(axis=1).tolist()
    predicted = confusion[:, :num_classes].sum(axis=0).tolist()
    unions = [a + b - c for a, b, c in zip(pixels, predicted, right, strict=True)]
    scored = pixels if absent == "left_out" else unions
    iou = [ratio(right[k], unions[k]) if scored[k] else None for k in range(num_classes)]
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
    """Scores of semantic segmentation over a dataset; see the table of this module.

    Args:
        num_classes: K.
    """

    settings = ("num_classes",)
    sums = ("confusion", "all_pixels")

    def __init__(self, num_classes: int):
        self.num_classes = check_num_classes(num_classes)
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        self.all_pixels = np.zeros(1, dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add one image; arguments and errors as of `confusion_matrix`."""
        self.confusion += confusion_matrix(prediction, truth, self.num_classes)
        self.all_pixels += np.asarray(truth).size

    def compute(self, absent: str = "left_out", classes: Sequence[int] | None = None) -> dict[str, Any]:
        """See `semantic_scores`; and `scored_share`, the share of all pixels that have a class, None if none has."""
        scores = semantic_scores(self.confusion, absent, classes)
        return scores | {"scored_share": ratio(int(self.confusion.sum()), int(self.all_pixels[0])) or None}


class SemanticScore(Score):
    """Dataset-level mIoU and its relatives."""

    name = task = "semantic"
    class_means = {"miou": "iou", "mean_accuracy": "accuracy"}
    report = (
        ReportedScore(
            "miou",
            "mean_iou",
            "mIoU",
            table_note="mIoU in per cent: one confusion matrix over the split, classes without ground truth left out.",
        ),
        ReportedScore("pixel_accuracy", "accuracy", "pixel accuracy"),
    )

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """See `Score`."""
        return cls(SemanticMetric(len(vocabulary)))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        self.metric.update(prediction.classes, sample.truth)

    @classmethod
    def warnings(
        cls, scores: Mapping[str, float | None], columns: Mapping[str, Sequence], labels: Sequence[str]
    ) -> list[str]:
        """Warn if much of the truth is void, or if one class takes nearly all predictions."""
        lines = []
        share = scores.get("scored_share")
        if share is not None and share < LEAST_SCORED:
            lines.append(
                f"only {100 * share:.1f} % of the pixels have a class and are scored: what the model shows on the "
                "others counts for nothing, however wrong."
            )
        predicted, true = ([value or 0 for value in columns.get(name, ())] for name in ("predicted", "pixels"))
        largest = max(range(len(predicted)), key=predicted.__getitem__, default=0)
        if len(labels) > 1 and sum(predicted) and predicted[largest] >= MOST_PREDICTED * sum(predicted):
            lines.append(
                f"{labels[largest]!r} takes {100 * predicted[largest] / sum(predicted):.1f} % of the predictions, and "
                f"is {100 * true[largest] / max(sum(true), 1):.1f} % of the truth: look at the maps before you trust "
                "pixel accuracy."
            )
        return lines


SCORES = (SemanticScore,)
