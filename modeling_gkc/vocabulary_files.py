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
"""Vocabulary files: packaged vocabularies, and users' vocabularies as JSON, CSV or plain text.

A packaged vocabulary is `vocabularies/NAME.json`, an object with

* `name`, `description` (one line), `source` of the facts, `synonyms_source`;
* `ids`: the meaning of the `id` of a class, and `ignore_index`: the class index of void pixels;
* `classes`, in the order of the benchmark's training labels. A class has a `name`, its label, which is unique within
  the file; `synonyms`; `is_thing` (true, false, or null if the benchmark does not define it); `color` as [red, green,
  blue] or null; `id`, its value in the benchmark's annotation files; `official_name` if it differs from the label.
  Official names that would belong to two classes are in `official_name`, not in `synonyms`;
* if the benchmark defines them: `novel_ids`, the classes held out in the zero-shot experiments of the paper (Han, Liu
  et al., *Global Knowledge Calibration for Fast Open-Vocabulary Segmentation*, ICCV 2023); `background`, the
  vocabulary whose classes make up the background; per class `gkc_name` and `detectron2_name` (other spellings in
  use), `supercategory`, `category`, `stuff35` (stuff in the first ADE20K split) and `labels59_txt_id`.

Users' files are in UTF-8 and in one of these formats:

* JSON: a list whose items are names, lists of synonyms or objects as above; an object {"name": ["synonym", ...]}; or
  an object whose `classes` are one of the two. A `color` may also be "#rrggbb"; `templates` are prompt templates.
* CSV: a header with some of the columns name, synonyms, is_thing, color, templates, separated by commas, semicolons
  or tabs. Several synonyms or templates in a cell are separated by `|`; is_thing is "thing" or "stuff", "true" or
  "false", or empty; color is "#rrggbb" or empty.
* Text: one class per line, with its synonyms separated by commas; `#` at the start of a line or after a space starts
  a comment.

Files of other projects are supported too:

* numbered lists of names as in FC-CLIP, "1:wall,walls" per line: the numbers must ascend and are dropped, and lines
  with the name `invalid_class_id` are skipped;
* JSON {"0": "wall", "1": "sky"} or {"wall": 0, "sky": 1}, transformers' `id2label` and `label2id`, alone or in a
  model's config.json: the ids must be 0, 1, 2, ... or 1, 2, 3, ..., in any order;
* COCO's categories, as a list or in an annotation file: `name`, `isthing` and `color`, in the order of the list.
"""

import bisect
import csv
import difflib
import functools
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .label_text import check_separators, shown

PACKAGED_NAMES = (
    "ade20k_150",
    "ade20k_847",
    "cityscapes_19",
    "coco_panoptic_133",
    "coco_stuff_171",
    "pascal_context_459",
    "pascal_context_59",
    "pascal_voc_20",
    "pascal_voc_21",
    "pascal_voc_background_39",
    "vipseg_124",
    "vspw_124",
)
VOCABULARY_SUFFIXES = (".json", ".csv", ".txt")
EMBEDDINGS_SUFFIX = ".safetensors"
PACKAGED_FOLDER = "vocabularies"

_COLUMNS = ("name", "synonyms", "is_thing", "color", "templates")
_FACTS = (
    "id",
    "official_name",
    "gkc_name",
    "detectron2_name",
    "supercategory",
    "category",
    "stuff35",
    "labels59_txt_id",
    "isthing",
    "keypoints",
    "skeleton",
)
_HEAD = (
    "name",
    "description",
    "source",
    "synonyms_source",
    "ids",
    "ignore_index",
    "novel_ids",
    "background",
    "classes",
)
_KINDS = {"": None, "thing": True, "true": True, "stuff": False, "false": False}
UNUSED_NUMBER = "invalid_class_id"
_LISTS_OF_NAMES = {"categories", "class_names", "labels", "names", "vocabulary", "words"}


