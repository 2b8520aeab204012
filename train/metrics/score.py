"""Metrics as the evaluation of a model uses them, and the registry that finds them.

A metric is one file of `train/metrics`: its `Metric` of sums, and a `Score` that says which task asks for it, what it
needs of a prediction and how it is reported. The module lists its scores in `SCORES`; nothing else has to know it by
name:

    class ToyScore(Score):
        name = task = "toy"
        report = (ReportedScore("toy_share", "toy", "toy share"),)

        @classmethod
        def from_vocabulary(cls, vocabulary):
            return cls(ToyMetric(len(vocabulary)))

        def update(self, sample, prediction):
            self.metric.update(prediction.classes, sample.truth)

    SCORES = (ToyScore,)

The module's docstring states the metric's conventions and is part of `train.metrics.describe()`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Self

import numpy as np

from modeling_gkc.vocabulary import Vocabulary

from .base import Metric, State

PER_CLASS = "per_class"
PREDICTION_FIELDS = ("classes", "ids", "instances")  # of `Prediction`, that a model may give


@dataclass
class Sample:
    """
    One image with its ground truth, at the size that is scored.

    Attributes:
        image: (H, W, 3) uint8.
        ids: (H, W) int32 segment ids, 0 void.
        truth: (H, W) int32 class of every pixel, crowds too; -1 where there is none.
        segments: `id`, `category_id` (-1: no class) and `iscrowd` of each.
        image_id, video_id, frame: As in `train.data.schema`.
    """

    image: np.ndarray
    ids: np.ndarray
    truth: np.ndarray
    segments: list[dict[str, Any]]
    image_id: str
    video_id: str = ""
    frame: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.ids.shape


@dataclass
class Prediction:
    """
    Prediction of a model for one image, in the benchmark's classes; fields that no task needs are None or empty.

    Attributes:
        classes: (H, W) int32, -1 where the model found none.
        ids: (H, W) int32 ids of panoptic segments, 0 void.
        segments: `id` and `category_id` of each panoptic segment.
        instances: `category_id`, `score` and `mask` of each object.
    """

    classes: np.ndarray | None = None
    ids: np.ndarray | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    instances: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ReportedScore:
    """
    A number that reports and model cards show.

    Attributes:
        name: Its key in the result of `Score.compute`.
        type: Its metric type in the `model-index` of a model card.
        label: Its heading for people.
        table_note: For the one score that the table of published results is about: how it is taken, a sentence.
    """

    name: str
    type: str
    label: str
    table_note: str = ""


class Score:
    """
    A metric of one task over the samples of a benchmark.

    Args:
        metric: The sums.

    Attributes:
        name: Key of the score in a result file.
        task: Value of `--tasks` that asks for it. Several scores may share a task.
        needs: Fields of `Prediction` that it reads.
        needs_kinds: Whether it needs to know things from stuff; a task without any other score is then refused.
        needs_videos: Whether it is defined on videos only.
        class_means: Scores that are means over classes -> the list per class that each is the mean of.
        report: Numbers of reports and model cards.
        task_type: Task of a model card.
        details: Prefixes of numbers that stand in the result file only.
    """

    name: ClassVar[str]
    task: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("classes",)
    needs_kinds: ClassVar[bool] = False
    needs_videos: ClassVar[bool] = False
    class_means: ClassVar[Mapping[str, str]] = {}
    report: ClassVar[tuple[ReportedScore, ...]] = ()
    task_type: ClassVar[str] = "image-segmentation"
    details: ClassVar[tuple[str, ...]] = ()

    def __init__(self, metric: Metric):
        self.metric = metric

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Self:
        """Make an empty score of a benchmark's classes."""
        raise NotImplementedError

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Add one image."""
        raise NotImplementedError

    def finish(self) -> None:
        """Add what is held back until the end of a chunk, such as the frames of a video."""

    def state(self) -> State:
        """Arrays that hold everything that was added, fit for `np.savez`."""
        return self.metric.state()

    def merge_state(self, state: State) -> None:
        """Add what another process or run has counted."""
        self.metric.merge(type(self.metric).from_state(state))

    def compute(self) -> tuple[dict[str, float | None], dict[str, list]]:
        """Scores 0..1 by name, and lists with one entry per class by name; None without ground truth."""
        return flatten(self.metric.compute())

    @classmethod
    def warnings(
        cls, scores: Mapping[str, float | None], columns: Mapping[str, Sequence], labels: Sequence[str]
    ) -> list[str]:
        """
        Reasons why a score may look better than the predictions are, one sentence each.

        Args:
            scores: Numbers that `compute` gave.
            columns: Lists per class that `compute` gave.
            labels: Names of the classes.
        """
        return []


class VideoScore(Score):
    """A score of whole videos: frames are held until the last one of their video, then `update_video` adds them."""

    needs_videos = True
    task_type = "video-segmentation"

    def __init__(self, metric: Metric):
        super().__init__(metric)
        self._video, self._frames = "", []

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Hold one frame; the frames of a video follow one another."""
        if sample.video_id != self._video:
            self.finish()
            self._video = sample.video_id
        self._frames.append(self.frame(sample, prediction))

    def finish(self) -> None:
        """Add the video that is held."""
        if self._frames:
            self.update_video(self._frames)
            self._frames = []

    def frame(self, sample: Sample, prediction: Prediction) -> tuple:
        """What is held of a frame."""
        raise NotImplementedError

    def update_video(self, frames: list[tuple]) -> None:
        """Add one video."""
        raise NotImplementedError


