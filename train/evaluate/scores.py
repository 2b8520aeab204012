"""What is scored of a prediction: one class per task, each around a metric that can be stored and merged exactly.

Every score offers `update(sample, prediction)`, `finish()` (the end of a chunk), `state()`, `merge_state(state)` and
`compute()`. Predictions come in the benchmark's classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .samples import Sample

State = dict[str, np.ndarray]
PER_CLASS = "per_class"


@dataclass
class Prediction:
    """What a model found in one image, in the benchmark's classes; fields that no task needs are None.

    Attributes:
        classes: (H, W) int32, -1 where it found none.
        ids: (H, W) int32 ids of panoptic segments, 0 void.
        segments: `id` and `category_id` of each.
        instances: `category_id`, `score` and `mask` of each object.
    """

    classes: np.ndarray | None = None
    ids: np.ndarray | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    instances: list[dict[str, Any]] = field(default_factory=list)


class Score:
    """One metric of one task; what `update` gets is up to the subclass."""

    needs: tuple[str, ...] = ("classes",)

    def __init__(self, metric: Any):
        self.metric = metric

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Add one image."""
        raise NotImplementedError

    def finish(self) -> None:
        """All images of a chunk have been added."""

    def state(self) -> State:
        """Arrays from which the score goes on."""
        return self.metric.state()

    def merge_state(self, state: State) -> None:
        """Add what another process or run has counted."""
        self.metric.merge(type(self.metric).from_state(state))

    def compute(self) -> tuple[dict[str, float | None], dict[str, list]]:
        """Scores 0..1 by name, and lists with one entry per class by name; None without ground truth."""
        return flatten(self.metric.compute())


def flatten(computed: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, float | None], dict[str, list]]:
    """
    What a metric computed, without nesting.

    Returns:
        Numbers by name, those of inner dicts as `outer_inner` (how many videos were scored is no score and left out);
        and by name the lists of one number per class, `per_class` taken apart. Lists within other dicts are left out.
    """
    numbers: dict[str, float | None] = {}
    columns: dict[str, list] = {}
    for name, value in computed.items():
        if name == PER_CLASS:
            columns |= value if isinstance(value, Mapping) else {key: [row[key] for row in value] for key in value[0]}
        elif isinstance(value, Mapping) and name != "videos":
            numbers |= flatten(value, f"{prefix}{name}_")[0]
        elif isinstance(value, list):
            columns[name] = list(value)
        elif value is None or isinstance(value, float):  # counts are no scores
            numbers[f"{prefix}{name}"] = value
    return numbers, columns


class SemanticScore(Score):
    """Dataset-level mIoU and its relatives, or boundary IoU."""

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        self.metric.update(prediction.classes, sample.truth)


class PanopticScore(Score):
    """Panoptic quality."""

    needs = ("ids",)

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        self.metric.update(prediction.ids, prediction.segments, sample.ids, sample.segments)


class InstanceScore(Score):
    """Average precision of objects."""

    needs = ("instances",)

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        self.metric.update(sample.image_id, prediction.instances, sample.ids, sample.segments)


class VideoScore(Score):
    """Consistency of class maps over the frames of a video; a whole video is held until its last frame."""

    def __init__(self, metric: Any):
        super().__init__(metric)
        self._video, self._frames = "", []

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        if sample.video_id != self._video:
            self.finish()
            self._video = sample.video_id
        self._frames.append((prediction.classes.astype(np.int16), sample.truth.astype(np.int16)))

    def finish(self) -> None:
        """The video is at its end."""
        if self._frames:
            predictions, truths = (np.stack(maps) for maps in zip(*self._frames, strict=True))
            self.metric.update(predictions, truths)
            self._frames = []


class VideoPanopticScore(Score):
    """
    Video panoptic quality and segmentation and tracking quality, of one model's frames.

    A model of images numbers the segments of every frame anew. Objects are followed by `link_segments`; segments of
    stuff have one id per class.
    """

    needs = ("ids",)

    def __init__(self, metric: Any, is_thing: Sequence[bool]):
        super().__init__(metric)
        self.is_thing = list(is_thing)
        self._video, self._frames = "", []

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """See `Score`."""
        if sample.video_id != self._video:
            self.finish()
            self._video = sample.video_id
        self._frames.append((prediction.ids, prediction.segments, sample.ids, sample.segments))

    def finish(self) -> None:
        """The video is at its end."""
        if self._frames:
            linked = link_segments([frame[:2] for frame in self._frames], self.is_thing)
            self.metric.update([(*new, *old[2:]) for new, old in zip(linked, self._frames, strict=True)])
            self._frames = []


def link_segments(
    frames: Sequence[tuple[np.ndarray, list[dict[str, Any]]]], is_thing: Sequence[bool]
) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
    """
    Ids that stay the same over the frames of a video.

    An object is the one of its class in the frame before with which it has the highest IoU above 0, each taken once,
    best pairs first; else it is new. Stuff has the id class + 1.

    Args:
        frames: ids (H, W) and `id` and `category_id` of each segment.
        is_thing: of every class.

    Returns:
        The frames with new ids.
    """
    following, linked = len(is_thing) + 1, []
    before: tuple[np.ndarray, dict[int, int]] = (np.zeros((0, 0)), {})  # new ids, and the class of each object
    for ids, segments in frames:
        things = {segment["id"]: segment["category_id"] for segment in segments if is_thing[segment["category_id"]]}
        new_ids = _followed(ids, things, *before)
        for segment in segments:
            if segment["id"] not in things:
                new_ids[segment["id"]] = segment["category_id"] + 1
            elif segment["id"] not in new_ids:
                new_ids[segment["id"]] = following
                following += 1
        present, inverse = np.unique(ids, return_inverse=True)
        values = np.array([new_ids.get(number, 0) for number in present.tolist()], dtype=np.int32)
        renumbered = values[inverse].reshape(ids.shape)
        classes = {new_ids[segment["id"]]: segment["category_id"] for segment in segments}
        linked.append((renumbered, [{"id": number, "category_id": label} for number, label in classes.items()]))
        before = renumbered, {new_ids[number]: label for number, label in things.items()}
    return linked


def _followed(
    ids: np.ndarray, things: Mapping[int, int], before: np.ndarray, known: Mapping[int, int]
) -> dict[int, int]:
    """The earlier id of each object that has one."""
    if before.shape != ids.shape:
        return {}
    pairs, shared = np.unique(np.stack([ids.ravel(), before.ravel()]), axis=1, return_counts=True)
    areas, areas_before = (dict(zip(*np.unique(m, return_counts=True), strict=True)) for m in (ids, before))
    candidates = [
        (count / (areas[new] + areas_before[old] - count), new, old)
        for (new, old), count in zip(pairs.T.tolist(), shared.tolist(), strict=True)
        if new in things and known.get(old) == things[new]
    ]
    found: dict[int, int] = {}
    for _, new, old in sorted(candidates, key=lambda candidate: (-candidate[0], candidate[1:])):
        if new not in found and old not in found.values():
            found[new] = old
    return found
