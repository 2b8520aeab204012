"""Dataset-level boundary IoU."""

from train.metrics import BoundaryMetric
from train.metrics.evaluate_module import CLASS_MAP, StreamingModule, class_map


class BoundaryIoU(StreamingModule):
    """Dataset-level boundary IoU. Conventions: `train.metrics.boundary`.

    `evaluate.load(..., num_classes=K)`; an example is a map of classes (H, W), negative where nothing is scored.
    """

    metric_class = BoundaryMetric
    example = {"predictions": CLASS_MAP, "references": CLASS_MAP}

    def _update(self, prediction, reference):
        self.metric.update(class_map(prediction), class_map(reference))
