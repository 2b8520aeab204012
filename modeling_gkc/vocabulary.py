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
"""Vocabularies: the words that an image is cut into, with synonyms, thing/stuff and colours."""

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

from .label_text import check_separators, comparison_key, has_lone_mark, shown, tidy
from .prompt_templates import resolve_templates
from .vocabulary_files import (
    PACKAGED_NAMES,
    VocabularyEntry,
    check_packaged_name,
    is_file_name,
    packaged_entries,
    read_vocabulary_file,
)

# For messages about words that the text encoder of a checkpoint does not know.
UNKNOWN_WORDS_HINT = (
    "Take a checkpoint whose text encoder knows them: `gkc convert mask2former --help` makes one for photographs."
)


@dataclass
class Vocabulary:
    """
    K classes, each with one or more names.

    Args:
        names: K lists of names; the first name of a class is its label, the others are synonyms. Spaces at the ends
            are dropped and runs of spaces become one; characters without width, such as U+200B, are dropped; a name
            given twice to one class counts once. Two names are the same that look the same in any case: an accent may
            be a character of its own or not.
        is_thing: For each class whether it is countable (thing), not (stuff), or unknown (None).
        colors: For each class an (red, green, blue) triple, 0..255, or None; None chooses well-spread ones.
        templates: For each class its own prompt templates, as `resolve_templates` takes them, or None for those of
            the processor.

    Raises:
        ValueError: no class, an empty or invisible name, two classes with the same label, a kind, colour or template
            that is none, or lists that differ in length. The message names the positions.

    Warns:
        UserWarning: one name belongs to several classes.
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
            self.names, self.is_thing, self.colors, self.templates, _Places()
        )

    @classmethod
    def from_stored(
        cls,
        names: list[list[str]],
        is_thing: list[bool | None] | None = None,
        colors: list[tuple[int, int, int] | None] | None = None,
        templates: list[list[str] | None] | None = None,
    ) -> "Vocabulary":
        """
        A vocabulary of stored values, of which whoever stored them has been warned: as `Vocabulary`, without warnings.

        Raises:
            ValueError: as `Vocabulary`.
        """
        vocabulary = cls.__new__(cls)
        vocabulary.names, vocabulary.is_thing = names, is_thing
        vocabulary.colors, vocabulary.templates = colors, templates
        vocabulary._check()
        return vocabulary

    @classmethod
    def parse(cls, text: "VocabularyLike") -> "Vocabulary":
        """
        Read a vocabulary in any of the forms that users type.

        Args:
            text: A string, classes separated by `;` and synonyms by `,` ("dog; sofa, couch; lamp"), with or without a
                `;` at the end; the name of a packaged vocabulary ("ade20k_150"); a file, as a path object or a string
                without `;` that ends in .json, .csv or .txt; a list, array or other iterable whose items are a name,
                taken as it stands (a `;` in it is refused), or a sequence of synonyms (["dog", ["sofa", "couch"]]); a
                set, whose classes come in alphabetical order; a dict of names by class number, such as a model's
                `id2label` ({0: "dog", 1: "lamp"}); or a Vocabulary, returned as it is.

        Raises:
            ValueError: as for `Vocabulary`, `named` and `from_file`; a word that is a packaged name misspelt; a
                string with a line break or tab inside a class, with other separators ("dog | lamp", "dog . lamp ."),
                or that is the path of another file; a dict whose keys are not the class numbers.
            TypeError: an item is neither a string nor a sequence of strings, or it is another kind of thing.

        Warns:
            UserWarning: as for `Vocabulary`; a string without `;`, so that all is one class, has two or more names or
                a mark between words, as "dog / lamp" and "black & white" have.
        """
        if isinstance(text, cls):
            return text
        if type(text).__name__ == cls.__name__:  # of another copy of this library: installed, or from a folder's code
            return cls(text.names, text.is_thing, text.colors, text.templates)
        if isinstance(text, os.PathLike):
            return cls.from_file(text)
        if isinstance(text, str):
            return cls._typed(text)
        return cls([_listed_names(label, index) for index, label in enumerate(_listed(text))])

    @classmethod
    def named(cls, name: str) -> "Vocabulary":
        """
        A packaged vocabulary, one of `names_of_packaged`, with its synonyms, kinds and colours.

        Raises:
            ValueError: there is no such vocabulary, or this code was loaded from a checkpoint and the package that has
                the vocabularies is not installed.
        """
        return cls(*_columns(packaged_entries(name)))

    @staticmethod
    def names_of_packaged() -> list[str]:
        """Names that `named` and `parse` know: label sets of the field's benchmarks."""
        return list(PACKAGED_NAMES)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Vocabulary":
        """
        Read a vocabulary from a file.

        Args:
            path: JSON, CSV or text, UTF-8; `modeling_gkc.vocabulary_files` describes the three.

        Raises:
            ValueError: the file cannot be read, or what stands in it is refused; the message names file and line.
        """
        entries = read_vocabulary_file(path)
        columns = _columns(entries)
        try:
            _check_classes(*columns, _FilePlaces(str(path), [entry.line for entry in entries]))
        except TypeError as error:
            raise ValueError(str(error)) from error
        return cls(*columns)

    @classmethod
    def _typed(cls, text: str) -> "Vocabulary":
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
                    f"{label.strip()!r} is a packaged vocabulary and cannot stand among other labels: give it alone."
                )
            if re.search(r"[\r\n]", label.strip()):
                raise ValueError(
                    f"a label cannot go over two lines: {label.strip()!r}; separate classes by ';', or give a .txt "
                    "file with a class per line."
                )
        vocabulary = cls([label.split(",") for label in labels])
        label, *others = vocabulary.flat_names
        if ";" not in text and (others or has_lone_mark(text)):
            also = f" (also: {', '.join(others)})" if others else ""
            warnings.warn(
                f"1 class: {label}{also}; separate classes by ';', or put one at the end if one class is meant.",
                UserWarning,
                stacklevel=3,
            )
        return vocabulary

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> list[str]:
        """The K first names."""
        return [names[0] for names in self.names]

    @property
    def flat_names(self) -> list[str]:
        """All names in class order, synonyms after their first name."""
        return [name for names in self.names for name in names]

    @property
    def class_ids(self) -> list[int]:
        """The class 0..K-1 of every entry of `flat_names`."""
        return [index for index, names in enumerate(self.names) for _ in names]

    @property
    def stuff_ids(self) -> set[int]:
        """Classes known to be stuff, whose segments a panoptic result merges into one."""
        return {index for index, is_thing in enumerate(self.is_thing or []) if is_thing is False}

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """
        K colours, (red, green, blue) in 0..255: the given ones, and for the rest those of `color_palette` that are
        free, or any of them when none is.
        """
        given = self.colors or [None] * len(self)
        taken = set(given)
        palette = color_palette(2 * len(self))
        spare = itertools.cycle([color for color in palette if color not in taken] or palette)
        return [next(spare) if color is None else color for color in given]

    def without_synonyms(self) -> "Vocabulary":
        """The same classes with their labels only, as in the field's published evaluations."""
        return Vocabulary([[label] for label in self.labels], self.is_thing, self.colors, self.templates)

    def with_is_thing_from(self, other: "Vocabulary | None") -> "Vocabulary":
        """
        The same classes with the thing/stuff kinds that their labels have in another vocabulary.

        A kind is that of the class of `other` whose label is the same word in any case, else of the classes with such
        a synonym, if they agree.

        Returns:
            A new vocabulary; this one if it has kinds itself or `other` has none for its labels.
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
        """
        Add words for what is none of the classes; `post_process_*` make void of what they win.

        Args:
            void_labels: V classes in any form that `parse` takes, for example "pascal_voc_background_39"; None adds
                none.

        Returns:
            The K + V classes, and the ids K..K+V-1 of the added ones.

        Raises:
            ValueError: as `parse`, or a word stands for a class and for void.
        """
        if void_labels is None:
            return self, []
        try:
            void = Vocabulary.parse(void_labels)
        except ValueError as error:
            raise ValueError(f"void labels: {error}") from error
        owners = {comparison_key(name): names[0] for names in self.names for name in names}
        for name in void.flat_names:
            owner = owners.get(comparison_key(name))
            if owner is not None:
                raise ValueError(f"{name!r} is a void label and a name of the class {owner!r}: take it out of one.")
        joined = copy.copy(self)
        joined.names = self.names + void.names
        for field in ("is_thing", "colors", "templates"):
            first, second = getattr(self, field), getattr(void, field)
            if first is not None or second is not None:
                setattr(joined, field, (first or [None] * len(self)) + (second or [None] * len(void)))
        return joined, list(range(len(self), len(joined)))


def _listed(labels: Any) -> list:
    """The classes of a list, array, set, dict or other iterable in their order."""
    given = labels
    if isinstance(labels, Mapping):
        return _by_number(labels)
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


def _by_number(labels: Mapping) -> list:
    """The names of a dict, in the order of its keys, which must be the class numbers."""
    expected = f"A dict of labels must map the class numbers 0..{len(labels) - 1} to names, as `id2label` does"
    numbers = {}
    for key, label in labels.items():
        try:
            if isinstance(key, bool):  # an int to Python, but no number of a class
                raise TypeError("The key is a bool.")
            number = int(key) if isinstance(key, str) else operator.index(key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{expected}; got the key {shown(key)}.") from error
        numbers[number] = label
    if sorted(numbers) != list(range(len(labels))):
        raise ValueError(f"{expected}; got the keys {shown(list(labels))}.")
    return [numbers[number] for number in range(len(labels))]


def _listed_names(label: Any, index: int) -> Sequence[str]:
    """The names of one item of a list."""
    names = [label] if isinstance(label, str) else label.tolist() if isinstance(label, np.ndarray) else label
    if isinstance(names, Set | Mapping):
        raise TypeError(f"{_Places().one(index)} must be a name or a sequence of names, got {shown(names)}.")
    for name in names if isinstance(names, Sequence) else ():
        if isinstance(name, str) and ";" in name:
            raise ValueError(
                f"{_Places().one(index)} is {name!r}: a ';' separates classes where they are typed. Give each class "
                'an item of its own, and synonyms as a list: ["sky", ["sofa", "couch"]].'
            )
    return names


def color_palette(num_colors: int) -> list[tuple[int, int, int]]:
    """
    Colours for overlays that differ as much as possible to the eye, always the same and in the same order.

    Each colour is the one farthest from all earlier ones in the Oklab space (Ottosson, *A perceptual color space for
    image processing*, 2020), among colours neither dark, pale, grey nor glaring. After some two thousand they repeat.

    Returns:
        `num_colors` (red, green, blue) triples in 0..255; a longer palette begins with the shorter ones.
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
    """SRGB colours (N, 3) in 0..255 to Oklab (N, 3): lightness 0..1 and two opponent axes."""
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


