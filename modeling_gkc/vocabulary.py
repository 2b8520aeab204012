# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Vocabularies: classes with their names, thing/stuff labels, colors and prompt templates."""

import copy
import functools
import itertools
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from .label_text import check_separators, comparison_key, has_lone_mark, normalize_label, shown
from .prompt_templates import resolve_templates
from .vocabulary_files import (
    PACKAGED_NAMES,
    VocabularyEntry,
    check_packaged_name,
    is_file_name,
    packaged_entries,
    read_vocabulary_file,
)

# Ends messages about words that the text encoder of a checkpoint does not know.
UNKNOWN_WORDS_HINT = (
    "Use a checkpoint whose text encoder knows them: see `gkc open --help` to create one for photographs."
)


@dataclass
class Vocabulary:
    """Vocabulary of K classes, each with one or more names.

    Args:
        names: K lists of names; the first name of a class is its label, the others are synonyms. Leading and
            trailing spaces are removed, repeated spaces are collapsed, characters without width such as U+200B are
            removed, and duplicate names of a class are dropped. Names are compared regardless of case and of Unicode
            composition, so that names that look the same are equal.
        is_thing: For each class, whether it is countable (a thing), uncountable (stuff), or unknown (None).
        colors: For each class an (red, green, blue) triple in 0..255, or None to choose a distinct color.
        templates: For each class its own prompt templates, as `resolve_templates` accepts them, or None to use those
            of the processor.

    Raises:
        ValueError: If there is no class, a name is empty or invisible, two classes have the same label, an entry of
            `is_thing`, `colors` or `templates` is invalid, or the lists differ in length. The message names the
            positions of the classes.

    Warns:
        UserWarning: If a name belongs to several classes.
    """

    names: list[list[str]]
    is_thing: list[bool | None] | None = None
    colors: list[tuple[int, int, int] | None] | None = None
    templates: list[list[str] | None] | None = None

    def __post_init__(self):
        self._check()
        _warn_shared_names(self.names)

    def _check(self) -> None:
        self.names, self.is_thing, self.colors, self.templates = _check_classes(
            self.names, self.is_thing, self.colors, self.templates, _Positions()
        )

    @classmethod
    def from_stored(
        cls,
        names: list[list[str]],
        is_thing: list[bool | None] | None = None,
        colors: list[tuple[int, int, int] | None] | None = None,
        templates: list[list[str] | None] | None = None,
    ) -> "Vocabulary":
        """Create a vocabulary from stored values without the warnings that were issued when it was first created.

        Args:
            names: As in `Vocabulary`.
            is_thing: As in `Vocabulary`.
            colors: As in `Vocabulary`.
            templates: As in `Vocabulary`.

        Returns:
            The vocabulary.

        Raises:
            ValueError: As in `Vocabulary`.
        """
        vocabulary = cls.__new__(cls)
        vocabulary.names, vocabulary.is_thing = names, is_thing
        vocabulary.colors, vocabulary.templates = colors, templates
        vocabulary._check()
        return vocabulary

    @classmethod
    def parse(cls, text: "VocabularyLike") -> "Vocabulary":
        """Parse a vocabulary from any supported form.

        Args:
            text: One of these forms:

                - a string with classes separated by `;` and synonyms by `,` ("dog; sofa, couch; lamp"), optionally
                  ending with `;`;
                - the name of a packaged vocabulary ("ade20k_150");
                - a file, as a path object or a string without `;` that ends in .json, .csv or .txt;
                - a list, array or other iterable, each item a name without `;` or a sequence of synonyms (["dog",
                  ["sofa", "couch"]]);
                - a set, whose classes are sorted alphabetically;
                - a dict of names by class id, such as a model's `id2label` ({0: "dog", 1: "lamp"});
                - a Vocabulary, which is returned unchanged.

        Returns:
            The vocabulary.

        Raises:
            ValueError: As in `Vocabulary`, `named` and `from_file`; if the name of a packaged vocabulary is
                misspelled; if a string has a line break or tab inside a class, uses other separators ("dog | lamp",
                "dog . lamp ."), or is the path of another kind of file; or if the keys of a dict are not the class
                ids.
            TypeError: If `text` or an item has an unsupported type.

        Warns:
            UserWarning: As in `Vocabulary`; if a string without `;`, which is a single class, has several names or a
                mark between words, as in "dog / lamp" and "black & white".
        """
        if isinstance(text, cls):
            return text
        if type(text).__name__ == cls.__name__:  # from another copy of this library: installed, or remote code
            return cls(text.names, text.is_thing, text.colors, text.templates)
        if isinstance(text, os.PathLike):
            return cls.from_file(text)
        if isinstance(text, str):
            return cls._from_text(text)
        return cls([_list_names(label, index) for index, label in enumerate(_list_classes(text))])

    @classmethod
    def named(cls, name: str) -> "Vocabulary":
        """Load a packaged vocabulary with its synonyms, thing/stuff labels and colors.

        Args:
            name: Name of the vocabulary, one of `packaged_names()`.

        Returns:
            The vocabulary.

        Raises:
            ValueError: If there is no such vocabulary, or if this code was loaded from a checkpoint and the package
                with the vocabularies is not installed.
        """
        return cls(*_columns(packaged_entries(name)))

    @staticmethod
    def packaged_names() -> list[str]:
        """Return the names of the packaged vocabularies, the label sets of common benchmarks."""
        return list(PACKAGED_NAMES)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Vocabulary":
        """Read a vocabulary from a file.

        Args:
            path: A JSON, CSV or text file in UTF-8; `modeling_gkc.vocabulary_files` describes the formats.

        Returns:
            The vocabulary.

        Raises:
            ValueError: If the file cannot be read or its content is invalid; the message names the file and line.
        """
        entries = read_vocabulary_file(path)
        columns = _columns(entries)
        try:
            _check_classes(*columns, _FilePositions(str(path), [entry.line for entry in entries]))
        except TypeError as error:
            raise ValueError(str(error)) from error
        return cls(*columns)

    @classmethod
    def _from_text(cls, text: str) -> "Vocabulary":
        if text.strip() in PACKAGED_NAMES:
            return cls.named(text.strip())
        if is_file_name(text.strip()):
            return cls.from_file(text.strip())
        check_packaged_name(text)
        check_separators(text)
        labels = text.split(";")
        if len(labels) > 1 and not labels[-1].strip():
            labels.pop()
        for label in labels:
            if label.strip() in PACKAGED_NAMES:
                raise ValueError(
                    f"{shown(label.strip())} is a packaged vocabulary and cannot be combined with other "
                    "labels: give it alone."
                )
            if re.search(r"[\r\n]", label.strip()):
                raise ValueError(
                    f"A label cannot contain a line break: {shown(label.strip())}; separate classes by ';', or give "
                    "a .txt file with one class per line."
                )
        vocabulary = cls([label.split(",") for label in labels])
        label, *others = vocabulary.flat_names
        if ";" not in text and (others or has_lone_mark(text)):
            also = f" (also: {', '.join(others)})" if others else ""
            warnings.warn(
                f"1 class: {label}{also}; separate classes by ';', or end the text with ';' if it is a single class.",
                UserWarning,
                stacklevel=3,
            )
        return vocabulary

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> list[str]:
        """The K labels, the first name of each class."""
        return [names[0] for names in self.names]

    @property
    def flat_names(self) -> list[str]:
        """All names in the order of their classes, each label before its synonyms."""
        return [name for names in self.names for name in names]

    @property
    def class_ids(self) -> list[int]:
        """Class id in 0..K-1 of every entry of `flat_names`."""
        return [index for index, names in enumerate(self.names) for _ in names]

    @property
    def stuff_ids(self) -> set[int]:
        """Ids of the stuff classes, whose segments are merged into one in panoptic segmentation."""
        return {index for index, is_thing in enumerate(self.is_thing or []) if is_thing is False}

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """K colors (red, green, blue) in 0..255.

        Classes without a color get unused colors of `color_palette`, or any of its colors if all are used.
        """
        given = self.colors or [None] * len(self)
        taken = set(given)
        palette = color_palette(2 * len(self))
        spare = itertools.cycle([color for color in palette if color not in taken] or palette)
        return [next(spare) if color is None else color for color in given]

    def without_synonyms(self) -> "Vocabulary":
        """Return a copy whose classes have their labels only, as in most published evaluations."""
        return Vocabulary([[label] for label in self.labels], self.is_thing, self.colors, self.templates)

    def with_is_thing_from(self, other: "Vocabulary | None") -> "Vocabulary":
        """Return a copy with the thing/stuff labels that its classes have in another vocabulary.

        A class takes the value of the class of `other` with the same label (regardless of case), else the value of
        the classes that have its label as a synonym, if these agree.

        Args:
            other: Vocabulary to take `is_thing` from; None returns this vocabulary.

        Returns:
            A new vocabulary, or this one if it has `is_thing` itself or `other` knows none of its labels.
        """
        if self.is_thing is not None or other is None or other.is_thing is None:
            return self
        kinds: dict[str, bool | None] = {}
        for names, is_thing in zip(other.names, other.is_thing, strict=True):
            for key in map(comparison_key, names[1:]):
                kinds[key] = is_thing if kinds.get(key, is_thing) is is_thing else None
        kinds |= {
            comparison_key(label): is_thing for label, is_thing in zip(other.labels, other.is_thing, strict=True)
        }
        found = [kinds.get(comparison_key(label)) for label in self.labels]
        if not any(is_thing is not None for is_thing in found):
            return self
        described = copy.copy(self)
        described.is_thing = found
        return described

    def with_void(self, void_labels: "VocabularyLike | None") -> "tuple[Vocabulary, list[int]]":
        """Append void classes for regions that belong to none of the classes.

        `post_process_*` label the pixels that are assigned to a void class as void.

        Args:
            void_labels: V classes in any form that `parse` accepts, for example "pascal_voc_background_39"; None
                appends none.

        Returns:
            The vocabulary of K + V classes, and the ids K..K+V-1 of the void classes.

        Raises:
            ValueError: As in `parse`, or if a name belongs to both a class and a void class.
        """
        if void_labels is None:
            return self, []
        try:
            void = Vocabulary.parse(void_labels)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Void labels: {error}") from error
        owners = {comparison_key(name): names[0] for names in self.names for name in names}
        for name in void.flat_names:
            owner = owners.get(comparison_key(name))
            if owner is not None:
                raise ValueError(
                    f"{shown(name)} is a void label and a name of the class {shown(owner)}: remove it from one "
                    "of them."
                )
        joined = copy.copy(self)
        joined.names = self.names + void.names
        for field in ("is_thing", "colors", "templates"):
            first, second = getattr(self, field), getattr(void, field)
            if first is not None or second is not None:
                setattr(joined, field, (first or [None] * len(self)) + (second or [None] * len(void)))
        return joined, list(range(len(self), len(joined)))


