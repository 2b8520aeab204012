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
"""
Where the words of a vocabulary come from: a table beside it, `NAME.provenance.csv`, with a row for each word.

Its columns are `label` and `word`; `origin`, one of `ORIGINS`; and the sense that was chosen for the class, as
`synset` (WordNet's name of it, "kite.n.03") and `wnid` (its part of speech and offset in WordNet 3.0, "n03621473", as
ImageNet writes them). Both are empty for a class that WordNet does not have.
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
    "given": "was in the vocabulary before",
    "lemma": "another word of the chosen sense",
    "hyponym": "a word of a kind of it",
    "deeper hyponym": "a word of a kind of a kind of it",
    "hypernym": "a word of what it is a kind of",
    "sister": "a word of another kind of the same",
    "merged member": "a label of the benchmark that was merged into the class",
    "manual": "written by hand",
}
SUFFIX = ".provenance.csv"


@dataclass(frozen=True)
class WordOrigin:
    """One word of a class and where it comes from, see the module."""

    label: str
    word: str
    origin: str
    synset: str = ""
    wnid: str = ""


def packaged_provenance(name: str) -> list[WordOrigin]:
    """
    The origin of every word of a packaged vocabulary, in its order.

    Raises:
        ValueError: there is no such vocabulary, or its words have no recorded origin.
    """
    path = provenance_path(packaged_path(name))
    if not path.is_file():
        raise ValueError(
            f"where the words of {name!r} come from is not recorded; `source` in its facts names the list."
        )
    return read_provenance(path)


def provenance_path(vocabulary_file: str | os.PathLike) -> Path:
    """The table that belongs to a vocabulary file."""
    return Path(vocabulary_file).with_suffix(SUFFIX)


def read_provenance(path: str | os.PathLike) -> list[WordOrigin]:
    """
    Read such a table.

    Raises:
        ValueError: a column is missing, or an origin is none of `ORIGINS`.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    columns = _columns()
    if not rows or rows[0] != columns or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"{path} must have the columns {', '.join(columns)}.")
    origins = [WordOrigin(*row) for row in rows[1:]]
    unknown = {origin.origin for origin in origins} - set(ORIGINS)
    if unknown:
        raise ValueError(f"{path} has the origins {sorted(unknown)}; there are {', '.join(ORIGINS)}.")
    return origins


def write_provenance(path: str | os.PathLike, origins: Iterable[WordOrigin]) -> None:
    """Write such a table."""
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
