"""Average precision of objects (Lin et al., "Microsoft COCO: common objects in context", ECCV 2014), by pycocotools.

| question | how it is done |
| --- | --- |
| `ap` | mean over IoU 0.50, 0.55, ..., 0.95 of masks, over 101 recalls and over the classes with ground truth |
| `ap50`, `ap75` | at IoU 0.50 and 0.75 alone |
| detections | the 100 of highest score of each class in each image; equal scores keep the order they were given in |
| crowd of the truth | `iscrowd`: detections on it are neither right nor wrong |
| void of the truth | ordinary background, as COCO has none: a detection on it is wrong |
| classes | those of `is_thing` (all by default); the others' truth and detections are left out |

Scores of detections are ranked over the whole dataset, so all are kept, as run lengths: memory grows with the images.
"""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from modeling_gkc.run_length import checked_runs
from modeling_gkc.vocabulary import Vocabulary

from .base import Metric, State, check_num_classes, chosen_classes
from .panoptic import NO_CLASS, SegmentList, Segments, shared_runs
from .score import Prediction, ReportedScore, Sample, Score

_COLUMNS = {"image": np.int64, "category_id": np.int64, "score": np.float64, "iscrowd": bool, "length": np.int64}
_KINDS = ("detections", "truths")


@dataclass
class _Image:
    """One image: its size, and each object as class, score, crowd and run lengths."""

    shape: tuple[int, int]
    detections: list[tuple[int, float, bool, bytes]] = field(default_factory=list)
    truths: list[tuple[int, float, bool, bytes]] = field(default_factory=list)


class InstanceMetric(Metric):
    """AP of objects over a dataset; see the table of this module.

    Args:
        num_classes: K.
        is_thing: of each class, whether it is scored; all if None.
    """

    settings = ("num_classes", "is_thing")

    def __init__(self, num_classes: int, is_thing: Sequence[bool] | None = None):
        self.num_classes = check_num_classes(num_classes)
        self.is_thing = [True] * num_classes if is_thing is None else [bool(thing) for thing in is_thing]
        if len(self.is_thing) != num_classes:
            raise ValueError(f"is_thing tells of {len(self.is_thing)} classes, num_classes is {num_classes}.")
        self.images: dict[str, _Image] = {}

    def update(
        self,
        image_id: str,
        detections: Sequence[Mapping[str, Any]],
        truth_ids: np.ndarray,
        truth_segments: Segments,
    ) -> None:
        """Add one image.

        Args:
            image_id: its name, unique.
            detections: `category_id`, `score` and `mask` of each: (H, W) bool, or run lengths as COCO writes them.
            truth_ids: (H, W) ints, id of the segment of each pixel, 0 void.
            truth_segments: `id`, `category_id` and `iscrowd` of each; left out are those of class -1 and without
                a pixel.

        Raises:
            ValueError: an image given twice, masks of another size, unknown ids or classes, a score that is no number.
            RuntimeError: pycocotools is missing.
        """
        image_id, truth_ids = str(image_id), np.asarray(truth_ids)
        if image_id in self.images:
            raise ValueError(f"Image {image_id!r} was added before; every image counts once.")
        image = _Image(tuple(truth_ids.shape))
        for segment in self._scored(truth_ids, truth_segments):
            mask = truth_ids == segment["id"]
            if mask.any():
                crowd = bool(segment.get("iscrowd", False))
                image.truths.append((int(segment["category_id"]), 0.0, crowd, _run_lengths(mask, image.shape)))
        for detection in detections:
            index, score = int(detection["category_id"]), float(detection["score"])
            if not 0 <= index < self.num_classes or not np.isfinite(score):
                raise ValueError(
                    f"Image {image_id!r}: a detection needs a class from 0 to {self.num_classes - 1} and a finite "
                    f"score, got {index} and {score}."
                )
            if self.is_thing[index]:
                image.detections.append((index, score, False, _run_lengths(detection["mask"], image.shape)))
        self.images[image_id] = image

    def _scored(self, truth_ids: np.ndarray, segments: Segments) -> list[Mapping[str, Any]]:
        SegmentList(segments, self.num_classes, "truth").places(
            shared_runs(truth_ids, truth_ids)[0]
        )  # refuses ids not listed
        return [s for s in segments if s["category_id"] != NO_CLASS and self.is_thing[s["category_id"]]]

    def merge(self, other: Self) -> None:
        """Add all images of another metric.

        Raises:
            ValueError: an image is in both, or the metrics differ in kind or settings.
        """
        self._check_like(other)
        both = sorted(self.images.keys() & other.images.keys())
        if both:
            raise ValueError(f"{len(both)} images are in both metrics, such as {both[:5]}; every image counts once.")
        self.images.update(other.images)

    def state(self) -> State:
        """Settings, names and sizes of the images, and of both kinds of objects their columns and joined run lengths.

        The images stand in the order of their names, so that the state does not depend on the order they came in.
        """
        names = sorted(self.images)
        state = super().state()
        state["images"] = np.array(names, dtype=np.str_)
        state["shapes"] = np.array([self.images[name].shape for name in names], dtype=np.int64).reshape(-1, 2)
        for kind in _KINDS:
            rows = [(place, *row) for place, name in enumerate(names) for row in getattr(self.images[name], kind)]
            columns = zip(*((*row[:-1], len(row[-1])) for row in rows), strict=True) if rows else [()] * len(_COLUMNS)
            for (column, dtype), values in zip(_COLUMNS.items(), columns, strict=True):
                state[f"{kind}_{column}"] = np.array(values, dtype=dtype)
            state[f"{kind}_runs"] = np.frombuffer(b"".join(row[-1] for row in rows), dtype=np.uint8).copy()
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """See `Metric.from_state`."""
        parts = ["images", "shapes", *(f"{kind}_{column}" for kind in _KINDS for column in (*_COLUMNS, "runs"))]
        if missing := sorted(set(parts) - set(state)):
            raise ValueError(f"This is no state of {cls.__name__}: it lacks {missing}.")
        metric = cls._from_settings(state)
        names, shapes = state["images"].tolist(), state["shapes"].tolist()
        metric.images = {name: _Image(tuple(shape)) for name, shape in zip(names, shapes, strict=True)}
        for kind in _KINDS:
            runs, start = np.asarray(state[f"{kind}_runs"]).tobytes(), 0
            columns = (state[f"{kind}_{column}"].tolist() for column in _COLUMNS)
            for place, index, score, crowd, length in zip(*columns, strict=True):
                row = (index, score, crowd, runs[start : start + length])
                image = metric.images[names[place]]
                checked_runs({"size": image.shape, "counts": row[-1]})  # pycocotools would read outside its memory
                getattr(image, kind).append(row)
                start += length
        return metric

    def compute(self, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """The scores, 0 to 1, over these classes (all for None).

        Returns:
            `ap`, `ap50`, `ap75` (None without ground truth), `per_class`: lists of the same three over all classes.
        """
        precision = _precision(self.images, [k for k in range(self.num_classes) if self.is_thing[k]])
        chosen = [k for k in chosen_classes(classes, self.num_classes) if self.is_thing[k]]
        per_class = [_class_ap(precision.get(k)) for k in range(self.num_classes)]
        means = {name: _mean_precision([precision[k][at] for k in chosen]) for name, at in _IOUS.items()}
        return {**means, "per_class": {name: [scores[name] for scores in per_class] for name in _IOUS}}


_IOUS = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}


