"""Dataset schema for training and evaluation: image, id-coded segmentation, segments, captions and identifiers.

A segmentation is an RGB PNG as in COCO panoptic: id = R + 256 G + 65536 B, where 0 is void. The `category_id` of a
segment is the position of its class in the vocabulary of the dataset, or -1 for a segment without a class, which is
void. `video_id` and `frame` identify a frame of a video and are "" and 0 for a still image. A dataset may have a
column `nouns`, the list of nouns of each caption, and further columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

VOID = 0
NO_CLASS = -1
PICTURE_COLUMNS = ("image", "segmentation")
OPTIONAL_COLUMNS = {"captions", "video_id", "frame"}
_REPORTED_PROBLEMS = 10
_ROWS_AT_ONCE = 10_000


def dataset_features() -> Features:
    """Return the features of a `datasets.Dataset` for training and evaluation."""
    from datasets import Features, Image, Value

    return Features(
        {
            "image": Image(),
            "segmentation": Image(),
            "segments": [{"id": Value("int32"), "category_id": Value("int32"), "iscrowd": Value("bool")}],
            "captions": [Value("string")],
            "image_id": Value("string"),
            "video_id": Value("string"),
            "frame": Value("int32"),
        }
    )


def decode_ids(segmentation: np.ndarray) -> np.ndarray:
    """Convert id-coded colors (H, W, 3) uint8 to segment ids (H, W) int32."""
    red, green, blue = (segmentation[..., channel].astype(np.int32) for channel in range(3))
    return red | green << 8 | blue << 16


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Convert segment ids (H, W) in 0..2**24 - 1 to id-coded colors (H, W, 3) uint8."""
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**24:
        raise ValueError(f"Segment ids must lie between 0 and {2**24 - 1}, got {ids.min()} to {ids.max()}.")
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def ids_within(ids: np.ndarray) -> np.ndarray:
    """Return the distinct ids (M,) of a segmentation (H, W) in increasing order."""
    flat = ids.reshape(-1)
    # Sorting one pixel of each run is ten times faster than sorting all pixels.
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.unique(np.concatenate([flat[:1], flat[starts]]))


