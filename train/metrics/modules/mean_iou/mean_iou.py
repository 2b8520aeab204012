"""Dataset-level mIoU, accuracies and frequency-weighted IoU."""

from train.metrics import SemanticMetric
from train.metrics.evaluate_module import CLASS_MAP, StreamingModule, class_map


class MeanIoU(StreamingModule):
    """Dataset-level mIoU, accuracies and frequency-weighted IoU. Conventions: `train.metrics.semantic`.

    `evaluate.load(..., num_classes=K)`; an example is a map of classes (H, W), negative where nothing is scored.
    """

    metric_class = SemanticMetric
    example = {"predictions": CLASS_MAP, "references": CLASS_MAP}

    def _update(self, prediction, reference):
        self.metric.update(class_map(prediction), class_map(reference))