class _Places:
    """How messages call the classes of typed words."""

    def one(self, index: int) -> str:
        return f"label {index + 1} (index {index})"

    def two(self, first: int, second: int) -> str:
        return f"labels {first + 1} and {second + 1} (indexes {first} and {second})"


@dataclass
class _FilePlaces(_Places):
    """How messages call the classes of a file."""

    file: str
    lines: list[int]

    def one(self, index: int) -> str:
        return f"entry {index + 1} (line {self.lines[index]}) of {self.file}"

    def two(self, first: int, second: int) -> str:
        lines = f"lines {self.lines[first]} and {self.lines[second]}"
        return f"entries {first + 1} and {second + 1} ({lines}) of {self.file}"


def _columns(entries: Sequence[VocabularyEntry]) -> tuple[list, list | None, list | None, list | None]:
    """The fields of `Vocabulary`; one that no entry has is None."""
    fields = [[getattr(entry, field) for entry in entries] for field in ("is_thing", "color", "templates")]
    return [entry.names for entry in entries], *(None if not any(v is not None for v in f) else f for f in fields)


def _check_classes(
    names: Sequence, is_thing: Sequence | None, colors: Sequence | None, templates: Sequence | None, places: _Places
) -> tuple[list[list[str]], list[bool | None] | None, list[tuple] | None, list[list[str] | None] | None]:
    """The fields of `Vocabulary` in one form, or an error that says which class is wrong."""
    names = [_clean_names(class_names, places.one(index)) for index, class_names in enumerate(names)]
    if not names:
        raise ValueError("no labels were given: name at least one class, for example 'dog; sofa, couch; lamp'.")
    _check_unique_labels([class_names[0] for class_names in names], places)
    checks = {
        "is_thing": (is_thing, _checked_kind),
        "colors": (colors, _checked_color),
        "templates": (templates, resolve_templates),
    }
    for field, (values, _) in checks.items():
        if values is not None and len(values) != len(names):
            raise ValueError(f"`{field}` has {len(values)} entries for {len(names)} classes.")
    return names, *(_checked_values(values, check, places) for values, check in checks.values())