def _list_classes(labels: Any) -> list:
    """Return the classes of a list, array, set, dict or other iterable in their order."""
    given = labels
    if isinstance(labels, Mapping):
        return _order_by_class_id(labels)
    if isinstance(labels, Set) and not isinstance(labels, KeysView):
        try:
            return sorted(labels)
        except TypeError as error:
            raise TypeError(f"A set of labels must hold strings: {shown(labels)}.") from error
    if hasattr(labels, "tolist"):  # arrays of numpy, columns of pandas
        labels = labels.tolist()
    if isinstance(labels, str | bytes) or not isinstance(labels, Iterable):
        hint = ""
        if isinstance(labels, bytes):
            hint = " Decode the bytes to text."
        elif isinstance(labels, str):  # the value of an array without axes
            hint = " Give the array's text, `.item()`."
        raise TypeError(
            "Labels must be a string, a list or another iterable of names, a dict such as `id2label`, or a "
            f"Vocabulary, got {shown(given)}.{hint}"
        )
    return list(labels)


def _order_by_class_id(labels: Mapping) -> list:
    """Return the names of a dict in the order of its keys, which must be the class ids."""
    expected = f"A dict of labels must map the class ids 0..{len(labels) - 1} to names, as `id2label` does"
    numbers = {}
    for key, label in labels.items():
        try:
            if isinstance(key, bool):  # a bool is an int in Python, but not a class id
                raise TypeError("The key is a bool.")
            number = int(key) if isinstance(key, str) else operator.index(key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{expected}; got the key {shown(key)}.") from error
        numbers[number] = label
    if sorted(numbers) != list(range(len(labels))):
        raise ValueError(f"{expected}; got the keys {shown(list(labels))}.")
    return [numbers[number] for number in range(len(labels))]


def _list_names(label: Any, index: int) -> Sequence[str]:
    """Return the names of one item of a list, checked for separators of typed labels."""
    names = [label] if isinstance(label, str) else label.tolist() if isinstance(label, np.ndarray) else label
    if isinstance(names, Set | Mapping):
        raise TypeError(f"{_Positions().describe(index)} must be a name or a sequence of names, got {shown(names)}.")
    for name in names if isinstance(names, Sequence) else ():
        if isinstance(name, str) and ";" in name:
            raise ValueError(
                f"{_Positions().describe(index)} is {shown(name)}: a ';' separates classes only within a string. "
                'Give each class as a separate item, and synonyms as a list: ["sky", ["sofa", "couch"]].'
            )
    return names


def color_palette(num_colors: int) -> list[tuple[int, int, int]]:
    """Return a deterministic palette of colors for overlays that are as distinct as possible.

    Each color is the farthest from all previous ones in the Oklab color space (Ottosson, *A perceptual color space
    for image processing*, 2020), among colors of medium lightness and chroma. After about two thousand colors the
    palette repeats.

    Args:
        num_colors: Number of colors.

    Returns:
        `num_colors` (red, green, blue) triples in 0..255; a longer palette starts with the shorter ones.
    """
    distinct = _spread_colors()
    return [distinct[index % len(distinct)] for index in range(num_colors)]


@functools.cache
def _spread_colors() -> list[tuple[int, int, int]]:
    axis = np.arange(0, 256, 17)
    colors = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(colors)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lab[:, 0] > 0.45) & (lab[:, 0] < 0.88) & (chroma > 0.08) & (chroma < 0.24)
    colors, lab = colors[vivid], lab[vivid]
    chosen = [int(np.argmax(chroma[vivid]))]
    distance = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    while distance.max() > 0:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return [tuple(color) for color in colors[chosen].tolist()]


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Convert sRGB colors (N, 3) in 0..255 to Oklab (N, 3): lightness in 0..1 and two opponent axes."""
    srgb = colors / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_cone = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cone.T) @ to_lab.T


class _Positions:
    """Positions of classes in typed labels, for error messages."""

    def describe(self, index: int) -> str:
        return f"Label {index + 1} (index {index})"

    def describe_pair(self, first: int, second: int) -> str:
        return f"Labels {first + 1} and {second + 1} (indexes {first} and {second})"


@dataclass
class _FilePositions(_Positions):
    """Positions of classes in a file, for error messages."""

    file: str
    lines: list[int]

    def describe(self, index: int) -> str:
        return f"Entry {index + 1} (line {self.lines[index]}) of {self.file}"

    def describe_pair(self, first: int, second: int) -> str:
        lines = f"lines {self.lines[first]} and {self.lines[second]}"
        return f"Entries {first + 1} and {second + 1} ({lines}) of {self.file}"


def _columns(entries: Sequence[VocabularyEntry]) -> tuple[list, list | None, list | None, list | None]:
    """Return the fields of `Vocabulary`, with None for fields that no entry has."""
    fields = [[getattr(entry, field) for entry in entries] for field in ("is_thing", "color", "templates")]
    return [entry.names for entry in entries], *(None if not any(v is not None for v in f) else f for f in fields)


def _check_classes(
    names: Sequence,
    is_thing: Sequence | None,
    colors: Sequence | None,
    templates: Sequence | None,
    positions: _Positions,
) -> tuple[list[list[str]], list[bool | None] | None, list[tuple] | None, list[list[str] | None] | None]:
    """Check and normalize the fields of `Vocabulary`; errors name the position of the class."""
    names = [_clean_names(class_names, positions.describe(index)) for index, class_names in enumerate(names)]
    if not names:
        raise ValueError("No labels were given: name at least one class, for example 'dog; sofa, couch; lamp'.")
    _check_unique_labels([class_names[0] for class_names in names], positions)
    checks = {
        "is_thing": (is_thing, _check_is_thing),
        "colors": (colors, _check_color),
        "templates": (templates, resolve_templates),
    }
    for field, (values, _) in checks.items():
        if values is not None and len(values) != len(names):
            raise ValueError(f"`{field}` must have one entry for each of the {len(names)} classes, got {len(values)}.")
    return names, *(_check_values(values, check, positions) for values, check in checks.values())


def _check_values(values: Sequence | None, check: Callable[[Any], Any], positions: _Positions) -> list | None:
    if values is None:
        return None
    checked = []
    for index, value in enumerate(values):
        try:
            checked.append(None if value is None else check(value))
        except ValueError as error:
            raise ValueError(f"{positions.describe(index)}: {error}") from error
    return checked


def _check_is_thing(value: bool) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"is_thing must be true (thing), false (stuff) or null, got {shown(value)}.")
    return bool(value)


def _check_color(value: Sequence[int]) -> tuple[int, ...]:
    is_triple = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) == 3
    if not is_triple or not all(type(v) is int or isinstance(v, np.integer) for v in value):
        raise ValueError(f"a color must be three whole numbers, red, green and blue, got {shown(value)}.")
    if not all(0 <= channel <= 255 for channel in value):
        raise ValueError(f"a color must lie in 0..255, got {shown(value)}.")
    return tuple(int(channel) for channel in value)


def _clean_names(names: Sequence[str], position: str) -> list[str]:
    """Check and normalize the names of one class, whose position starts error messages."""
    within = f"{position[0].lower()}{position[1:]}"
    if isinstance(names, bytes):
        raise TypeError(f"The name of {within} must be text, got {shown(names)}: decode the bytes to text.")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{position} must be a name or a sequence of names, got {shown(names)}.")
    if not names:
        raise ValueError(f"{position} is empty: give every class a name.")
    cleaned: dict[str, str] = {}
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"Name {index + 1} of {within} must be a string, got {shown(name)}.")
        subject = position if len(names) == 1 else f"Name {index + 1} of {within}"
        try:
            name = normalize_label(name)
        except ValueError as error:
            raise ValueError(f"{subject} {error}") from error
        if not name:
            raise ValueError(f"{subject} is empty: give every class a name.")
        if ";" in name:  # typed as a string, as in `gkc segment` and pipelines, it would be two classes
            raise ValueError(
                f"{subject} is {shown(name)}: a ';' separates classes. Give each class as a separate entry."
            )
        cleaned.setdefault(comparison_key(name), name)
    return list(cleaned.values())


def _check_unique_labels(labels: list[str], positions: _Positions) -> None:
    first = {}
    for index, label in enumerate(labels):
        earlier = first.setdefault(comparison_key(label), index)
        if earlier != index:
            raise ValueError(
                f"{positions.describe_pair(earlier, index)} are both {shown(label)}"
                f"{_difference(labels[earlier], label)}: merge them into one class, or rename one of them."
            )


def _difference(first: str, second: str) -> str:
    """Describe the characters of two labels that look the same but differ in more than case."""
    if first.casefold() == second.casefold():
        return ""
    return f" when displayed ({ascii(first)[:200]} and {ascii(second)[:200]})"


def _warn_shared_names(names: list[list[str]]) -> None:
    owners: dict[str, list[int]] = {}
    for index, class_names in enumerate(names):
        for name in class_names:
            owners.setdefault(comparison_key(name), []).append(index)
    shared = {name: classes for name, classes in owners.items() if len(classes) > 1}
    if shared:
        listed = "; ".join(
            f"{shown(name)} belongs to " + " and ".join(shown(names[index][0]) for index in classes)
            for name, classes in shared.items()
        )
        warnings.warn(f"A name is shared by several classes: {listed}.", UserWarning, stacklevel=4)


VocabularyLike = str | os.PathLike | Iterable[str | Sequence[str]] | Mapping[int, str] | Vocabulary

__all__ = ["UNKNOWN_WORDS_HINT", "Vocabulary", "VocabularyLike", "color_palette"]
