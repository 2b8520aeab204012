"""STQ, SQ and AQ."""

from train.metrics import TrackingQualityMetric
from train.metrics.evaluate_module import SEGMENT_VIDEO, StreamingModule, segment_frames


class TrackingQuality(StreamingModule):
    """STQ, SQ and AQ. Conventions: `train.metrics.tracking`.

    `evaluate.load(..., is_thing=[...])`; an example is a video: `ids` (T, H, W) and the `segments` of every frame.
    """

    metric_class = TrackingQualityMetric
    example = {"predictions": SEGMENT_VIDEO, "references": SEGMENT_VIDEO}

    def _update(self, prediction, reference):
        self.metric.update(segment_frames(prediction, reference))
