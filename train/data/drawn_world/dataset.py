"""Synthetic mini-world as a Hugging Face dataset in the schema of training data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary

from ..schema import dataset_features, encode_ids
from .parallel import map_scenes
from .words import COARSE, COARSE_SHAPES, CONCEPTS, SHAPES, STUFFS, TRAINING_WORDS, WORDS, coarse_label
from .world import TRAINING_SHAPES, TRAINING_STUFFS, Scene, draw_scene

if TYPE_CHECKING:
    from datasets import Dataset, Features

SPLITS = {"train": 0, "test": 1}  # combined with the seed, they select independent random streams


def training_vocabulary() -> Vocabulary:
    """Return the vocabulary of the ten coarse training labels, each with its four training words."""
    names = [list(WORDS[label][TRAINING_WORDS]) for label in COARSE]
    return Vocabulary(names, is_thing=[label in COARSE_SHAPES for label in COARSE])


def test_vocabulary() -> Vocabulary:
    """Return the vocabulary of all concepts, each with its own name."""
    return Vocabulary([[concept] for concept in CONCEPTS], is_thing=[concept in SHAPES for concept in CONCEPTS])


def miniworld_features() -> Features:
    """Return the schema of training data with a column `attributes`, the ground-truth properties of each segment."""
    from datasets import Features, Value

    attributes = {
        "kind": Value("string"),
        "concept": Value("string"),
        "colour": Value("string"),
        "fill": Value("string"),
        "radius": Value("float32"),
        "aspect": Value("float32"),
        "latents": [Value("float32")],
    }
    return Features(dataset_features() | {"attributes": [attributes]})


def build_dataset(
    split: str, scenes: int, seed: int = 0, size: int = 96, num_proc: int = 1, show_progress: bool = True
) -> Dataset:
    """Draw the scenes of a split as a dataset.

    `train` omits the never-seen concepts, has the labels of `training_vocabulary`, and marks other regions as void.
    `test` contains all concepts, with the labels of `test_vocabulary`. The column `attributes` is for evaluation only.

    Args:
        split: `train` or `test`.
        scenes: Number of rows. Row i does not depend on it.
        seed: Random seed.
        size: Side of the images in pixels.
        num_proc: Number of processes that draw scenes.
        show_progress: Whether to show a progress bar.
    """
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; use one of {', '.join(SPLITS)}.")
    draw_row = partial(_draw_row, split, seed, size)
    rows = list(map_scenes(draw_row, scenes, num_proc, f"{split} scenes", show_progress))
    return Dataset.from_list(rows, features=miniworld_features())


def _draw_row(split: str, seed: int, size: int, index: int) -> dict:
    training = split == "train"
    shapes, stuffs = (TRAINING_SHAPES, TRAINING_STUFFS) if training else (SHAPES, STUFFS)
    scene = draw_scene((seed, SPLITS[split]), index, size, shapes, stuffs)
    labels = [coarse_label(region["concept"]) if training else region["concept"] for region in scene.regions]
    return _row(scene, labels, COARSE if training else CONCEPTS) | {"image_id": f"{split}-{seed}-{index:06d}"}


def _row(scene: Scene, labels: Sequence[str | None], classes: Sequence[str]) -> dict:
    """Return one row without its `image_id`; labeled regions become segments 1, 2, ..., the others void."""
    annotated = [number for number, label in enumerate(labels) if label is not None]
    ids = np.zeros(len(labels) + 1, dtype=np.int64)  # the last entry is for region index -1
    ids[annotated] = np.arange(1, len(annotated) + 1)
    segments = [
        {"id": int(ids[number]), "category_id": classes.index(labels[number]), "iscrowd": False}
        for number in annotated
    ]
    return {
        "image": _png(scene.image),
        "segmentation": _png(encode_ids(ids[scene.region_index])),
        "segments": segments,
        "captions": [" and ".join(f"a {labels[number]}" for number in reversed(annotated))],
        "video_id": "",
        "frame": 0,
        "attributes": [scene.regions[number] for number in annotated],
    }


def _png(image: np.ndarray) -> dict:
    """Encode an image (H, W, 3) uint8 as `datasets.Image` stores it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
