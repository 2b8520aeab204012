"""Evaluation of one chunk of images: read, predict, score."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from modeling_gkc.label_text import error_line
from modeling_gkc.predictor import prefetch

from ..metrics.score import Prediction, Sample, Score
from .predictions import PredictionWriter
from .samples import read_sample
from .segmenter import Segmenter

PHASES = ("waiting_for_data", "model", "post_processing", "scoring")


@dataclass
class Batch:
    """Images of one forward pass, the model inputs for them, and one message for each image that cannot be read."""

    samples: list[Sample]
    inputs: Any
    broken: list[str]


@dataclass
class Evaluation:
    """Evaluation of a model on rows of a dataset.

    Attributes:
        dataset: Rows in the schema of `train.data`, with images not decoded.
        segmenter: Model that is evaluated.
        make_scores: Function that returns new, empty scores by name.
        batch_size: Images per forward pass.
        shrink_above: Images whose shorter side exceeds this number of pixels are downsampled to it, see `Protocol`.
        writer: Writer of prediction files, None to write none.
        needs: Fields of `Prediction` that the scores use.
    """

    dataset: Dataset
    segmenter: Segmenter
    make_scores: Callable[[], dict[str, Score]]
    batch_size: int
    shrink_above: int | None = None
    writer: PredictionWriter | None = None
    needs: frozenset[str] = field(init=False)

    def __post_init__(self):
        self.needs = frozenset(need for score in self.make_scores().values() for need in score.needs)

    def run_chunk(self, rows: range, on_image: Callable[[], None]) -> tuple[dict[str, Score], dict[str, Any]]:
        """Evaluate one chunk.

        Args:
            rows: Rows of the dataset.
            on_image: Function called after each image.

        Returns:
            The scores by name, and a description: the number of `images`, the messages of `broken` images, the
            `seconds` of each phase and in total, and the entries of `panoptic.json` that were `written`.
        """
        scores, clock = self.make_scores(), _Clock()
        broken, written, images = [], [], 0
        starts = range(rows.start, rows.stop, self.batch_size)
        batches = (range(start, min(start + self.batch_size, rows.stop)) for start in starts)
        for batch in prefetch(batches, self._read, ahead=1):
            clock.lap("waiting_for_data")
            broken += batch.broken
            for sample, prediction in self._predict(batch, clock):
                for score in scores.values():
                    score.update(sample, prediction)
                if self.writer is not None:
                    written += self.writer.write(sample, prediction)
                images += 1
                clock.lap("scoring")
                on_image()
            for _ in batch.broken:
                on_image()
        for score in scores.values():
            score.finish()
        clock.lap("scoring")
        return scores, {"images": images, "broken": broken, "seconds": clock.seconds, "written": written}

    def _read(self, rows: range) -> Batch:
        samples, broken = [], []
        for row in rows:
            try:
                samples.append(read_sample(self.dataset[row], self.shrink_above))
            except ValueError as error:
                broken.append(error_line(error))
        inputs = self.segmenter.prepare([sample.image for sample in samples]) if samples else None
        return Batch(samples, inputs, broken)

    def _predict(self, batch: Batch, clock: "_Clock") -> Iterator[tuple[Sample, Prediction]]:
        if not batch.samples:
            return
        with torch.inference_mode():
            outputs = self.segmenter.forward(batch.inputs)
        synchronize()
        clock.lap("model")
        for index, sample in enumerate(batch.samples):
            prediction = predict(self.segmenter, outputs, index, sample.size, self.needs)
            clock.lap("post_processing")
            yield sample, prediction


@torch.inference_mode()
def predict(
    segmenter: Segmenter, outputs: Any, index: int, size: tuple[int, int], needs: frozenset[str]
) -> Prediction:
    """Predict the fields `needs` for image `index` of a batch, in the classes of the benchmark."""
    # Index -1, which stands for pixels without a class, selects the last entry.
    class_of = np.append(segmenter.class_of, np.int32(-1))
    prediction = Prediction()
    if "classes" in needs:
        prediction.classes = class_of[segmenter.semantic(outputs, index, size)]
    if "ids" in needs:
        prediction.ids, segments = segmenter.panoptic(outputs, index, size)
        named = [{"id": part["id"], "category_id": int(class_of[part["label_id"]])} for part in segments]
        prediction.segments = [part for part in named if part["category_id"] >= 0]
        lost = [part["id"] for part in named if part["category_id"] < 0]
        if lost:
            prediction.ids = np.where(np.isin(prediction.ids, lost), np.int32(0), prediction.ids)
    if "instances" in needs:
        found = [(int(class_of[part["label_id"]]), part) for part in segmenter.instances(outputs, index, size)]
        prediction.instances = [
            {"category_id": label, "score": part["score"], "mask": part["mask"]} for label, part in found if label >= 0
        ]
    return prediction


def synchronize() -> None:
    """Wait for the accelerator, so that each measured phase includes its own work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class _Clock:
    """Stopwatch that sums the seconds of each phase."""

    def __init__(self):
        self.seconds = dict.fromkeys((*PHASES, "total"), 0.0)
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the seconds since the last call to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._mark
        self.seconds["total"] += now - self._mark
        self._mark = now


def total_seconds(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum the seconds of each phase over chunks."""
    return {phase: sum(part[phase] for part in parts) for phase in (*PHASES, "total")}
