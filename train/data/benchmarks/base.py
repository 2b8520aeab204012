"""Definition of a benchmark, and helpers for the readers of benchmarks."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import packaged_facts

from ..schema import NO_CLASS, VOID, decode_ids, ids_within
from ..sources import AnnotatedImage, Segmentation
from ..splits import vocabulary_subset
from .protocol import Protocol, ReportColumn

KEPT_WITH_ANY, KEPT_WITH_ONLY = "any", "only"
_NAMED_VALUES = 10


@dataclass(frozen=True)
class Benchmark:
    """Published benchmark with its layout, reader and evaluation protocol.

    Attributes:
        name: Name on the command line, such as `ade20k_150`.
        vocabulary: Name of the packaged vocabulary that defines the train ids. It is unused with `make_vocabulary`.
        layout: Layout of the published folder for `--help`: one summary line, then the files.
        find: Function that maps the source folder and a split to the images in order. It raises a ValueError that
            names a missing folder or list. Missing files of single images are reported by `AnnotatedImage.read`.
        splits: Published number of images of each split, or None if it is not published.
        discrepancy: Known reasons for a different number of images.
        other_counts: Further valid numbers of images, by split.
        subset: Train ids to keep, in their new order; the others become void. None keeps all.
        kept_images: Rule for the images of each split with `subset`: `any` keeps images with a segment of a kept
            class; `only` drops those of them with a segment of another class. Splits without a rule keep all images.
        make_vocabulary: Function that maps the source folder to the vocabulary, for data that defines its own classes.
        protocol: Evaluation protocol. None takes the protocol of the benchmark named `vocabulary`.
        column: Column in the table of results. None shows the benchmark under its name.
    """

    name: str
    vocabulary: str
    layout: str
    find: Callable[[Path, str], list[AnnotatedImage]]
    splits: Mapping[str, int | None]
    discrepancy: str = ""
    other_counts: Mapping[str, Collection[int]] = field(default_factory=dict)
    subset: Sequence[int] | None = None
    kept_images: Mapping[str, str] = field(default_factory=dict)
    make_vocabulary: Callable[[Path], Vocabulary] | None = None
    protocol: Protocol | None = None
    column: ReportColumn | None = None

    def classes(self, source: Path | None = None) -> Vocabulary:
        """Return the vocabulary of the prepared dataset, in the order of `category_id`.

        Args:
            source: Published folder, required for benchmarks with `make_vocabulary` only.

        Raises:
            ValueError: If the folder is required but missing, or does not define classes.
        """
        if self.make_vocabulary is not None:
            if source is None:
                raise ValueError(f"The classes of {self.name!r} are defined in its source folder: pass `source`.")
            return self.make_vocabulary(source)
        vocabulary = Vocabulary.named(self.vocabulary)
        return vocabulary if self.subset is None else vocabulary_subset(vocabulary, self.subset)

    def renumbered(self, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return segments with the train ids of `subset`, and the class -1 for other classes."""
        if self.subset is None:
            return segments
        new_ids = {old: new for new, old in enumerate(self.subset)}
        return [{**segment, "category_id": new_ids.get(segment["category_id"], NO_CLASS)} for segment in segments]

    def keeps(self, split: str, segments: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether an image with these segments, before renumbering, stays in a split; crowds count."""
        rule = self.kept_images.get(split)
        if rule is None or self.subset is None:
            return True
        kept = [segment["category_id"] in self.subset for segment in segments if segment["category_id"] != NO_CLASS]
        return any(kept) and (rule == KEPT_WITH_ANY or all(kept))


def raw_ids(vocabulary: str) -> dict[int, int]:
    """Return the train id of each raw annotation value of a packaged vocabulary."""
    return {entry["id"]: position for position, entry in enumerate(packaged_facts(vocabulary)["classes"])}


def read_table(name: str) -> dict[int, int]:
    """Read a class mapping in `train/data/tables`; classes that it lacks are void."""
    content = json.loads((Path(__file__).parent.parent / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    return {int(key): value for key, value in content["map"].items()}


def look_up(raw: np.ndarray, table: Mapping[int, int], void: Collection[int], path: Path | str) -> np.ndarray:
    """Map the raw values of an annotation to train ids.

    Args:
        raw: Raw integer values (H, W).
        table: Train id of each raw value.
        void: Raw values without a class.
        path: Annotation file, for the error.

    Returns:
        Train ids (H, W) int32, -1 for void.

    Raises:
        ValueError: If a value is in neither `table` nor `void`.
    """
    if not np.issubdtype(raw.dtype, np.integer):
        raise ValueError(f"{path}: The values are {raw.dtype}, expected integers")
    present = ids_within(raw)
    unknown = [value for value in present.tolist() if value not in table and value not in void]
    if unknown:
        listed = ", ".join(f"{value} ({int((raw == value).sum())} pixels)" for value in unknown[:_NAMED_VALUES])
        raise ValueError(f"{path}: Unexpected values {listed}{', ...' if len(unknown) > _NAMED_VALUES else ''}")
    if not present.size:
        return np.zeros(raw.shape, dtype=np.int32)
    # The lookup array covers the range of the present values only, which is small in most files.
    lowest = int(present[0])
    array = np.full(int(present[-1]) - lowest + 1, NO_CLASS, dtype=np.int32)
    array[present - lowest] = [table.get(value, NO_CLASS) for value in present.tolist()]
    return array[raw.astype(np.int64) - lowest]


def semantic_segments(train_ids: np.ndarray) -> Segmentation:
    """Convert a semantic map to one segment per class, with the train id + 1 as its id.

    Args:
        train_ids: Train ids (H, W), negative for void.

    Returns:
        The ids (H, W) int32, 0 for void, and segments as in `train.data.schema`, in increasing class order.
    """
    ids = np.where(train_ids < 0, VOID, train_ids + 1).astype(np.int32)
    present = [number for number in ids_within(ids).tolist() if number != VOID]
    return ids, [{"id": number, "category_id": number - 1, "iscrowd": False} for number in present]


def read_numbers(path: Path, shape: tuple[int, int] | None = None, modes: Collection[str] = ("L", "P")) -> np.ndarray:
    """Read the values (H, W) int32 of a gray or 16-bit annotation, or the indices of a palette image.

    Args:
        path: Annotation file.
        shape: Required height and width, those of the image. None accepts any size.
        modes: Accepted Pillow modes.

    Raises:
        ValueError: If the file cannot be read, or has another mode or size.
        FileNotFoundError: If the file does not exist.
    """
    return _read(path, shape, modes).astype(np.int32)


def read_colors(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read the channels (H, W, 3) uint8 of an RGB annotation, with the errors of `read_numbers`."""
    return _read(path, shape, ("RGB",))


def read_color_ids(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read the ids (H, W) int32 of an annotation with id = R + 256 G + 65536 B, with the errors of `read_numbers`."""
    return decode_ids(read_colors(path, shape))


def _read(path: Path, shape: tuple[int, int] | None, modes: Collection[str]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: The file is missing") from None
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if mode not in modes:
        raise ValueError(f"{path}: The image has mode {mode}, expected {' or '.join(modes)}")
    if shape is not None:
        check_size(path, pixels.shape[:2], shape)
    return pixels


def check_size(path: Path | str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Check that an annotation has the size (height, width) of its image.

    Raises:
        ValueError: If the sizes differ.
    """
    if tuple(found) != tuple(shape):
        raise ValueError(f"{path}: The annotation is {tuple(found)} (height, width), its image {tuple(shape)}")


def require(path: Path, what: str = "") -> Path:
    """Return a path of a benchmark after checking that it exists.

    Args:
        path: File or folder.
        what: Description of the path for the error.

    Raises:
        ValueError: If the path does not exist.
    """
    if not path.exists():
        raise ValueError(f"There is no {path}{f', {what}' if what else ''}: the folder is not laid out as published.")
    return path