def without_decoding(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the dataset with undecoded images, so that an unreadable image affects its own row only."""
    from datasets import Image

    for column in PICTURE_COLUMNS:
        dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def read_row(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Decode the image and segmentation of one row.

    Args:
        row: Row with its images decoded, or as `datasets` stores them.

    Returns:
        The image (H, W, 3) uint8 and its segment ids (H, W) int32.

    Raises:
        ValueError: If an image cannot be read, or image and segmentation differ in size.
    """
    from modeling_gkc.image_processing_gkc import read_image  # imports torch, which --help must not need

    sample = f"sample {row['image_id']!r}"
    image = np.asarray(read_image(_opened(row["image"], f"image of {sample}"), name=f"image of {sample}"))
    ids = _read_ids(_opened(row["segmentation"], f"segmentation of {sample}"), f"segmentation of {sample}")
    if image.shape[:2] != ids.shape:
        raise ValueError(
            f"Sample {row['image_id']!r}: The segmentation is {ids.shape} (height, width), the image "
            f"{image.shape[:2]}; store both at one size."
        )
    return image, ids


def _opened(image: PIL.Image.Image | Mapping[str, Any], name: str) -> PIL.Image.Image:
    from datasets import Image

    if isinstance(image, PIL.Image.Image):
        return image
    try:
        return Image().decode_example(image)
    except PIL.UnidentifiedImageError as error:  # its message repeats the file, or shows the address of a buffer
        raise ValueError(f"{name}: cannot be read as an image: its format is unknown") from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def _read_ids(image: PIL.Image.Image, name: str) -> np.ndarray:
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(
            f"{name}: The image has mode {image.mode}; store segment ids as an RGB image, id = R + 256 G + 65536 B."
        )
    try:
        # Reading four bytes per pixel as one integer is ten times faster than combining three channels.
        return np.asarray(image.convert("RGBA")).view("<u4")[..., 0].astype(np.int32) & 0xFFFFFF
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def annotated_segments(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the segments for training: those with a class that are not crowds."""
    return [segment for segment in row["segments"] if not segment["iscrowd"] and segment["category_id"] != NO_CLASS]


def learnable_ids(row: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Return the ids (H, W) of a row, with void for crowds and segments without a class.

    Args:
        row: Row with its `segments`.
        ids: Segment ids (H, W) of the row.

    Raises:
        ValueError: If the segments of the row do not list every id exactly once.
    """
    _check_ids(row, ids_within(ids))
    left_out = _left_out_ids(row)
    return np.where(np.isin(ids, left_out), np.int32(VOID), ids) if left_out else ids


def semantic_map(row: Mapping[str, Any], ids: np.ndarray, ignore: int = NO_CLASS) -> np.ndarray:
    """Return the class of every pixel of a row, including crowds, as in semantic segmentation benchmarks.

    Args:
        row: Row with its `segments`.
        ids: Segment ids (H, W) of the row.
        ignore: Value of void pixels and of segments without a class.

    Returns:
        The class map (H, W) int32.

    Raises:
        ValueError: If the segments of the row do not list every id exactly once.
    """
    present = ids_within(ids)
    _check_ids(row, present)
    classes = {segment["id"]: segment["category_id"] for segment in row["segments"]}
    values = [classes.get(number, NO_CLASS) for number in present.tolist()]
    values = np.array([ignore if value == NO_CLASS else value for value in values], dtype=np.int32)
    return values[np.searchsorted(present, ids)]


def _check_ids(row: Mapping[str, Any], present: np.ndarray) -> None:
    """Raise if the segments of a row do not list every id `present` in its segmentation exactly once."""
    if problems := segment_problems(row["segments"]):
        raise ValueError(f"Sample {row['image_id']!r}: {'; '.join(problems)}.")
    undescribed = _undescribed_ids(row, present)
    if undescribed:
        raise ValueError(
            f"Sample {row['image_id']!r}: Ids {undescribed} of the segmentation are not in its segments "
            f"{[segment['id'] for segment in row['segments']]}."
        )


def _undescribed_ids(row: Mapping[str, Any], present: np.ndarray) -> list[int]:
    return sorted(set(present.tolist()) - {VOID, *(segment["id"] for segment in row["segments"])})


def _left_out_ids(row: Mapping[str, Any]) -> list[int]:
    annotated = {segment["id"] for segment in annotated_segments(row)}
    return [segment["id"] for segment in row["segments"] if segment["id"] not in annotated]


def check_dataset(
    dataset: Dataset, class_names: Sequence[str], progress: bool = True, sample: int | None = None
) -> None:
    """Validate the samples of a dataset and raise on invalid ones.

    The columns, image ids and segments of all rows are checked: image ids must be unique, segment ids unique and not
    void, and category ids in the vocabulary. For the rows whose images are read, image and segmentation must have the
    same size, and `segments` must list all ids of the segmentation.

    Args:
        dataset: Dataset to validate.
        class_names: Class names of the vocabulary.
        progress: Whether to show a progress bar.
        sample: Number of evenly spaced rows whose images are read. None reads all images.

    Raises:
        ValueError: If samples are invalid. The message lists the first ones with their problems.
    """
    missing = dataset_features().keys() - OPTIONAL_COLUMNS - set(dataset.column_names)
    if missing:
        raise ValueError(f"The dataset lacks the columns {sorted(missing)}; it has {dataset.column_names}.")
    problems = list(islice(_listed_problems(dataset, len(class_names)), _REPORTED_PROBLEMS))
    if not problems:
        dataset = without_decoding(dataset)
        if sample is not None and sample < len(dataset):
            dataset = dataset.select(np.linspace(0, len(dataset) - 1, sample).astype(int))
        rows = tqdm(dataset, desc="Checking the dataset", disable=not progress)
        problems = list(islice(filter(None, map(_image_problem, rows)), _REPORTED_PROBLEMS))
    if problems:
        raise ValueError("The dataset cannot be trained on:\n  " + "\n  ".join(problems))


def _listed_problems(dataset: Dataset, num_classes: int) -> Iterator[str]:
    """Yield the problems of the image ids and segments of all rows, without reading images."""
    seen: set[str | None] = set()
    for table in dataset.select_columns(["image_id", "segments"]).with_format("arrow").iter(_ROWS_AT_ONCE):
        segments = table.column("segments").combine_chunks()
        suspicious = _suspicious_rows(segments, num_classes)
        for position, image_id in enumerate(table.column("image_id").to_pylist()):
            if image_id is None or image_id in seen:
                wrong = "The image_id is missing" if image_id is None else "Another sample has the same image_id"
                yield f"sample {image_id!r}: {wrong}"
            seen.add(image_id)
            if position in suspicious:
                for problem in segment_problems(segments[position].as_py(), num_classes):
                    yield f"sample {image_id!r}: {problem}"


def _suspicious_rows(segments: pa.ListArray, num_classes: int) -> set[int]:
    """Return the rows whose segments are missing, incomplete, void, duplicated or of an unknown class."""
    import pyarrow.compute as pc

    missing = np.flatnonzero(segments.is_null().to_numpy(zero_copy_only=False))
    rows = pc.list_parent_indices(segments).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(segments)
    columns = {name: pc.struct_field(flat, name) for name in ("id", "category_id", "iscrowd")}
    wrong = flat.is_null().to_numpy(zero_copy_only=False)
    for column in columns.values():
        wrong = wrong | column.is_null().to_numpy(zero_copy_only=False)
    ids, classes = (
        pc.fill_null(columns[name], VOID).to_numpy(zero_copy_only=False).astype(np.int64)
        for name in ("id", "category_id")
    )
    wrong = wrong | (ids == VOID) | (classes < NO_CLASS) | (classes >= num_classes)
    order = np.lexsort((ids, rows))
    twice = (np.diff(rows[order]) == 0) & (np.diff(ids[order]) == 0)
    return {*missing.tolist(), *rows[wrong].tolist(), *rows[order][1:][twice].tolist()}


def segment_problems(segments: Sequence[Mapping[str, Any]] | None, num_classes: int | None = None) -> list[str]:
    """Return the problems of the segments of a row, without looking at its images.

    Args:
        segments: Segments with `id`, `category_id` and `iscrowd`.
        num_classes: Number of classes in the vocabulary. None does not check the classes.
    """
    if segments is None or any(None in (segment or {None: None}).values() for segment in segments):
        return [f"Segments or parts of them are missing: {segments}"]
    problems, ids = [], [segment["id"] for segment in segments]
    if len(set(ids)) < len(ids) or VOID in ids:
        problems.append(f"Segment ids must be unique and not {VOID} (void), got {ids}")
    classes = {segment["category_id"] for segment in segments}
    if num_classes is not None and (unknown := sorted(classes - {NO_CLASS, *range(num_classes)})):
        problems.append(f"Category ids {unknown} are not in the vocabulary of {num_classes} classes")
    return problems


def _image_problem(row: Mapping[str, Any]) -> str | None:
    """Return the problem of the images of a row, or None."""
    sample = f"sample {row['image_id']!r}"
    try:
        _, ids = read_row(row)
    except ValueError as error:
        reason = str(error).removeprefix(f"Sample {row['image_id']!r}: ")
        return f"{sample}: {reason}"
    if undescribed := _undescribed_ids(row, ids_within(ids)):
        described = [segment["id"] for segment in row["segments"]]
        return f"{sample}: Ids {undescribed} of the segmentation are not in its segments {described}"
    return None
