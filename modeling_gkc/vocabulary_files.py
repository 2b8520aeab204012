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
Vocabularies in files: the packaged ones, and users' own as JSON, CSV or plain text.

A packaged vocabulary is `vocabularies/NAME.json`, an object with

* `name`, `description` (one line), `source` of the facts, `synonyms_source`;
* `ids`: what the `id` of a class is, and `ignore_index`: what void pixels become when ids become class indices;
* `classes`, in the order of the benchmark's training labels. A class has a `name`, its label, which no other class of
  the file has; `synonyms`; `is_thing` (true, false, or null where the benchmark does not say); `color` as [red, green,
  blue] or null; `id`, its value in the benchmark's annotation files; `official_name` where it differs from the label.
  Official words that would stand for two classes are in `official_name`, not in `synonyms`;
* where the benchmark has them: `novel_ids` of the classes that the method's zero-shot experiments hold out,
  `background`, the vocabulary whose words stand for the background; per class `gkc_name` and `detectron2_name` (other
  spellings in use), `supercategory`, `category`, `stuff35` (stuff in the first ADE20K split) and `labels59_txt_id`.

Users' files are UTF-8 and say the same with less:

* JSON: a list whose items are names, lists of synonyms or objects as above; an object {"name": ["synonym", ...]}; or
  an object with `classes`, one of the two. A `color` may also be "#rrggbb"; `templates` are prompt templates.
* CSV: a first line that names some of the columns name, synonyms, is_thing, color, templates, with commas, semicolons
  or tabs between them. Several synonyms or templates of a cell are separated by `|`; is_thing is "thing" or "stuff",
  "true" or "false", or empty; color is "#rrggbb" or empty.
* Text: one class per line, its synonyms after commas; `#` at the start of a line or after a blank begins a comment.

Files of other projects are read too:

* lists of names by number as FC-CLIP has them, "1:wall,walls" per line: the numbers must ascend and are dropped, lines
  with the name `invalid_class_id` are no classes;
* JSON {"0": "wall", "1": "sky"} or {"wall": 0, "sky": 1}, transformers' `id2label` and `label2id`, alone or in a
  model's config.json: the ids must be 0, 1, 2 .. or 1, 2, 3 .., in any order;
* COCO's categories, as list or in an annotation file: `name`, `isthing` and `color`, in the order of the list.
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
    """One class as it stands in a file, names unchecked, and the line it begins in."""

    names: list[Any]
    line: int
    is_thing: Any = None
    color: Any = None
    templates: Any = None


@dataclass
class _Source:
    """The text of a file, for messages that name file and line."""

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
    """
    Whether typed words are meant as the path of a file, be it one that `read_vocabulary_file` refuses.

    They have no `;`, and end as a vocabulary or as class embeddings do, or are the path of a file. A file without
    ending in the working folder may be named like any label and does not count.
    """
    if ";" in text:
        return False
    looks_like_path = bool(Path(text).suffix) or os.path.basename(text) != text
    return text.casefold().endswith((*VOCABULARY_SUFFIXES, EMBEDDINGS_SUFFIX)) or (
        looks_like_path and os.path.isfile(text)
    )


def read_vocabulary_file(path: str | Path) -> list[VocabularyEntry]:
    """
    Read the classes of a vocabulary file, see the module for its forms.

    Args:
        path: A .json, .csv or .txt file, UTF-8 with or without byte order mark.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or does not have its form; the message names file and line.
            Names are left for `Vocabulary` to check.
    """
    readers = {".json": _read_json, ".csv": _read_csv, ".txt": _read_text}
    suffix = Path(path).suffix.casefold()
    if suffix not in readers:
        hint = " `gkc segment --vocab` reads class embeddings." if suffix == EMBEDDINGS_SUFFIX else ""
        raise ValueError(f"{path} is no vocabulary file: its name must end in .json, .csv or .txt.{hint}")
    source = _Source(str(path), _decode(path))
    entries = readers[suffix](source)
    if not entries:
        raise ValueError(f"{path} names no class.")
    return entries


def packaged_facts(name: str) -> dict[str, Any]:
    """
    All that is stored about a packaged vocabulary, see the module for its layout.

    Raises:
        ValueError: there is no such vocabulary, or this copy of the code came without them.
    """
    return json.loads(packaged_path(name).read_text(encoding="utf-8"))


@functools.cache
def packaged_entries(name: str) -> tuple[VocabularyEntry, ...]:
    """The classes of a packaged vocabulary, read once; raises as `packaged_facts`."""
    return tuple(read_vocabulary_file(packaged_path(name)))


def packaged_path(name: str) -> Path:
    """
    The file of a packaged vocabulary.

    The Hub copies this module beside a checkpoint without its data; then the installed package has it.

    Raises:
        ValueError: there is no such vocabulary, or neither place has it.
    """
    if name not in PACKAGED_NAMES:
        raise ValueError(f"there is no packaged vocabulary {name!r}; {_suggestion(_meant_names(name, 0.6))}")
    for package in (Path(__file__).parent, _installed_package()):
        path = package and package / PACKAGED_FOLDER / f"{name}.json"
        if path and path.is_file():
            return path
    raise ValueError(
        f"the vocabulary {name!r} comes with the package, not with a checkpoint's code: install GKC (pip install), or "
        "give the words themselves."
    )


