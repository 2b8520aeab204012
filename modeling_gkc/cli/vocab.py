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
"""`gkc vocab`: list and show vocabularies."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..vocabulary import Vocabulary
from ..vocabulary_files import PACKAGED_NAMES, is_file_name, packaged_facts
from .common import user_errors, warnings_as_lines

KINDS = {True: "thing", False: "stuff", None: ""}


def list_vocabularies(arguments: argparse.Namespace) -> int:
    """Run `gkc vocab list` and return the exit code."""
    rows = []
    with user_errors("vocab list"):
        for name in PACKAGED_NAMES:
            facts = packaged_facts(name)
            rows.append([name, str(len(facts["classes"])), facts["description"]])
    _print_lines(
        [
            *_table(["NAME", "CLASSES", "DESCRIPTION"], rows, right=(1,)),
            "",
            "Use `gkc vocab show NAME` to list the classes of one.",
        ]
    )
    return 0


def show_vocabulary(arguments: argparse.Namespace) -> int:
    """Run `gkc vocab show` and return the exit code."""
    text = arguments.vocabulary
    with user_errors("vocab show"), warnings_as_lines():
        if is_file_name(text) or Path(text).is_file():
            vocabulary, facts = Vocabulary.from_file(text), None
        else:
            vocabulary, facts = Vocabulary.named(text), packaged_facts(text)
    if arguments.json:
        _print_lines(_json_lines(facts or {"classes": _class_entries(vocabulary)}))
    else:
        head = [facts["description"], f"source: {facts['source']}"] if facts else [text]
        _print_lines([*head, f"{len(vocabulary)} classes", "", *_class_table(vocabulary, sys.stdout.isatty())])
    return 0


def _class_table(vocabulary: Vocabulary, has_colors: bool) -> list[str]:
    """Return the lines of a table of the classes, with color swatches if the terminal shows colors."""
    kinds = vocabulary.is_thing or [None] * len(vocabulary)
    rows = [
        [str(index), KINDS[kind], "#{:02x}{:02x}{:02x}".format(*color), names[0], ", ".join(names[1:])]
        for index, (names, kind, color) in enumerate(zip(vocabulary.names, kinds, vocabulary.palette, strict=True))
    ]
    lines = _table(["INDEX", "KIND", "COLOR", "LABEL", "SYNONYMS"], rows, right=(0,))
    if not has_colors:
        return lines
    swatches = ["  ", *("\33[48;2;{};{};{}m  \33[0m".format(*color) for color in vocabulary.palette)]
    return [f"{swatch} {line}" for swatch, line in zip(swatches, lines, strict=True)]


def _table(head: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Align the cells of a table in columns and return its lines."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _class_entries(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Return the classes as entries of a vocabulary file."""
    none = [None] * len(vocabulary)
    columns = (vocabulary.is_thing or none, vocabulary.colors or none, vocabulary.templates or none)
    classes = []
    for names, is_thing, color, templates in zip(vocabulary.names, *columns, strict=True):
        fields = {"name": names[0], "synonyms": names[1:], "is_thing": is_thing, "color": color}
        classes.append(fields | ({"templates": templates} if templates else {}))
    return classes


def _json_lines(facts: dict[str, Any]) -> list[str]:
    """Return the lines of a JSON file with one class per line."""
    head = [f" {json.dumps(key)}: {_dump(value)}," for key, value in facts.items() if key != "classes"]
    classes = [f"  {_dump(entry)}" for entry in facts["classes"]]
    return ["{", *head, ' "classes": [', *(f"{line}," for line in classes[:-1]), classes[-1], " ]", "}"]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _print_lines(lines: list[str]) -> None:
    """Print lines; a pipe that was closed by its reader is not an error."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe, and Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["list_vocabularies", "show_vocabulary"]