def _class_ap(precision: np.ndarray | None) -> dict[str, float | None]:
    return {name: None if precision is None else _mean_precision([precision[at]]) for name, at in _IOUS.items()}


def _mean_precision(parts: list[np.ndarray]) -> float | None:
    """The mean of all precisions; those of classes without ground truth are -1."""
    scored = [part for part in parts if (part > -1).any()]
    return math.fsum(np.stack(scored).flat) / sum(part.size for part in scored) if scored else None


def _coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise RuntimeError("AP is taken by pycocotools: pip install pycocotools") from error
    return mask


def _run_lengths(mask: Any, shape: tuple[int, int]) -> bytes:
    """COCO's compressed run lengths of a mask (H, W) or of any run lengths."""
    if isinstance(mask, Mapping):
        runs, counts = checked_runs(mask, shape), mask["counts"]
        if not isinstance(counts, str | bytes | bytearray):
            counts = _coder().frPyObjects({"size": list(shape), "counts": runs.tolist()}, *shape)["counts"]
        return counts.encode() if isinstance(counts, str) else bytes(counts)
    mask = np.asarray(mask)
    if mask.shape != shape:
        raise ValueError(f"A mask is {mask.shape} (height, width), its image {shape}.")
    return _coder().encode(np.asfortranarray(mask.astype(bool), dtype=np.uint8))["counts"]


def _annotations(images: Mapping[str, _Image], names: Sequence[str], kind: str) -> list[dict[str, Any]]:
    coder, annotations = _coder(), []
    for place, name in enumerate(names):
        for index, score, crowd, counts in getattr(images[name], kind):
            code = {"size": list(images[name].shape), "counts": counts}
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 would be taken for "no match"
                    "image_id": place,
                    "category_id": index,
                    "score": score,
                    "iscrowd": int(crowd),
                    "area": float(coder.area(code)),
                    "bbox": coder.toBbox(code).tolist(),
                    "segmentation": code,
                }
            )
    return annotations


def _precision(images: Mapping[str, _Image], classes: Sequence[int]) -> dict[int, np.ndarray]:
    """Precision (10 IoUs, 101 recalls) of each class, -1 where it has no ground truth."""
    if not images:
        return {index: np.full((10, 101), -1.0) for index in classes}
    _coder()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names, sides = sorted(images), []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for kind in reversed(_KINDS):
            side = COCO()
            side.dataset = {
                "images": [
                    {"id": place, "height": images[name].shape[0], "width": images[name].shape[1]}
                    for place, name in enumerate(names)
                ],
                "categories": [{"id": index} for index in classes],
                "annotations": _annotations(images, names, kind),
            }
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "segm")
        # Only the numbers over all sizes with 100 detections are asked for: a quarter of the work.
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    return {index: precision[:, :, place] for place, index in enumerate(sorted(classes))}


class InstanceScore(Score):
    """Average precision of objects."""

    name = task = "instance"
    needs = ("instances",)
    needs_kinds = True
    class_means = {"ap": "ap", "ap50": "ap50"}
    report = (ReportedScore("ap", "mask_ap", "mask AP"), ReportedScore("ap50", "mask_ap50", "mask AP50"))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """See `Score`."""
        return cls(InstanceMetric(len(vocabulary), vocabulary.is_thing))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        self.metric.update(sample.image_id, prediction.instances, sample.ids, sample.segments)


SCORES = (InstanceScore,)