def check_packaged_name(text: str) -> None:
    """
    Refuse a single label that is no packaged name but was surely meant as one: "ade20k_151", "cityscapes", "voc_2012".

    Raises:
        ValueError: with the name that was probably meant, if any is like it.
    """
    text = text.strip()
    # Ordinary words are labels, however like a name; those with digits or underscores hardly ever are.
    cutoff = 0.6 if re.search(r"_\d+$", text) else 0.75 if re.search(r"[\d_]", text) else 1.0
    meant = _meant_names(text, cutoff)
    is_name = re.fullmatch(r"(?=.*\d)\w+_\w+", text)
    if (meant or is_name) and not re.search("[;,]", text):
        suggestion = f"{_suggestion(meant)} " if meant else ""
        raise ValueError(
            f"there is no packaged vocabulary {text!r}; {suggestion}`gkc vocab list` lists them. (If {text!r} is a "
            f"label, give it in a list, [{text!r}], or in a .txt file.)"
        )


def _meant_names(text: str, cutoff: float) -> list[str]:
    """Packaged names that differ from a text only by their number, else those that are as like it as `cutoff`."""
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
        raise ValueError(f"the vocabulary file {path} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file with the encoding UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text, it has zero bytes; save the file with the encoding UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_text(source: _Source) -> list[VocabularyEntry]:
    entries = []
    for number, line in enumerate(source.text.split("\n"), start=1):
        words = re.sub(r"(^|\s)#.*", "", line).strip()
        if ";" in words:
            raise source.error(number, "a ';' separates classes in typed words; in a file each has a line of its own.")
        try:
            check_separators(words)
        except ValueError as error:
            raise source.error(number, str(error)) from error
        if words:
            entries.append(VocabularyEntry(words.split(","), number))
    return _without_numbers(entries, source)


def _without_numbers(entries: list[VocabularyEntry], source: _Source) -> list[VocabularyEntry]:
    """The classes of a file whose lines begin with a number and a colon; others as they are."""
    numbered = [re.match(r"\s*(\d{1,9})\s*:", entry.names[0]) for entry in entries]
    if not any(numbered):
        return entries
    classes, last = [], -1
    for entry, match in zip(entries, numbered, strict=True):
        if match is None:
            raise source.error(entry.line, "other lines begin with a number and ':', this one does not.")
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
        raise source.error(line, f"this is no CSV: {error}.") from error
    return entries


def _csv_columns(row: list[str], line: int, source: _Source) -> list[str]:
    columns = [cell.strip().casefold() for cell in row]
    if "name" not in columns or not set(columns) <= set(_COLUMNS) or len(set(columns)) < len(columns):
        known = ", ".join(_COLUMNS[1:])
        raise source.error(line, f"the columns must be named, name and some of {known}; got {columns}.")
    return columns


def _csv_entry(row: list[str], columns: list[str], line: int, source: _Source) -> VocabularyEntry:
    if len(row) > len(columns):
        raise source.error(line, f"{len(row)} cells for {len(columns)} columns; put a name with a comma in quotes.")
    cells = dict.fromkeys(_COLUMNS, "") | {column: cell.strip() for column, cell in zip(columns, row, strict=False)}
    wrong = next((mark for mark in ";," if mark in cells["synonyms"]), None)
    if wrong:
        raise source.error(line, f"several synonyms are separated by '|', not by {wrong!r}: {cells['synonyms']!r}.")
    kind = cells["is_thing"].casefold()
    if kind not in _KINDS:
        raise source.error(line, f"is_thing must be thing, stuff or empty, got {cells['is_thing']!r}.")
    synonyms = cells["synonyms"].split("|") if cells["synonyms"] else []
    color = _hex_color(cells["color"], line, source) if cells["color"] else None
    templates = cells["templates"].split("|") if "|" in cells["templates"] else cells["templates"] or None
    return VocabularyEntry([cells["name"], *synonyms], line, _KINDS[kind], color, templates)


def _hex_color(text: str, line: int, source: _Source) -> tuple[int, ...]:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise source.error(line, f"a color must be written as #rrggbb, got {text!r}.")
    return tuple(bytes.fromhex(text[1:]))


class _Pairs(list):
    """Keys and values of a JSON object, repeated keys too."""


def _read_json(source: _Source) -> list[VocabularyEntry]:
    try:
        json.loads(source.text)
        return _json_entries(source)
    except json.JSONDecodeError as error:
        raise source.error(error.lineno, f"this is no JSON: {error.msg} (column {error.colno}).") from error
    except RecursionError as error:
        raise ValueError(f"{source.name} is nested too deeply.") from error
    except ValueError as error:
        if source.name in str(error):
            raise
        # Python's own, of an integer of thousands of digits.
        raise ValueError(f"{source.name} holds a number that cannot be read: {error}.") from error


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
        raise source.error(items[0].line, f"call the list of names 'classes', not {items[0].key!r}.")
    return [_json_entry(item, source) for item in items]


@dataclass
class _JsonItem:
    """An item of a JSON list, or of an object with its key; the line it begins in, and where its value does."""

    key: str | None
    value: Any
    line: int
    position: int


def _json_items(start: int, source: _Source) -> Iterator[_JsonItem]:
    """Items of the list or object that opens at `start` in valid JSON."""
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
    """The classes of {"0": "wall"} or {"wall": 0} in the order of their ids; None if the object is none of these."""
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
                f"the ids of the classes must be 0, 1, 2 .. or 1, 2, 3 .. without gap, got {shown(number)} instead of "
                f"{position}: give the names as a list.",
            )
    return [VocabularyEntry(item.value, item.line) for _, item in pairs]


def _classes_position(start: int, source: _Source) -> int:
    """Where the value of `classes` begins in the object that opens at `start`; `start` if there is none.

    COCO's `categories` and transformers' `id2label` stand for it in their files.
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
        raise source.error(line, "this class has no 'name'.")
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
        raise source.error(line, f"the key {key!r} is given twice.")
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
        raise source.error(line, f"the key {key!r} is unknown; {hint}")


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
