"""Base class for metric modules of Hugging Face's `evaluate` library.

    metric = evaluate.load("train/metrics/modules/mean_iou", num_classes=150)
    metric.add(prediction=prediction, reference=truth)
    metric.compute(absent="left_out")["miou"]

Run it from the root of the repository, so that the modules can import `train`. Nothing is downloaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value

from .base import Metric

CLASS_MAP = [[Value("int32")]]
SEGMENTS = [{"id": Value("int32"), "category_id": Value("int32"), "iscrowd": Value("bool")}]
SEGMENT_MAP = {"ids": CLASS_MAP, "segments": SEGMENTS}
SEGMENT_VIDEO = {"ids": [CLASS_MAP], "segments": [SEGMENTS]}

_EVALUATE_OPTIONS = {"cache_dir", "experiment_id", "hash", "keep_in_memory", "max_concurrent_cache_files", "seed"}
_EVALUATE_OPTIONS |= {"timeout"}


class StreamingModule(evaluate.Metric, ABC):
    """`evaluate.Metric` that updates its sums with every example, instead of storing all examples until `compute`.

    Subclasses define the metric, the features of an example and how an example is added. `evaluate.load` accepts the
    arguments of the metric, and `compute` those of its `compute`. After `compute` the module is reset.
    """

    metric_class: type[Metric]
    example: Mapping[str, Any]

    def __init__(self, config_name: str | None = None, num_process: int = 1, process_id: int = 0, **options: Any):
        if num_process != 1:
            raise ValueError(
                f"num_process must be 1, got {num_process}: create a `{self.metric_class.__name__}` of train.metrics "
                "in every process and merge them, which is exact."
            )
        evaluate_own = {name: options.pop(name) for name in _EVALUATE_OPTIONS & options.keys()}
        super().__init__(config_name, **evaluate_own)
        self._options = options
        self.metric, self._examples = self.metric_class(**self._options), 0

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=f"\n\nExamples: {self.example}",
            features=Features(self.example),
        )

    @abstractmethod
    def _update(self, prediction: Any, reference: Any) -> None:
        """Add one example to `self.metric`."""

    def __len__(self) -> int:
        return self._examples

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one example."""
        self._update(prediction, reference)
        self._examples += 1

    def add_batch(self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None) -> None:
        """Add several examples."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Compute the scores of all added examples and reset the metric.

        Args:
            predictions: Predictions of further examples to add first.
            references: Ground truth of the further examples.
            **options: Arguments of the metric's `compute`.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self.metric.compute(**options)
        self.metric, self._examples = self.metric_class(**self._options), 0
        return scores


def class_map(example: Any) -> np.ndarray:
    """Convert an array, a tensor or lists to a map of classes or ids."""
    return np.asarray(example)


def segment_frames(prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> list[tuple]:
    """Return the frames of a video from its ids (T, H, W) and the segments of every frame."""
    columns = (prediction["ids"], prediction["segments"], reference["ids"], reference["segments"])
    return [
        (class_map(ids), segments, class_map(truth_ids), truth_segments)
        for ids, segments, truth_ids, truth_segments in zip(*columns, strict=True)
    ]
