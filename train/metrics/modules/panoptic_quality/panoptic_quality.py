"""PQ, SQ and RQ."""

from train.metrics import PanopticMetric
from train.metrics.evaluate_module import SEGMENT_MAP, StreamingModule, class_map


class PanopticQuality(StreamingModule):
    """PQ, SQ and RQ. Conventions: `train.metrics.panoptic`.

    `evaluate.load(..., is_thing=[True, False, ...])`; an example is a map of `ids` (H, W) with its `segments`.
    """

    metric_class = PanopticMetric
    example = {"predictions": SEGMENT_MAP, "references": SEGMENT_MAP}

    def _update(self, prediction, reference):
        self.metric.update(
            class_map(prediction["ids"]), prediction["segments"], class_map(reference["ids"]), reference["segments"]
        )
