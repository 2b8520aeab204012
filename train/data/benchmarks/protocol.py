"""Evaluation protocols of benchmarks: image sizes, background, groups of classes and published results.

The protocol of each benchmark is defined in the module of its reader. The sizes and conventions follow detectron2's
semantic segmentation evaluator and the papers of GKC (Han et al., ICCV 2023; test sizes), MaskFormer (Cheng et al.,
2021; ADE20K-847 at 512), ODISE and FC-CLIP (PASCAL VOC with a background) and CAT-Seg (Cho et al., CVPR 2024; the
20 + 39 words of PASCAL VOC 20b).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESIZING = (
    "mask logits are resampled once to the scored pixels (bilinear), then sigmoid, sum over queries, arg-max; "
    "that sum is linear, so only the place of the sigmoid distinguishes this from resampling the score maps"
)
ABSENT = "classes without ground truth in the split are left out of means; pixels without a class are not scored"


@dataclass(frozen=True)
class Protocol:
    """Evaluation protocol of one benchmark.

    Attributes:
        tasks: Default tasks, as in `train.metrics`.
        short_side: Shorter side of the model input in pixels, limited by `long_side`; None takes that of the
            checkpoint.
        long_side: Maximum longer side of the model input in pixels; None takes that of the checkpoint.
        shrink_above: Images with both sides above this value are first resized, together with their ground truth, so
            that the shorter side has this many pixels (bilinear for images, nearest for ground truth). Predictions are
            scored at that size. None does not resize.
        background_class: Train id of the background class, or None if the background is not scored.
        background_words: Packaged vocabulary of the words that prompt the background class.
        background_as: `names` uses the words as names of the background class, reduced like synonyms; `classes` uses
            each word as a class and maps them all to the background.
        panoptic_threshold: Minimum class score of a panoptic segment, exclusive, as in Mask2Former's configuration.
        panoptic_overlap: Minimum fraction of its own mask that a panoptic segment must win.
        resizing: Description of how predictions are resized.
        absent_classes: Description of how classes without ground truth are treated.
        groups: Further named groups of classes with separate scores.
        note: Further remarks on the scores.
    """

    tasks: tuple[str, ...] = ("semantic",)
    short_side: int | None = 800
    long_side: int | None = 1333
    shrink_above: int | None = None
    background_class: int | None = None
    background_words: str | None = None
    background_as: str = "names"
    panoptic_threshold: float = 0.8
    panoptic_overlap: float = 0.8
    resizing: str = RESIZING
    absent_classes: str = ABSENT
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol as a dictionary for the result file."""
        groups = {name: list(members) for name, members in self.groups.items()}
        return dataclasses.asdict(self) | {"tasks": list(self.tasks), "groups": groups}


# Rows of the table of published results (mIoU in percent) in order; `ReportColumn.published` contains the values.
GKC_R50 = "GKC, CLIP R-50 (Han et al., ICCV 2023, table 1)"
GKC_R101 = "GKC, R-101 (the same)"
GKC_R50_OPENTRANS = "GKC, R-50, re-run by OpenTrans (CVPR 2024)"
FC_CLIP_R50 = "FC-CLIP, R-50 (Yu et al., NeurIPS 2023)"
PUBLISHED_ROWS = (GKC_R50, GKC_R101, GKC_R50_OPENTRANS, FC_CLIP_R50)


@dataclass(frozen=True)
class ReportColumn:
    """Column of a benchmark in the table of results.

    Attributes:
        heading: Short name of the benchmark.
        position: Sort key of the columns; columns with equal keys are sorted by heading.
        published: Published mIoU in percent by table row. Rows that are not in `PUBLISHED_ROWS` come last.
    """

    heading: str
    position: int = 100
    published: Mapping[str, float] = field(default_factory=dict)