@dataclass
class VocabularyEntry:
    """Class as read from a file, with unchecked names, and the number of its first line."""

    names: list[Any]
    line: int
    is_thing: Any = None
    color: Any = None
    templates: Any = None


@dataclass
class _Source:
    """Text of a file, which creates errors that name the file and line."""

    name: str
    text: str

    def error(self, line: int, message: str) -> ValueError:
        return ValueError(f"{self.name}, line {line}: {message}")

    def line_at(self, position: int) -> int:
        return bisect.bisect_left(self._line_ends, position) + 1

    @functools.cached_property
    def _line_ends(self) -> list[int]:
        return [match.start() for match in re.finditer("\n", self.text)]


def is_file_name(text: str) -> bool:
    """Return whether typed labels are the path of a file, even of a type that `read_vocabulary_file` rejects.

    A path has no `;`, and has the suffix of a vocabulary or of class embeddings or is an existing file. A file without
    a suffix in the working folder does not count, because its name may be a label.
    """
    if ";" in text:
        return False
    looks_like_path = bool(Path(text).suffix) or os.path.basename(text) != text
    return text.casefold().endswith((*VOCABULARY_SUFFIXES, EMBEDDINGS_SUFFIX)) or (
        looks_like_path and os.path.isfile(text)
    )


def read_vocabulary_file(path: str | Path) -> list[VocabularyEntry]:
    """Read the classes of a vocabulary file; the module describes the formats.

    Args:
        path: A .json, .csv or .txt file in UTF-8, with or without a byte order mark.

    Returns:
        The classes of the file. `Vocabulary` checks their names.

    Raises:
        ValueError: If the file cannot be read, is not UTF-8, or has an invalid format; the message names the file and
            line.
    """
    readers = {".json": _read_json, ".csv": _read_csv, ".txt": _read_text}
    suffix = Path(path).suffix.casefold()
    if suffix not in readers:
        hint = " `gkc segment --vocab` reads class embeddings." if suffix == EMBEDDINGS_SUFFIX else ""
        raise ValueError(f"{path} is not a vocabulary file: its name must end in .json, .csv or .txt.{hint}")
    source = _Source(str(path), _decode(path))
    entries = readers[suffix](source)
    if not entries:
        raise ValueError(f"{path} contains no class: name at least one.")
    return entries


def packaged_facts(name: str) -> dict[str, Any]:
    """Load the JSON object of a packaged vocabulary; the module describes its fields.

    Raises:
        ValueError: If there is no such vocabulary, or this copy of the code was published without them.
    """
    return json.loads(packaged_path(name).read_text(encoding="utf-8"))


@functools.cache
def packaged_entries(name: str) -> tuple[VocabularyEntry, ...]:
    """Load the classes of a packaged vocabulary, cached; errors are those of `packaged_facts`."""
    return tuple(read_vocabulary_file(packaged_path(name)))


def packaged_path(name: str) -> Path:
    """Return the path of the file of a packaged vocabulary.

    Code that was published with a checkpoint has no vocabularies; those of the installed package are used then.

    Raises:
        ValueError: If there is no such vocabulary, or its file is in neither place.
    """
    if name not in PACKAGED_NAMES:
        raise ValueError(f"There is no packaged vocabulary {shown(name)}; {_suggestion(_meant_names(name, 0.6))}")
    for package in (Path(__file__).parent, _installed_package()):
        path = package and package / PACKAGED_FOLDER / f"{name}.json"
        if path and path.is_file():
            return path
    raise ValueError(
        f"The vocabulary {shown(name)} is part of the package, not of a checkpoint's code: install GKC (pip "
        "install), or give the class names."
    )


