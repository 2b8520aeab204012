"""Interface between metrics and model evaluation, and the registry of metrics.

A metric is one file of `train/metrics` with a `Metric`, which contains the sums, and a `Score`, which defines its
task, the predictions that it requires and how it is reported. The module lists its scores in `SCORES`, where the
registry finds them:

    class ToyScore(Score):
        name = task = "toy"
        report = (ReportedScore("toy_share", "toy", "toy share"),)

        @classmethod
        def from_vocabulary(cls, vocabulary):
            return cls(ToyMetric(len(vocabulary)))

        def update(self, sample, prediction):
            self.metric.update(prediction.classes, sample.truth)

    SCORES = (ToyScore,)

The docstring of the module states the conventions of the metric and is part of `train.metrics.describe()`.
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
PREDICTION_FIELDS = ("classes", "ids", "instances")  # fields of `Prediction` that a model may provide


@dataclass
class Sample:
    """Image with its ground truth, at the size of the evaluation.

    Attributes:
        image: Image (H, W, 3) uint8.
        ids: Segment ids (H, W) int32, 0 for void.
        truth: Class of every pixel (H, W) int32, including crowds, -1 for none.
        segments: Segments with `id`, `category_id` (-1 for no class) and `iscrowd`.
        image_id: Unique id of the image.
        video_id: Id of the video of a frame, or "" for a still image.
        frame: Index of the frame in its video.
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
    """Prediction of a model for one image, in the classes of the benchmark; unused fields are None or empty.

    Attributes:
        classes: Predicted class of every pixel (H, W) int32, -1 for none.
        ids: Ids of panoptic segments (H, W) int32, 0 for void.
        segments: Panoptic segments with `id` and `category_id`.
        instances: Objects with `category_id`, `score` and `mask`.
    """

    classes: np.ndarray | None = None
    ids: np.ndarray | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    instances: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ReportedScore:
    """Score that reports and model cards show.

    Attributes:
        name: Key in the result of `Score.compute`.
        type: Metric type in the `model-index` of a model card.
        label: Displayed name.
        table_note: Description of how the score is computed, for the one score in the table of published results.
    """

    name: str
    type: str
    label: str
    table_note: str = ""


class Score:
    """Metric of one task over the samples of a benchmark.

    Args:
        metric: Metric that accumulates the sums.

    Attributes:
        name: Key of the score in a result file.
        task: Value of `--tasks` that selects it. Several scores may share a task.
        needs: Fields of `Prediction` that it reads.
        needs_kinds: Whether it requires the division of classes into things and stuff.
        needs_videos: Whether it is defined for videos only.
        class_means: Per-class list that each mean score averages, by name of the mean score.
        report: Scores to show in reports and model cards.
        task_type: Task type in a model card.
        details: Prefixes of scores that are written to the result file only.
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
        """Create an empty score for the classes of a benchmark."""
        raise NotImplementedError

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Accumulate the prediction and the ground truth of one image."""
        raise NotImplementedError

    def finish(self) -> None:
        """Add buffered data at the end of a chunk, such as the frames of a video."""

    def state(self) -> State:
        """Return the accumulated sums as arrays for `np.savez`."""
        return self.metric.state()

    def merge_state(self, state: State) -> None:
        """Add the state of another process or run."""
        self.metric.merge(type(self.metric).from_state(state))

    def compute(self) -> tuple[dict[str, float | None], dict[str, list]]:
        """Return scores in 0..1 by name and per-class lists by name; values are None without ground truth."""
        return flatten(self.metric.compute())

    @classmethod
    def warnings(
        cls, scores: Mapping[str, float | None], columns: Mapping[str, Sequence], labels: Sequence[str]
    ) -> list[str]:
        """Return warnings about misleading scores, one sentence each.

        Args:
            scores: Scores that `compute` returned.
            columns: Per-class lists that `compute` returned.
            labels: Names of the classes.
        """
        return []