def _checked_values(values: Sequence | None, check: Callable[[Any], Any], places: _Places) -> list | None:
    if values is None:
        return None
    checked = []
    for index, value in enumerate(values):
        try:
            checked.append(None if value is None else check(value))
        except ValueError as error:
            raise ValueError(f"{places.one(index)}: {error}") from error
    return checked


def _checked_kind(value: bool) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"is_thing must be true (thing), false (stuff) or null, got {shown(value)}.")
    return bool(value)


def _checked_color(value: Sequence[int]) -> tuple[int, ...]:
    is_triple = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) == 3
    if not is_triple or not all(type(v) is int or isinstance(v, np.integer) for v in value):
        raise ValueError(f"a color must be three whole numbers, red, green and blue, got {shown(value)}.")
    if not all(0 <= channel <= 255 for channel in value):
        raise ValueError(f"a color must lie in 0..255, got {shown(value)}.")
    return tuple(int(channel) for channel in value)


def _clean_names(names: Sequence[str], place: str) -> list[str]:
    if isinstance(names, bytes):
        raise TypeError(f"The name of {place} must be text, got {shown(names)}: decode the bytes to text.")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{place} must be a name or a sequence of names, got {shown(names)}.")
    if not names:
        raise ValueError(f"{place} is empty: give every class a name.")
    cleaned: dict[str, str] = {}
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"name {position + 1} of {place} must be a string, got {shown(name)}.")
        what = place if len(names) == 1 else f"name {position + 1} of {place}"
        try:
            name = tidy(name)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from error
        if not name:
            raise ValueError(f"{what} is empty: give every class a name.")
        if ";" in name:  # it would be two classes where the name is typed, as `gkc segment` and pipelines take it
            raise ValueError(f"{what} is {name!r}: a ';' separates classes. Give each class an entry of its own.")
        cleaned.setdefault(comparison_key(name), name)
    return list(cleaned.values())


