"""Training callback that draws images with their ground truth and prediction at each evaluation."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from modeling_gkc.atomic_files import atomic_path
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.visualization import DrawnSegment, draw_overlay
from modeling_gkc.vocabulary import Vocabulary

from ..data import JointTransform
from ..data.samples import augmented_row

PICTURES_FOLDER = "pictures"
_TITLES = ("image", "truth", "prediction")
_MARGIN, _TITLE_HEIGHT = 12, 30
_MAX_WIDTH = 3000


class EvaluationPictures(TrainerCallback):
    """Trainer callback that saves `<output_dir>/pictures/step-<N>.png` at each evaluation, of the same images.

    Each row shows an image, its ground truth and the prediction, with class names and their fractions of the area. If
    TensorBoard is one of the trainer's reporters, it receives the picture too.

    Args:
        trainer: Trainer that calls the callback.
        dataset: Dataset in the schema of `train.data`. The images are evenly spaced in it; of a streamed dataset, the
            first ones are used.
        vocabulary: Classes that `category_id` refers to.
        processor: Processor of the model, for preprocessing and post-processing.
        crop_size: Side length in pixels that images are resized to, as in training.
        count: Number of images.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset | IterableDataset,
        vocabulary: Vocabulary,
        processor: GKCProcessor,
        crop_size: int | None,
        count: int = 4,
    ):
        self.trainer, self.vocabulary, self.processor = trainer, vocabulary, processor
        transform = JointTransform(crop_size, scale_range=(1.0, 1.0), flip_probability=0.0, padding=False)
        if isinstance(dataset, IterableDataset):
            rows = islice(dataset, count)
        else:
            rows = (dataset[int(index)] for index in np.unique(np.linspace(0, len(dataset) - 1, count).round()))
        self.samples = [augmented_row(row, transform, (0, 0, 0)) for row in rows]

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Predict the images, draw them and save the picture."""
        # All processes predict, since none holds all weights if these are sharded.
        predictions = self._predict(model)
        if not state.is_world_process_zero:
            return
        picture = self.draw(predictions)
        path = Path(args.output_dir) / PICTURES_FOLDER / f"step-{state.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(
                    "eval/pictures", np.asarray(picture), state.global_step, dataformats="HWC"
                )

    @torch.no_grad()
    def _predict(self, model: nn.Module) -> list[np.ndarray]:
        """Predict a class map (H, W) for each sample."""
        was_training = model.training
        model.eval()
        predictions = []
        for sample in self.samples:
            inputs = self.processor.image_processor(images=[sample["image"]], do_resize=False, return_tensors="pt")
            with self.trainer.compute_loss_context_manager():
                outputs = model(**inputs.to(self.trainer.args.device)).student
            sizes = [sample["ids"].shape]
            maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            predictions.append(maps[0].cpu().numpy())
        model.train(was_training)
        return predictions

    def draw(self, predictions: Sequence[np.ndarray]) -> Image.Image:
        """Draw one row per sample: the image, the ground truth and the predicted class map (H, W)."""
        names = zip(self.vocabulary.labels, self.vocabulary.palette, strict=True)
        segments = [DrawnSegment(index, label, color) for index, (label, color) in enumerate(names)]
        rows = []
        for sample, prediction in zip(self.samples, predictions, strict=True):
            image = Image.fromarray(sample["image"])
            maps = (None, class_map(sample, len(self.vocabulary)), prediction)
            rows.append([image if ids is None else draw_overlay(image, ids, segments) for ids in maps])
        for row in rows:
            row[0] = row[0].resize((round(row[0].width * row[1].height / row[0].height), row[1].height))
        return grid(rows, _TITLES)


def class_map(sample: dict[str, Any], num_classes: int) -> np.ndarray:
    """Return the class map (H, W) of an augmented row, `num_classes` for unlabeled pixels."""
    classes = np.full(sample["ids"].shape, num_classes, dtype=np.int64)
    for segment in sample["segments"]:
        classes[sample["ids"] == segment["id"]] = segment["category_id"]
    return classes


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Arrange images in a grid with column titles, downsampled to a maximum width of 3000 pixels."""
    widths = [max(row[column].width for row in rows) + _MARGIN for column in range(len(titles))]
    heights = [max(cell.height for cell in row) + _MARGIN for row in rows]
    canvas = Image.new("RGB", (sum(widths) + _MARGIN, sum(heights) + _TITLE_HEIGHT + _MARGIN), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    left = _MARGIN
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        draw.text((left, _MARGIN), title, font=font, fill="black")
        top = _TITLE_HEIGHT + _MARGIN
        for row, height in zip(rows, heights, strict=True):
            canvas.paste(row[column], (left, top))
            top += height
        left += width
    if canvas.width > _MAX_WIDTH:
        canvas = canvas.resize((_MAX_WIDTH, round(canvas.height * _MAX_WIDTH / canvas.width)))
    return canvas
