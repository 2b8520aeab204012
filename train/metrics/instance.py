"""Mask average precision (Lin et al., "Microsoft COCO: common objects in context", ECCV 2014), with pycocotools.

| aspect | convention |
| --- | --- |
| `ap` | mean over IoU 0.50, 0.55, ..., 0.95 of masks, over 101 recalls and over the classes with ground truth |
| `ap50`, `ap75` | AP at IoU 0.50 and 0.75 |
| detections | the 100 detections of each class and image with the highest scores; the order of equal scores is kept |
| ground truth crowds | detections on segments with `iscrowd` are ignored |
| ground truth void | background, since COCO has no void: a detection on it is a false positive |
| classes | those of `is_thing` (all by default); ground truth and detections of other classes are ignored |

Detections are ranked over the whole dataset and are stored as run lengths, so that memory grows with the images.
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
    """Image size (height, width) and the objects of an image as tuples of class, score, crowd and run lengths."""

    shape: tuple[int, int]
    detections: list[tuple[int, float, bool, bytes]] = field(default_factory=list)
    truths: list[tuple[int, float, bool, bytes]] = field(default_factory=list)


class InstanceMetric(Metric):
    """Mask AP over a dataset, with the conventions of this module.

    Args:
        num_classes: Number K of classes.
        is_thing: Whether each class is scored. None scores all classes.
    """

    settings = ("num_classes", "is_thing")

    def __init__(self, num_classes: int, is_thing: Sequence[bool] | None = None):
        self.num_classes = check_num_classes(num_classes)
        self.is_thing = [True] * num_classes if is_thing is None else [bool(thing) for thing in is_thing]
        if len(self.is_thing) != num_classes:
            raise ValueError(f"`is_thing` has {len(self.is_thing)} entries, but `num_classes` is {num_classes}.")
        self.images: dict[str, _Image] = {}

    def update(
        self,
        image_id: str,
        detections: Sequence[Mapping[str, Any]],
        truth_ids: np.ndarray,
        truth_segments: Segments,
    ) -> None:
        """Accumulate the prediction and the ground truth of one image.

        Args:
            image_id: Unique id of the image.
            detections: Detections with `category_id`, `score` and `mask`, a mask (H, W) bool or COCO run lengths.
            truth_ids: Ground truth segment id of each pixel (H, W), 0 for void.
            truth_segments: Ground truth segments with `id`, `category_id` and `iscrowd`. Segments of class -1 or
                without pixels are ignored.

        Raises:
            ValueError: If the image was added before, a mask has another size, an id or class is unknown, or a score
                is not finite.
            RuntimeError: If pycocotools is not installed.
        """
        image_id, truth_ids = str(image_id), np.asarray(truth_ids)
        if image_id in self.images:
            raise ValueError(f"Image {image_id!r} was added before: add every image once.")
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
        )  # raises if an id is not listed
        return [s for s in segments if s["category_id"] != NO_CLASS and self.is_thing[s["category_id"]]]

    def merge(self, other: Self) -> None:
        """Add all images of another metric.

        Raises:
            ValueError: If an image is in both metrics, or their types or settings differ.
        """
        self._check_like(other)
        both = sorted(self.images.keys() & other.images.keys())
        if both:
            raise ValueError(f"{len(both)} images are in both metrics, such as {both[:5]}; every image counts once.")
        self.images.update(other.images)

    def state(self) -> State:
        """Return the settings, the image names and sizes, and the columns and joined run lengths of all objects.

        Images are sorted by name, so that the state does not depend on the order of updates.
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
        """Restore a metric from its state."""
        parts = ["images", "shapes", *(f"{kind}_{column}" for kind in _KINDS for column in (*_COLUMNS, "runs"))]
        if missing := sorted(set(parts) - set(state)):
            raise ValueError(f"Invalid state of {cls.__name__}: it lacks {missing}.")
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
        """Compute the scores of classes in 0..1.

        Args:
            classes: Classes to average over. None takes all classes.

        Returns:
            `ap`, `ap50` and `ap75`, or None without ground truth, and `per_class`, lists of the same scores for all
            classes.
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
    """Return the mean of all precisions, ignoring classes without ground truth, whose precisions are -1."""
    scored = [part for part in parts if (part > -1).any()]
    return math.fsum(np.stack(scored).flat) / sum(part.size for part in scored) if scored else None


def _coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise RuntimeError("AP requires pycocotools: pip install pycocotools") from error
    return mask


def _run_lengths(mask: Any, shape: tuple[int, int]) -> bytes:
    """Return the compressed COCO run lengths of a mask (H, W) or of uncompressed run lengths."""
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
                    "id": len(annotations) + 1,  # pycocotools treats 0 as "no match"
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
    """Return the precision (10 IoUs, 101 recalls) of each class, -1 without ground truth."""
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
        # Computing only the scores over all sizes with 100 detections takes a quarter of the time.
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    return {index: precision[:, :, place] for place, index in enumerate(sorted(classes))}


class InstanceScore(Score):
    """Mask average precision."""

    name = task = "instance"
    needs = ("instances",)
    needs_kinds = True
    class_means = {"ap": "ap", "ap50": "ap50"}
    report = (ReportedScore("ap", "mask_ap", "mask AP"), ReportedScore("ap50", "mask_ap50", "mask AP50"))

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Create an empty score for the classes of a benchmark."""
        return cls(InstanceMetric(len(vocabulary), vocabulary.is_thing))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Accumulate the prediction and the ground truth of one image."""
        self.metric.update(sample.image_id, prediction.instances, sample.ids, sample.segments)


SCORES = (InstanceScore,)