def _check_unique_labels(labels: list[str], places: _Places) -> None:
    first = {}
    for index, label in enumerate(labels):
        earlier = first.setdefault(comparison_key(label), index)
        if earlier != index:
            raise ValueError(
                f"{places.two(earlier, index)} are both {label!r}{_difference(labels[earlier], label)}: make one "
                "class of them, or give them names that differ."
            )


def _difference(first: str, second: str) -> str:
    """The characters in which two labels differ that look the same."""
    if first.casefold() == second.casefold():
        return ""
    return f" to the eye ({first!a} and {second!a})"


def _warn_shared_names(names: list[list[str]]) -> None:
    owners: dict[str, list[int]] = {}
    for index, class_names in enumerate(names):
        for name in class_names:
            owners.setdefault(comparison_key(name), []).append(index)
    shared = {name: classes for name, classes in owners.items() if len(classes) > 1}
    if shared:
        listed = "; ".join(
            f"{name!r} belongs to " + " and ".join(repr(names[index][0]) for index in classes)
            for name, classes in shared.items()
        )
        warnings.warn(f"one name is shared by several classes: {listed}.", UserWarning, stacklevel=4)


VocabularyLike = str | os.PathLike | Iterable[str | Sequence[str]] | Mapping[int, str] | Vocabulary

__all__ = ["UNKNOWN_WORDS_HINT", "Vocabulary", "VocabularyLike", "color_palette"]
