"""How the field scores a benchmark: sizes, background, groups of classes, and published results.

The facts stand with each benchmark, in the module of its reader. Sources of the sizes and conventions: detectron2's
evaluator of semantic segmentation, whose convention all papers of the field follow; the papers of GKC (Han et al.,
ICCV 2023; test sizes), MaskFormer (Cheng et al., 2021; ADE20K-847 at 512), ODISE and FC-CLIP (PASCAL VOC with a
background) and CAT-Seg (Cho et al., CVPR 2024; the 20 + 39 words of PASCAL VOC 20b).
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
    """
    How one benchmark is scored.

    Attributes:
        tasks: what is scored if nothing is asked for, tasks of `train.metrics`.
        short_side: the model sees images whose short side has so many pixels,
        long_side: unless the long one would exceed this.
        shrink_above: image and ground truth whose sides both exceed this are first resized so that the shorter one
            reaches it, the image bilinearly, the truth to nearest pixels; predictions are scored at that size.
        background_class: the class that stands for the background, None where that is not scored.
        background_words: vocabulary whose words ask for it.
        background_as: `names`: they are names of that one class, reduced as synonyms are; `classes`: each is a class,
            and what any of them wins becomes background.
        panoptic_threshold: lowest class score of a segment, exclusive, as in Mask2Former's configuration,
        panoptic_overlap: lowest share of its own mask that a segment has to win.
        groups: further groups of classes, by their names, that have scores of their own.
        note: what else a reader of the numbers should know.
    """

    tasks: tuple[str, ...] = ("semantic",)
    short_side: int = 800
    long_side: int = 1333
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
        """For the result file."""
        groups = {name: list(members) for name, members in self.groups.items()}
        return dataclasses.asdict(self) | {"tasks": list(self.tasks), "groups": groups}


# Rows of the table of published results, in its order: mIoU in per cent, as `ReportColumn.published` holds them.
GKC_R50 = "GKC, CLIP R-50 (Han et al., ICCV 2023, table 1)"
GKC_R101 = "GKC, R-101 (the same)"
GKC_R50_OPENTRANS = "GKC, R-50, re-run by OpenTrans (CVPR 2024)"
FC_CLIP_R50 = "FC-CLIP, R-50 (Yu et al., NeurIPS 2023)"
PUBLISHED_ROWS = (GKC_R50, GKC_R101, GKC_R50_OPENTRANS, FC_CLIP_R50)


@dataclass(frozen=True)
class ReportColumn:
    """
    Column of a benchmark in the table of results.

    Attributes:
        heading: Short name of the benchmark.
        position: Columns are ordered by it, and then by their headings.
        published: Row of the table -> mIoU in per cent. Rows that are not among `PUBLISHED_ROWS` follow these.
    """

    heading: str
    position: int = 100
    published: Mapping[str, float] = field(default_factory=dict)
