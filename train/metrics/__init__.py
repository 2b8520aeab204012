"""Segmentation metrics over whole datasets.

    metric = SemanticMetric(num_classes=150)
    for prediction, truth in ...:
        metric.update(prediction, truth)     # memory does not grow with the number of images
    metric.merge(metric_of_another_process)  # exact: bit-identical in any order
    np.savez("state.npz", **metric.state()); SemanticMetric.from_state(np.load("state.npz"))
    metric.compute()["miou"]

| class | scores | paper | conventions |
| --- | --- | --- | --- |
| `SemanticMetric` | mIoU, accuracies, frequency-weighted IoU | Long et al., CVPR 2015 | `train.metrics.semantic` |
| `BoundaryMetric` | boundary IoU | Cheng et al., CVPR 2021 | `train.metrics.boundary` |
| `PanopticMetric` | PQ, SQ, RQ; things and stuff | Kirillov et al., CVPR 2019 | `train.metrics.panoptic` |
| `InstanceMetric` | AP, AP50, AP75 | Lin et al., ECCV 2014; pycocotools | `train.metrics.instance` |
| `VideoPanopticMetric` | VPQ over windows of frames | Kim et al., CVPR 2020 | `train.metrics.video_panoptic` |
| `TrackingQualityMetric` | STQ, SQ, AQ | Weber et al., NeurIPS 2021 | `train.metrics.tracking` |
| `VideoConsistencyMetric` | mVC8, mVC16 | Miao et al., CVPR 2021 | `train.metrics.consistency` |

All scores are in 0..1, and None if there is nothing to score. A prediction has the size of its ground truth. Sums are
integers: pixels, or multiples of 2**-52 for sums of fractions, with an error of at most 2**-52 per summand.
`describe()` returns the conventions of all metrics. A new metric is one file in this folder, see
`train.metrics.score`. The folders in `train/metrics/modules` provide the metrics for `evaluate.load`.
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
    """Return the conventions of all metrics in Markdown."""
    modules = dict.fromkeys(score.__module__ for score in all_scores().values())
    return "\n\n".join(sys.modules[module].__doc__.strip() for module in modules) + "\n"