def check_packaged_name(text: str) -> None:
    """Check that a single label is not a misspelled packaged vocabulary, as "ade20k_151", "cityscapes", "voc_2012".

    Raises:
        ValueError: If it is; the message suggests similar names.
    """
    text = text.strip()
    # Ordinary words are labels, even if similar to a name; labels with digits or underscores are rare.
    cutoff = 0.6 if re.search(r"_\d+$", text) else 0.75 if re.search(r"[\d_]", text) else 1.0
    meant = _meant_names(text, cutoff)
    is_name = re.fullmatch(r"(?=.*\d)\w+_\w+", text)
    if (meant or is_name) and not re.search("[;,]", text):
        suggestion = f"{_suggestion(meant)} " if meant else ""
        raise ValueError(
            f"There is no packaged vocabulary {shown(text)}; {suggestion}`gkc vocab list` lists them. (If "
            f"{shown(text)} is a label, give it in a list, [{shown(text)}], or in a .txt file.)"
        )


def _meant_names(text: str, cutoff: float) -> list[str]:
    """Return packaged names that differ from a text only by their number, else those of similarity `cutoff`."""
    word = re.sub(r"[\s-]+", "_", text.strip().casefold())
    families = [name for name in PACKAGED_NAMES if re.sub(r"_\d+$", "", name) == word]
    return families or difflib.get_close_matches(word, PACKAGED_NAMES, n=2, cutoff=cutoff)


def _suggestion(meant: list[str]) -> str:
    if meant:
        return f"did you mean {' or '.join(repr(name) for name in meant)}?"
    return f"there are {', '.join(PACKAGED_NAMES)}."


