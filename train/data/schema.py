"""The one dataset schema of training: image, id-coded segmentation image, segments, caption, image id.

A segmentation is an RGB PNG as in COCO panoptic: id = R + 256 G + 65536 B, 0 is void. `category_id` of a segment is
the position of its class in the vocabulary given beside the dataset.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from tqdm.auto import tqdm

from modeling_gkc.image_processing_gkc import read_image

VOID = 0
_REPORTED_PROBLEMS = 10


def dataset_features() -> Features:
    """Features of a `datasets.Dataset` that training reads."""
    return Features(
        {
            "image": Image(),
            "segmentation": Image(),
            "segments": [{"id": Value("int32"), "category_id": Value("int32"), "iscrowd": Value("bool")}],
            "caption": Value("string"),
            "image_id": Value("string"),
        }
    )


def decode_ids(segmentation: np.ndarray) -> np.ndarray:
    """Id-coded colours (H, W, 3) uint8 -> segment ids (H, W) int32."""
    return segmentation.astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Segment ids (H, W), 0 to 2**24 - 1 -> id-coded colours (H, W, 3) uint8."""
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**24:
        raise ValueError(f"Segment ids must lie between 0 and {2**24 - 1}, got {ids.min()} to {ids.max()}.")
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def read_row(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Decode one row.

    Returns:
        The image (H, W, 3) uint8 and its segment ids (H, W) int32.

    Raises:
        ValueError: they differ in size.
    """
    image = np.asarray(read_image(row["image"], name=f"image of sample {row['image_id']!r}"))
    ids = decode_ids(np.asarray(row["segmentation"].convert("RGB")))
    if image.shape[:2] != ids.shape:
        raise ValueError(
            f"Sample {row['image_id']!r}: the segmentation is {ids.shape} (height, width), the image "
            f"{image.shape[:2]}; store both at one size."
        )
    return image, ids


def annotated_segments(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The segments that training learns from: all but crowds."""
    return [segment for segment in row["segments"] if not segment["iscrowd"]]


def check_dataset(dataset: Dataset, class_names: Sequence[str], progress: bool = True) -> None:
    """Read a whole dataset once and refuse it if any sample is wrong.

    Checked: the columns; image and segmentation of one size; ids of the segmentation all described in `segments`;
    segment ids unique and not void; category ids within the vocabulary; image ids unique.

    Raises:
        ValueError: naming the first wrong samples and what is wrong with each.
    """
    missing = dataset_features().keys() - {"caption"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"The dataset lacks the columns {sorted(missing)}; it has {dataset.column_names}.")
    problems, seen = [], set()
    for row in tqdm(dataset, desc="Checking the dataset", disable=not progress):
        problems += [f"sample {row['image_id']!r}: {problem}" for problem in _row_problems(row, len(class_names))]
        if row["image_id"] in seen:
            problems.append(f"sample {row['image_id']!r}: another sample has the same image_id")
        seen.add(row["image_id"])
        if len(problems) >= _REPORTED_PROBLEMS:
            break
    if problems:
        raise ValueError("The dataset cannot be trained on:\n  " + "\n  ".join(problems[:_REPORTED_PROBLEMS]))


def _row_problems(row: Mapping[str, Any], num_classes: int) -> list[str]:
    problems = []
    described = [segment["id"] for segment in row["segments"]]
    if len(set(described)) < len(described) or VOID in described:
        problems.append(f"segment ids must be unique and not {VOID} (void), got {described}")
    unknown = sorted({segment["category_id"] for segment in row["segments"]} - set(range(num_classes)))
    if unknown:
        problems.append(f"category ids {unknown} are not in the vocabulary of {num_classes} classes")
    try:
        _, ids = read_row(row)
    except (OSError, ValueError) as error:
        return [*problems, str(error).removeprefix(f"Sample {row['image_id']!r}: ")]
    undescribed = sorted(set(np.unique(ids).tolist()) - {VOID, *described})
    if undescribed:
        problems.append(f"ids {undescribed} of the segmentation are not in its segments {described}")
    return problems
