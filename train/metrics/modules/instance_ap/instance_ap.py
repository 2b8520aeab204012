"""AP, AP50 and AP75 of objects."""

from datasets import Value

from train.metrics import InstanceMetric
from train.metrics.evaluate_module import CLASS_MAP, SEGMENT_MAP, StreamingModule, class_map

_DETECTIONS = [{"category_id": Value("int32"), "score": Value("float64"), "mask": CLASS_MAP}]


class InstanceAP(StreamingModule):
    """AP, AP50 and AP75 of objects. Conventions: `train.metrics.instance`.

    `evaluate.load(..., num_classes=K)`; an example is a list of detections, and a map of `ids` (H, W) with `segments`.
    """

    metric_class = InstanceMetric
    example = {"predictions": _DETECTIONS, "references": {"image_id": Value("string"), **SEGMENT_MAP}}

    def _update(self, prediction, reference):
        self.metric.update(reference["image_id"], prediction, class_map(reference["ids"]), reference["segments"])