def _installed_package() -> Path | None:
    spec = importlib.util.find_spec("modeling_gkc")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _decode(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"The vocabulary file {path} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8; save the file in UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} contains zero bytes and is not UTF-8 text; save the file in UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_text(source: _Source) -> list[VocabularyEntry]:
    entries = []
    for number, line in enumerate(source.text.split("\n"), start=1):
        words = re.sub(r"(^|\s)#.*", "", line).strip()
        if ";" in words:
            raise source.error(number, "a ';' separates classes only in a string; in a file, use a line per class.")
        try:
            check_separators(words)
        except ValueError as error:
            raise source.error(number, str(error)) from error
        if words:
            entries.append(VocabularyEntry(words.split(","), number))
    return _without_numbers(entries, source)


def _without_numbers(entries: list[VocabularyEntry], source: _Source) -> list[VocabularyEntry]:
    """Remove the class numbers of a file whose lines start with a number and a colon."""
    numbered = [re.match(r"\s*(\d{1,9})\s*:", entry.names[0]) for entry in entries]
    if not any(numbered):
        return entries
    classes, last = [], -1
    for entry, match in zip(entries, numbered, strict=True):
        if match is None:
            raise source.error(entry.line, "this line must start with a number and ':', as the other lines do.")
        if int(match[1]) <= last:
            raise source.error(entry.line, f"the numbers of the classes must ascend, got {match[1]} after {last}.")
        last = int(match[1])
        entry.names = [entry.names[0][match.end() :], *entry.names[1:]]
        if [name.strip() for name in entry.names] != [UNUSED_NUMBER]:
            classes.append(entry)
    return classes


def _read_csv(source: _Source) -> list[VocabularyEntry]:
    header = next((line for line in source.text.split("\n") if re.search(r"\w", line)), "")
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    rows = csv.reader(io.StringIO(source.text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    entries, columns, line = [], None, 1
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                if columns is None:
                    columns = _csv_columns(row, line, source)
                else:
                    entries.append(_csv_entry(row, columns, line, source))
            line = rows.line_num + 1
    except csv.Error as error:
        raise source.error(line, f"invalid CSV: {error}.") from error
    return entries


def _csv_columns(row: list[str], line: int, source: _Source) -> list[str]:
    columns = [cell.strip().casefold() for cell in row]
    if "name" not in columns or not set(columns) <= set(_COLUMNS) or len(set(columns)) < len(columns):
        known = ", ".join(_COLUMNS[1:])
        raise source.error(line, f"the header must have the column name and some of {known}; got {columns}.")
    return columns


def _csv_entry(row: list[str], columns: list[str], line: int, source: _Source) -> VocabularyEntry:
    if len(row) > len(columns):
        raise source.error(line, f"{len(row)} cells for {len(columns)} columns; quote names that contain a comma.")
    cells = dict.fromkeys(_COLUMNS, "") | {column: cell.strip() for column, cell in zip(columns, row, strict=False)}
    wrong = next((mark for mark in ";," if mark in cells["synonyms"]), None)
    if wrong:
        raise source.error(line, f"separate synonyms by '|', not by {shown(wrong)}: {shown(cells['synonyms'])}.")
    kind = cells["is_thing"].casefold()
    if kind not in _KINDS:
        raise source.error(line, f"is_thing must be thing, stuff or empty, got {shown(cells['is_thing'])}.")
    synonyms = cells["synonyms"].split("|") if cells["synonyms"] else []
    color = _hex_color(cells["color"], line, source) if cells["color"] else None
    templates = cells["templates"].split("|") if "|" in cells["templates"] else cells["templates"] or None
    return VocabularyEntry([cells["name"], *synonyms], line, _KINDS[kind], color, templates)


def _hex_color(text: str, line: int, source: _Source) -> tuple[int, ...]:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise source.error(line, f"a color must be written as #rrggbb, got {shown(text)}.")
    return tuple(bytes.fromhex(text[1:]))


class _Pairs(list):
    """Key-value pairs of a JSON object, including repeated keys."""


def _read_json(source: _Source) -> list[VocabularyEntry]:
    try:
        json.loads(source.text)
        return _json_entries(source)
    except json.JSONDecodeError as error:
        raise source.error(error.lineno, f"invalid JSON: {error.msg} (column {error.colno}).") from error
    except RecursionError as error:
        raise ValueError(f"{source.name} is nested too deeply.") from error
    except ValueError as error:
        if source.name in str(error):
            raise
        # Python cannot convert integers of thousands of digits.
        raise ValueError(f"{source.name} contains a number that cannot be read: {error}.") from error


def _json_entries(source: _Source) -> list[VocabularyEntry]:
    start = len(source.text) - len(source.text.lstrip())
    if source.text[start] == "{":
        start = _classes_position(start, source)
    if source.text[start] not in "[{":
        raise source.error(source.line_at(start), "classes must be a list, or an object of names and synonyms.")
    items = list(_json_items(start, source))
    by_id = _entries_by_id(items, source)
    if by_id is not None:
        return by_id
    if len(items) == 1 and items[0].key in _LISTS_OF_NAMES:
        raise source.error(items[0].line, f"rename the key {shown(items[0].key)} to 'classes'.")
    return [_json_entry(item, source) for item in items]


@dataclass
class _JsonItem:
    """Item of a JSON list or object, with its key, its line, and the position of its value in the text."""

    key: str | None
    value: Any
    line: int
    position: int


def _json_items(start: int, source: _Source) -> Iterator[_JsonItem]:
    """Yield the items of the list or object that starts at position `start` of valid JSON."""
    text, has_keys = source.text, source.text[start] == "{"
    decode = json.JSONDecoder(object_pairs_hook=_Pairs).raw_decode
    position = _skip(r"[\[{]", text, start)
    while text[position] not in "]}":
        key, line = None, source.line_at(position)
        if has_keys:
            key, position = decode(text, position)
            position = _skip(r"\s*:", text, position)
        value, end = decode(text, position)
        yield _JsonItem(key, value, line, position)
        position = _skip(r"\s*,?", text, end)


def _skip(pattern: str, text: str, position: int) -> int:
    return re.compile(pattern + r"\s*").match(text, position).end()


def _entries_by_id(items: list[_JsonItem], source: _Source) -> list[VocabularyEntry] | None:
    """Return the classes of {"0": "wall"} or {"wall": 0} ordered by id, or None for any other object."""
    if not items or any(item.key is None for item in items):
        return None
    if all(re.fullmatch(r"\d{1,9}", item.key) for item in items):
        pairs = [(int(item.key), item) for item in items]
        for _, item in pairs:
            is_names = isinstance(item.value, list) and not isinstance(item.value, _Pairs)
            item.value = item.value if is_names else [item.value]
    elif all(type(item.value) is int for item in items):
        pairs = [(item.value, item) for item in items]
        for _, item in pairs:
            item.value = [item.key]
    else:
        return None
    pairs.sort(key=lambda pair: pair[0])
    for position, (number, item) in enumerate(pairs, start=min(1, max(0, pairs[0][0]))):
        if number != position:
            raise source.error(
                item.line,
                f"the class ids must be 0, 1, 2, ... or 1, 2, 3, ... without gaps, got {shown(number)} instead of "
                f"{position}: give the names as a list.",
            )
    return [VocabularyEntry(item.value, item.line) for _, item in pairs]


def _classes_position(start: int, source: _Source) -> int:
    """Return the position of the value of `classes` in the object that starts at `start`, or `start` without one.

    In files of COCO and transformers, `categories` and `id2label` take the place of `classes`.
    """
    items = list(_json_items(start, source))
    found = [item.position for item in items if item.key == "classes"]
    for item in items:
        is_categories = (
            item.key == "categories" and isinstance(item.value, list) and not isinstance(item.value, _Pairs)
        )
        is_foreign = is_categories and any(isinstance(entry, _Pairs) for entry in item.value)
        if not found and (is_foreign or (item.key == "id2label" and isinstance(item.value, _Pairs))):
            return item.position
    if not found:
        return start
    for index, item in enumerate(items):
        _check_key(item.key, _HEAD, [earlier.key for earlier in items[:index]], item.line, source)
    return found[0]


def _json_entry(item: _JsonItem, source: _Source) -> VocabularyEntry:
    value, line = item.value, item.line
    if isinstance(value, _Pairs) and item.key is None:
        return _json_class(value, line, source)
    if item.key is not None:
        return VocabularyEntry([item.key, *_synonyms(item.key, value, line, source)], line)
    return VocabularyEntry(value if isinstance(value, list) else [value], line)


def _json_class(pairs: _Pairs, line: int, source: _Source) -> VocabularyEntry:
    keys = [key for key, _ in pairs]
    for index, key in enumerate(keys):
        _check_key(key, _COLUMNS + _FACTS, keys[:index], line, source)
    fields = dict(pairs)
    if "isthing" in fields:
        if fields["isthing"] not in (0, 1) or "is_thing" in fields:
            raise source.error(line, f"COCO's 'isthing' must be 0 or 1, got {shown(fields['isthing'])}.")
        fields["is_thing"] = bool(fields["isthing"])
    if "name" not in fields:
        raise source.error(line, "the class has no 'name': add it.")
    synonyms, color = fields.get("synonyms"), fields.get("color")
    return VocabularyEntry(
        [fields["name"], *([] if synonyms is None else _synonyms(fields["name"], synonyms, line, source))],
        line,
        fields.get("is_thing"),
        _hex_color(color, line, source) if isinstance(color, str) else color,
        fields.get("templates"),
    )


def _synonyms(name: Any, value: Any, line: int, source: _Source) -> list[Any]:
    if not isinstance(value, list) or isinstance(value, _Pairs):
        raise source.error(line, f"the synonyms of {shown(name)} must be a list of names.")
    return value


def _check_key(key: str, known: tuple[str, ...], earlier: list[str], line: int, source: _Source) -> None:
    if key in earlier:
        raise source.error(line, f"the key {shown(key)} is given twice.")
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
        raise source.error(line, f"the key {shown(key)} is unknown; {hint}")


__all__ = [
    "PACKAGED_NAMES",
    "VocabularyEntry",
    "check_packaged_name",
    "is_file_name",
    "packaged_entries",
    "packaged_facts",
    "packaged_path",
    "read_vocabulary_file",
]
