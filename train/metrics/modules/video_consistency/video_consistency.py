"""mVC8 and mVC16."""

from train.metrics import VideoConsistencyMetric
from train.metrics.evaluate_module import CLASS_MAP, StreamingModule, class_map


class VideoConsistency(StreamingModule):
    """mVC8 and mVC16. Conventions: `train.metrics.consistency`.

    An example is a video: maps of classes (T, H, W), negative where nothing is scored.
    """

    metric_class = VideoConsistencyMetric
    example = {"predictions": [CLASS_MAP], "references": [CLASS_MAP]}

    def _update(self, prediction, reference):
        self.metric.update(class_map(prediction), class_map(reference))
