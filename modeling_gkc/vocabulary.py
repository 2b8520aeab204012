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

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Vocabulary:
    """
    K classes, each with one or more names.

    Args:
        names: K lists of names; the first name of a class is its label, the others are synonyms. Spaces at the ends
            are dropped and runs of spaces become one; a name given twice to one class counts once.
        is_thing: For each class whether it is countable (thing), not (stuff), or unknown (None).
        colors: For each class an (red, green, blue) triple, 0..255; None chooses well-spread ones.

    Raises:
        ValueError: no class, an empty name, two classes with the same label, or lists that differ in length. The
            message names the positions.

    Warns:
        UserWarning: one name belongs to several classes.
    """

    names: list[list[str]]
    is_thing: list[bool | None] | None = None
    colors: list[tuple[int, int, int]] | None = None

    def __post_init__(self):
        self.names = [_clean_names(names, index) for index, names in enumerate(self.names)]
        if not self.names:
            raise ValueError("no labels were given: name at least one class, for example 'dog; sofa, couch; lamp'.")
        _refuse_repeated_labels(self.labels)
        _warn_shared_names(self.names)
        for field in ("is_thing", "colors"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"`{field}` has {len(values)} entries for {len(self.names)} classes.")

    @classmethod
    def parse(cls, text: "VocabularyLike") -> "Vocabulary":
        """
        Read a vocabulary in any of the forms that users type.

        Args:
            text: A string, classes separated by `;` and synonyms by `,` ("dog; sofa, couch; lamp"); a sequence whose
                items are a name, taken as it stands, or a sequence of synonyms (["dog", ["sofa", "couch"]]); or a
                Vocabulary, returned as it is.

        Raises:
            ValueError: as for `Vocabulary`.
            TypeError: an item is neither a string nor a sequence of strings.
        """
        if isinstance(text, cls):
            return text
        if isinstance(text, str):
            return cls([label.split(",") for label in text.split(";")])
        if not isinstance(text, Sequence):
            raise TypeError(f"labels must be a string, a sequence or a Vocabulary, got {type(text).__name__}.")
        return cls([[label] if isinstance(label, str) else label for label in text])

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
        """K colours, (red, green, blue) in 0..255: the given ones, else `color_palette`."""
        if self.colors is not None:
            return [tuple(int(channel) for channel in color) for color in self.colors]
        return color_palette(len(self))


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


def _clean_names(names: Sequence[str], index: int) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{_place(index)} must be a name or a sequence of names, got {names!r}.")
    if not names:
        raise ValueError(f"{_place(index)} is empty: give every class a name.")
    cleaned: dict[str, str] = {}
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"name {position + 1} of {_place(index)} must be a string, got {name!r}.")
        name = " ".join(name.split())
        if not name:
            what = _place(index) if len(names) == 1 else f"name {position + 1} of {_place(index)}"
            raise ValueError(f"{what} is empty: give every class a name.")
        cleaned.setdefault(_key(name), name)
    return list(cleaned.values())


def _key(name: str) -> str:
    return name.casefold()


def _place(index: int) -> str:
    return f"label {index + 1} (index {index})"


def _refuse_repeated_labels(labels: list[str]) -> None:
    first = {}
    for index, label in enumerate(labels):
        earlier = first.setdefault(_key(label), index)
        if earlier != index:
            raise ValueError(
                f"labels {earlier + 1} and {index + 1} (indexes {earlier} and {index}) are both {label!r}: make one "
                "class of them, or give them names that differ."
            )


def _warn_shared_names(names: list[list[str]]) -> None:
    owners: dict[str, list[int]] = {}
    for index, class_names in enumerate(names):
        for name in class_names:
            owners.setdefault(_key(name), []).append(index)
    shared = {name: classes for name, classes in owners.items() if len(classes) > 1}
    if shared:
        listed = "; ".join(
            f"{name!r} belongs to " + " and ".join(repr(names[index][0]) for index in classes)
            for name, classes in shared.items()
        )
        warnings.warn(f"one name is shared by several classes: {listed}.", UserWarning, stacklevel=4)


VocabularyLike = str | Sequence[str | Sequence[str]] | Vocabulary

__all__ = ["Vocabulary", "VocabularyLike", "color_palette"]
