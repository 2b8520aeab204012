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
"""Provenance of the words of a vocabulary: a table `NAME.provenance.csv` beside it, with one row per word.

Its columns are `label` and `word`; `origin`, one of `ORIGINS`; and the WordNet sense of the class, as `synset` (its
name, "kite.n.03") and `wnid` (its part of speech and offset in WordNet 3.0, "n03621473", as in ImageNet). Both are
empty for a class that is not in WordNet.
"""

import csv
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .atomic_files import atomic_path
from .vocabulary_files import packaged_path

ORIGINS = {
    "name": "the label itself",
    "given": "a synonym of the original vocabulary",
    "lemma": "another lemma of the chosen sense",
    "hyponym": "a lemma of a hyponym of the sense",
    "deeper hyponym": "a lemma of a hyponym of a hyponym",
    "hypernym": "a lemma of a hypernym of the sense",
    "sister": "a lemma of another hyponym of the hypernym",
    "merged member": "a label of the benchmark that was merged into the class",
    "manual": "added by hand",
}
SUFFIX = ".provenance.csv"


@dataclass(frozen=True)
class WordOrigin:
    """Word of a class with its origin; the module describes the fields."""

    label: str
    word: str
    origin: str
    synset: str = ""
    wnid: str = ""


def packaged_provenance(name: str) -> list[WordOrigin]:
    """Load the origins of all words of a packaged vocabulary, in its order.

    Args:
        name: Name of the vocabulary.

    Returns:
        The origin of each word.

    Raises:
        ValueError: If there is no such vocabulary, or the origins of its words are not recorded.
    """
    path = provenance_path(packaged_path(name))
    if not path.is_file():
        raise ValueError(
            f"The origins of the words of {name!r} are not recorded; `source` in its file names the original list."
        )
    return read_provenance(path)


def provenance_path(vocabulary_file: str | os.PathLike) -> Path:
    """Return the path of the provenance table of a vocabulary file."""
    return Path(vocabulary_file).with_suffix(SUFFIX)


def read_provenance(path: str | os.PathLike) -> list[WordOrigin]:
    """Read a provenance table.

    Args:
        path: CSV file with the columns that the module describes.

    Returns:
        The origin of each word, in the order of the rows.

    Raises:
        ValueError: If a column is missing, or an origin is not in `ORIGINS`.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    columns = _columns()
    if not rows or rows[0] != columns or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"{path} must have the columns {', '.join(columns)}.")
    origins = [WordOrigin(*row) for row in rows[1:]]
    unknown = {origin.origin for origin in origins} - set(ORIGINS)
    if unknown:
        raise ValueError(f"{path}: origins must be among {', '.join(ORIGINS)}, got {sorted(unknown)}.")
    return origins


def write_provenance(path: str | os.PathLike, origins: Iterable[WordOrigin]) -> None:
    """Write a provenance table to a CSV file, replacing it atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([_columns(), *map(astuple, origins)])


def _columns() -> list[str]:
    return [field.name for field in fields(WordOrigin)]


__all__ = [
    "ORIGINS",
    "WordOrigin",
    "packaged_provenance",
    "provenance_path",
    "read_provenance",
    "write_provenance",
]
