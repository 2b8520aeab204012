"""VPQ over windows of frames."""

from train.metrics import VideoPanopticMetric
from train.metrics.evaluate_module import SEGMENT_VIDEO, StreamingModule, segment_frames


class VideoPanopticQuality(StreamingModule):
    """VPQ over windows of frames. Conventions: `train.metrics.video_panoptic`.

    `evaluate.load(..., is_thing=[...])`; an example is a video: `ids` (T, H, W) and the `segments` of every frame.
    """

    metric_class = VideoPanopticMetric
    example = {"predictions": SEGMENT_VIDEO, "references": SEGMENT_VIDEO}

    def _update(self, prediction, reference):
        self.metric.update(segment_frames(prediction, reference))
