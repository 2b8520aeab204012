"""The numbers by which segmentation is judged, taken over whole datasets.

    metric = SemanticMetric(num_classes=150)
    for prediction, truth in ...:
        metric.update(prediction, truth)     # streams: memory does not grow with the images
    metric.merge(metric_of_another_process)  # exactly: the same bits in any order
    np.savez("state.npz", **metric.state()); SemanticMetric.from_state(np.load("state.npz"))
    metric.compute()["miou"]

| class | numbers | paper | all conventions |
| --- | --- | --- | --- |
| `SemanticMetric` | mIoU, accuracies, frequency-weighted IoU | Long et al., CVPR 2015 | `train.metrics.semantic` |
| `BoundaryMetric` | boundary IoU | Cheng et al., CVPR 2021 | `train.metrics.boundary` |
| `PanopticMetric` | PQ, SQ, RQ; things and stuff | Kirillov et al., CVPR 2019 | `train.metrics.panoptic` |
| `InstanceMetric` | AP, AP50, AP75 | Lin et al., ECCV 2014; pycocotools | `train.metrics.instance` |
| `VideoPanopticMetric` | VPQ over windows of frames | Kim et al., CVPR 2020 | `train.metrics.video_panoptic` |
| `TrackingQualityMetric` | STQ, SQ, AQ | Weber et al., NeurIPS 2021 | `train.metrics.tracking` |
| `VideoConsistencyMetric` | mVC8, mVC16 | Miao et al., CVPR 2021 | `train.metrics.consistency` |

All scores are 0 to 1; None stands where nothing is to be scored. A prediction has the size of its truth. Sums are
whole numbers: pixels, or multiples of 2**-52 where shares are summed, which costs at most 2**-52 per summand.
`describe()` gives all tables. A new metric is a file of this folder, see `train.metrics.score`. The folders below
`train/metrics/modules` are the same for `evaluate.load`.
"""

import sys

from .base import harmonic_mean
from .boundary import BoundaryMetric, boundary_band, boundary_counts
from .consistency import VideoConsistencyMetric, video_consistency
from .instance import InstanceMetric
from .panoptic import PanopticMetric, match_image, match_segments
from .score import all_scores
from .semantic import SemanticMetric, confusion_matrix, semantic_scores
from .tracking import TrackingQualityMetric, association
from .video_panoptic import VideoPanopticMetric, match_windows

__all__ = [
    "BoundaryMetric",
    "InstanceMetric",
    "PanopticMetric",
    "SemanticMetric",
    "TrackingQualityMetric",
    "VideoConsistencyMetric",
    "VideoPanopticMetric",
    "all_scores",
    "association",
    "boundary_band",
    "boundary_counts",
    "confusion_matrix",
    "describe",
    "harmonic_mean",
    "match_image",
    "match_segments",
    "match_windows",
    "semantic_scores",
    "video_consistency",
]


def describe() -> str:
    """Which convention each number follows, as Markdown."""
    modules = dict.fromkeys(score.__module__ for score in all_scores().values())
    return "\n\n".join(sys.modules[module].__doc__.strip() for module in modules) + "\n"
