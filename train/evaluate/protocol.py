"""How the field scores each benchmark: sizes, background, and groups of classes.

Sources: detectron2's evaluator of semantic segmentation, whose convention all papers of the field follow; the papers
of GKC (Han et al., ICCV 2023; test sizes), MaskFormer (Cheng et al., 2021; ADE20K-847 at 512), ODISE and FC-CLIP
(PASCAL VOC with a background) and CAT-Seg (Cho et al., CVPR 2024; the 20 + 39 words of PASCAL VOC 20b).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.benchmarks import benchmark_named
from ..data.drawn_world.words import KEPT, NEVER_SEEN, SUB, VOID

TASKS = ("semantic", "panoptic", "instance", "video", "boundary")
COCO_PANOPTIC = "coco_panoptic_133"

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
        tasks: what is scored if nothing is asked for; `TASKS` says what there is.
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


_VOC_BACKGROUND = {"background_words": "pascal_voc_background_39"}

PROTOCOLS: dict[str, Protocol] = {
    COCO_PANOPTIC: Protocol(tasks=("semantic", "panoptic"), note="mIoU over 133, crowds count for it"),
    "coco_stuff_133": Protocol(note="COCO-Stuff's labels in the classes of COCO panoptic"),
    "coco_stuff_171": Protocol(),
    "ade20k_150": Protocol(),
    "ade20k_150_panoptic": Protocol(tasks=("semantic", "panoptic")),
    "ade20k_847": Protocol(shrink_above=512, note="scored at the reduced size, as all published numbers"),
    "pascal_voc_20": Protocol(note="the background is not scored"),
    "pascal_voc_21": Protocol(
        background_class=0, **_VOC_BACKGROUND, note="the background counts; its words are names of one class"
    ),
    "pascal_voc_20b": Protocol(
        background_class=20,
        **_VOC_BACKGROUND,
        background_as="classes",
        note="20 + 39 words are asked; what the 39 win is background",
    ),
    "pascal_context_59": Protocol(note="other labels and unlabelled pixels are not scored"),
    "pascal_context_459": Protocol(),
    "cityscapes_19": Protocol(),
    "cityscapes_panoptic_19": Protocol(tasks=("semantic", "panoptic")),
    "vspw_124": Protocol(tasks=("semantic", "video"), note="the whole validation split at 480p"),
    "vipseg_124": Protocol(
        tasks=("semantic", "video"), short_side=360, note="scored frame by frame; the paper tests videos at 360"
    ),
    "miniworld": Protocol(
        tasks=("semantic", "panoptic"),
        short_side=96,
        long_side=192,
        groups={"base": KEPT, "novel": SUB + VOID + NEVER_SEEN, "sub": SUB, "void": VOID, "never": NEVER_SEEN},
        note="a drawn world: comparable to nothing else",
    ),
}


def protocol_of(benchmark: str) -> Protocol:
    """
    The protocol of a benchmark.

    A variant, such as base or novel classes only, is scored as the benchmark whose classes it takes; one's own data,
    which no protocol names, by mIoU at the usual sizes.

    Raises:
        ValueError: there is no such benchmark.
    """
    vocabulary = benchmark_named(benchmark).vocabulary
    usual = Protocol(note="no published protocol: the usual sizes")
    return PROTOCOLS.get(benchmark) or PROTOCOLS.get(vocabulary) or usual


def reduced_size(size: tuple[int, int], shrink_above: int | None) -> tuple[int, int]:
    """
    Height and width at which an image is scored.

    Args:
        size: of the image.
        shrink_above: as in `Protocol`.
    """
    if shrink_above is None or min(size) <= shrink_above:
        return size
    scale = shrink_above / min(size)
    height, width = (shrink_above if side == min(size) else round(side * scale) for side in size)
    return height, width