def flatten(computed: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, float | None], dict[str, list]]:
    """
    Flatten the nested result of a metric.

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


@cache
def all_scores() -> dict[str, type[Score]]:
    """Every score that a module of this package lists in `SCORES`, by its name; tasks in the order of their names."""
    package = __package__ or ""
    found: dict[str, type[Score]] = {}
    for module in sorted(module.name for module in iter_modules(import_module(package).__path__)):
        if module == "evaluate_module":  # needs the library `evaluate`
            continue
        for score in getattr(import_module(f"{package}.{module}"), "SCORES", ()):
            if score.name in found:
                raise RuntimeError(f"Two scores are called {score.name!r}.")
            found[score.name] = score
    return dict(sorted(found.items(), key=lambda item: item[1].task))


def all_tasks() -> list[str]:
    """Every task that some score belongs to."""
    return list(dict.fromkeys(score.task for score in all_scores().values()))


def scores_of_task(task: str) -> dict[str, type[Score]]:
    """The scores of a task by their names."""
    return {name: score for name, score in all_scores().items() if score.task == task}


def needs_segments(task: str) -> bool:
    """Whether every score of a task reads segments or objects, which cannot be merged from several views."""
    return not any(_fits(score, ("classes",)) for score in scores_of_task(task).values())


def _fits(score: type[Score], provided: Collection[str]) -> bool:
    return set(score.needs) <= set(provided)


def make_scores(
    tasks: Sequence[str], vocabulary: Vocabulary, provided: Collection[str] = PREDICTION_FIELDS
) -> dict[str, Score]:
    """
    Make empty scores of tasks; those of a task that cannot be computed are left out where another one can be.

    Args:
        tasks: Names of tasks.
        vocabulary: The classes, with or without their kinds (things and stuff).
        provided: Fields of `Prediction` that the model gives.

    Raises:
        ValueError: no score of a task can be computed; the message says what is missing.
    """
    knows_kinds = vocabulary.is_thing is not None and None not in vocabulary.is_thing
    made: dict[str, Score] = {}
    impossible = [task for task in tasks if not any(_fits(score, provided) for score in scores_of_task(task).values())]
    if impossible:
        raise ValueError(f"--tasks: the model, as it is asked, gives no {', '.join(impossible)} results.")
    for task in tasks:
        possible = {
            name: score
            for name, score in scores_of_task(task).items()
            if _fits(score, provided) and (knows_kinds or not score.needs_kinds)
        }
        if not possible:
            raise ValueError(
                f"--tasks: {task} results need things and stuff, which the benchmark's classes are not divided into; "
                "ask for semantic results."
            )
        made |= {name: score.from_vocabulary(vocabulary) for name, score in possible.items()}
    return made


def table_score() -> tuple[type[Score], ReportedScore]:
    """The score that the table of published results is about."""
    return next((score, shown) for score in all_scores().values() for shown in score.report if shown.table_note)
