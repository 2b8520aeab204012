"""What a benchmark is: its classes, its folder, its counts; and the helpers that its reader needs."""

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
from ..sources import Picture, Segmentation
from ..splits import vocabulary_subset
from .protocol import Protocol, ReportColumn

KEPT_WITH_ANY, KEPT_WITH_ONLY = "any", "only"
_NAMED_VALUES = 10


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it is published, and how to read it.

    Attributes:
        name: on the command line, such as `ade20k_150`.
        vocabulary: name of the packaged vocabulary whose order its train ids follow; unused with `make_vocabulary`.
        layout: what the published folder holds, for `--help`: one line about it, then the files.
        find: source folder and split -> pictures in their order. A ValueError names the path that is not there. Files
            that are missing for single pictures are left to `Picture.read` and to the reader of images.
        splits: published number of images of each split; None where it is not published.
        discrepancy: why a count may differ for good reasons.
        other_counts: further numbers of images that are known to be right, by split.
        subset: train ids that are kept, in their new order; the others become void. None keeps all.
        kept_images: by split, which images stay where `subset` is given: `any`, those with a segment of a kept class;
            `only`, those of them without a segment of another class; all where the split is not named.
        make_vocabulary: source folder -> vocabulary, for data that brings its own.
        protocol: how the field scores it; None for the protocol of the benchmark that is called as `vocabulary`.
        column: of the table of results; None where it has none but its name.
    """

    name: str
    vocabulary: str
    layout: str
    find: Callable[[Path, str], list[Picture]]
    splits: Mapping[str, int | None]
    discrepancy: str = ""
    other_counts: Mapping[str, Collection[int]] = field(default_factory=dict)
    subset: Sequence[int] | None = None
    kept_images: Mapping[str, str] = field(default_factory=dict)
    make_vocabulary: Callable[[Path], Vocabulary] | None = None
    protocol: Protocol | None = None
    column: ReportColumn | None = None

    def classes(self, source: Path | None = None) -> Vocabulary:
        """The classes that `category_id` counts in what is written.

        Args:
            source: the published folder, which only benchmarks with `make_vocabulary` look at.

        Raises:
            ValueError: the folder names no classes.
        """
        if self.make_vocabulary is not None:
            if source is None:
                raise ValueError(f"The classes of {self.name!r} stand in its source folder: give it.")
            return self.make_vocabulary(source)
        vocabulary = Vocabulary.named(self.vocabulary)
        return vocabulary if self.subset is None else vocabulary_subset(vocabulary, self.subset)

    def renumbered(self, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Segments with the train ids of `subset`, those of other classes without a class."""
        if self.subset is None:
            return segments
        new_ids = {old: new for new, old in enumerate(self.subset)}
        return [{**segment, "category_id": new_ids.get(segment["category_id"], NO_CLASS)} for segment in segments]

    def keeps(self, split: str, segments: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an image with these segments, not renumbered yet, stays in a split. Crowds count as segments."""
        rule = self.kept_images.get(split)
        if rule is None or self.subset is None:
            return True
        kept = [segment["category_id"] in self.subset for segment in segments if segment["category_id"] != NO_CLASS]
        return any(kept) and (rule == KEPT_WITH_ANY or all(kept))


def raw_ids(vocabulary: str) -> dict[int, int]:
    """Raw value of the annotation files -> train id, of a packaged vocabulary."""
    return {entry["id"]: position for position, entry in enumerate(packaged_facts(vocabulary)["classes"])}


def read_table(name: str) -> dict[int, int]:
    """A table of `train/data/tables` from one way of counting classes to another; what is not in it is void."""
    content = json.loads((Path(__file__).parent.parent / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    return {int(key): value for key, value in content["map"].items()}


def look_up(raw: np.ndarray, table: Mapping[int, int], void: Collection[int], path: Path | str) -> np.ndarray:
    """Raw values of an annotation file -> train ids, through an array and not class by class.

    Args:
        raw: (H, W) integers.
        table: train ids of raw values.
        void: raw values that stand for no class.
        path: the file, for the error.

    Returns:
        (H, W) int32 train ids, -1 for void.

    Raises:
        ValueError: there are values in neither `table` nor `void`; file, values and their numbers of pixels are named.
    """
    if not np.issubdtype(raw.dtype, np.integer):
        raise ValueError(f"{path}: its values are {raw.dtype}, expected integers")
    present = ids_within(raw)
    unknown = [value for value in present.tolist() if value not in table and value not in void]
    if unknown:
        listed = ", ".join(f"{value} ({int((raw == value).sum())} pixels)" for value in unknown[:_NAMED_VALUES])
        raise ValueError(f"{path}: unexpected values {listed}{', ...' if len(unknown) > _NAMED_VALUES else ''}")
    if not present.size:
        return np.zeros(raw.shape, dtype=np.int32)
    # No value lies outside of what is present, and few files hold large ones.
    lowest = int(present[0])
    array = np.full(int(present[-1]) - lowest + 1, NO_CLASS, dtype=np.int32)
    array[present - lowest] = [table.get(value, NO_CLASS) for value in present.tolist()]
    return array[raw.astype(np.int64) - lowest]


def semantic_segments(train_ids: np.ndarray) -> Segmentation:
    """One segment for each class of a semantic map, its id the train id + 1.

    Args:
        train_ids: (H, W) integers, negative for void.

    Returns:
        ids (H, W) int32, 0 for void, and segments as in `train.data.schema`, by rising class.
    """
    ids = np.where(train_ids < 0, VOID, train_ids + 1).astype(np.int32)
    present = [number for number in ids_within(ids).tolist() if number != VOID]
    return ids, [{"id": number, "category_id": number - 1, "iscrowd": False} for number in present]


def read_numbers(path: Path, shape: tuple[int, int] | None = None, modes: Collection[str] = ("L", "P")) -> np.ndarray:
    """The values (H, W) int32 of a grey, palette or 16-bit annotation; a palette gives its indices.

    Args:
        path: the file.
        shape: height and width that it must have, those of its image.
        modes: Pillow's modes that it may have.

    Raises:
        ValueError: it is of another mode or size, or cannot be read; the file is named.
        FileNotFoundError: there is no such file.
    """
    return _read(path, shape, modes).astype(np.int32)


def read_colors(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """The channels (H, W, 3) uint8 of an RGB annotation; raises as `read_numbers`."""
    return _read(path, shape, ("RGB",))


def read_color_ids(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """The ids (H, W) int32 of an annotation where id = R + 256 G + 65536 B; raises as `read_numbers`."""
    return decode_ids(read_colors(path, shape))


def _read(path: Path, shape: tuple[int, int] | None, modes: Collection[str]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the file is missing") from None
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if mode not in modes:
        raise ValueError(f"{path}: it is a picture of mode {mode}, expected {' or '.join(modes)}")
    if shape is not None:
        check_size(path, pixels.shape[:2], shape)
    return pixels


def check_size(path: Path | str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Refuse an annotation that is not of the size (height, width) of its image.

    Raises:
        ValueError: naming the file and both sizes.
    """
    if tuple(found) != tuple(shape):
        raise ValueError(f"{path}: it is {tuple(found)} (height, width), its image {tuple(shape)}")


def require(path: Path, what: str = "") -> Path:
    """A file or folder of a benchmark.

    Raises:
        ValueError: it is not there.
    """
    if not path.exists():
        raise ValueError(f"There is no {path}{f', {what}' if what else ''}: the folder is not laid out as published.")
    return path