class VideoScore(Score):
    """Score of whole videos, which buffers the frames of a video and adds them with `update_video`."""

    needs_videos = True
    task_type = "video-segmentation"

    def __init__(self, metric: Metric):
        super().__init__(metric)
        self._video, self._frames = "", []

    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Buffer one frame; the frames of a video must be consecutive."""
        if sample.video_id != self._video:
            self.finish()
            self._video = sample.video_id
        self._frames.append(self.frame(sample, prediction))

    def finish(self) -> None:
        """Add the buffered video."""
        if self._frames:
            self.update_video(self._frames)
            self._frames = []

    def frame(self, sample: Sample, prediction: Prediction) -> tuple:
        """Return the data of a frame to buffer."""
        raise NotImplementedError

    def update_video(self, frames: list[tuple]) -> None:
        """Accumulate the frames of one video."""
        raise NotImplementedError


def flatten(computed: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, float | None], dict[str, list]]:
    """Flatten the nested result of a metric.

    Args:
        computed: Result of `Metric.compute`.
        prefix: Prefix of the names.

    Returns:
        Scores by name, where those of nested dictionaries are named `outer_inner`, and per-class lists by name, where
        `per_class` is split into its columns. Counts of videos and nested lists are omitted.
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
        elif value is None or isinstance(value, float):  # counts are not scores
            numbers[f"{prefix}{name}"] = value
    return numbers, columns


@cache
def all_scores() -> dict[str, type[Score]]:
    """Return the scores in the `SCORES` of all modules of this package, by name and sorted by task."""
    package = __package__ or ""
    found: dict[str, type[Score]] = {}
    for module in sorted(module.name for module in iter_modules(import_module(package).__path__)):
        if module == "evaluate_module":  # requires the library `evaluate`
            continue
        for score in getattr(import_module(f"{package}.{module}"), "SCORES", ()):
            if score.name in found:
                raise RuntimeError(f"Two scores have the name {score.name!r}.")
            found[score.name] = score
    return dict(sorted(found.items(), key=lambda item: item[1].task))


def all_tasks() -> list[str]:
    """Return all tasks."""
    return list(dict.fromkeys(score.task for score in all_scores().values()))


def scores_of_task(task: str) -> dict[str, type[Score]]:
    """Return the scores of a task by name."""
    return {name: score for name, score in all_scores().items() if score.task == task}


def needs_segments(task: str) -> bool:
    """Return whether all scores of a task require segments or objects, which cannot be merged from several views."""
    return not any(_fits(score, ("classes",)) for score in scores_of_task(task).values())


def _fits(score: type[Score], provided: Collection[str]) -> bool:
    return set(score.needs) <= set(provided)


def make_scores(
    tasks: Sequence[str], vocabulary: Vocabulary, provided: Collection[str] = PREDICTION_FIELDS
) -> dict[str, Score]:
    """Create empty scores of tasks, omitting scores that cannot be computed if the task has another one.

    Args:
        tasks: Names of the tasks.
        vocabulary: Classes, with or without their division into things and stuff.
        provided: Fields of `Prediction` that the model provides.

    Raises:
        ValueError: If no score of a task can be computed. The message names what is missing.
    """
    knows_kinds = vocabulary.is_thing is not None and None not in vocabulary.is_thing
    made: dict[str, Score] = {}
    impossible = [task for task in tasks if not any(_fits(score, provided) for score in scores_of_task(task).values())]
    if impossible:
        raise ValueError(f"--tasks: the model with these options does not predict {', '.join(impossible)} results.")
    for task in tasks:
        possible = {
            name: score
            for name, score in scores_of_task(task).items()
            if _fits(score, provided) and (knows_kinds or not score.needs_kinds)
        }
        if not possible:
            raise ValueError(
                f"--tasks: {task} results require classes divided into things and stuff, which the benchmark lacks: "
                "use the task semantic."
            )
        made |= {name: score.from_vocabulary(vocabulary) for name, score in possible.items()}
    return made


def table_score() -> tuple[type[Score], ReportedScore]:
    """Return the score in the table of published results."""
    return next((score, shown) for score in all_scores().values() for shown in score.report if shown.table_note)
