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
"""`gkc vocab` and `gkc embed`: look at vocabularies, and encode one for later."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm import tqdm
from transformers import BatchFeature

from .class_embeddings import GKCClassEmbeddings, check_distinct, save_class_embeddings
from .cli_common import (
    WORDS_HELP,
    UserError,
    add_model_options,
    add_parser,
    add_templates_option,
    default_model_path,
    load_checkpoint,
    pick_device,
    user_errors,
    warnings_as_lines,
)
from .prompt_templates import resolve_templates
from .vocabulary import Vocabulary
from .vocabulary_files import PACKAGED_NAMES, is_file_name, packaged_facts

PROMPTS_PER_STEP = 256
KINDS = {True: "thing", False: "stuff", None: ""}

VOCAB_EXAMPLES = """\
examples:
  gkc vocab list
  gkc vocab show cityscapes_19
  gkc vocab show my-words.csv
  gkc vocab show ade20k_150 --json > my-words.json  a file to change, for gkc segment --labels my-words.json

Files of your own are .json, .csv (columns name, synonyms, is_thing, color; several synonyms separated by "|") or .txt
(a class per line, its synonyms after commas). Lists of FC-CLIP ("1:wall,walls" per line), id2label of a model's
config.json, and COCO's categories are read too.
"""
EMBED_EXAMPLES = f"""\
{WORDS_HELP}
examples:
  gkc embed --labels ade20k_847 --out ade20k.safetensors
  gkc embed --labels "cat; sofa, couch" --templates vild14 --out words.safetensors
  gkc segment photos/ --vocab words.safetensors

The file serves every checkpoint with the same text tower.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `vocab` and `embed` to the parser of `gkc`."""
    _add_vocab(commands)
    _add_embed(commands)


def _add_vocab(commands: argparse._SubParsersAction) -> None:
    vocab = add_parser(
        commands,
        "vocab",
        "list and show vocabularies",
        "List the packaged vocabularies, and show what one, or a file of your own, says.",
        VOCAB_EXAMPLES,
    )
    actions = vocab.add_subparsers(title="actions", metavar="ACTION", required=True)
    actions.add_parser("list", help="the packaged vocabularies").set_defaults(run=_list)
    show = actions.add_parser("show", help="the classes of a vocabulary")
    show.set_defaults(run=_show)
    show.add_argument("vocabulary", metavar="NAME_OR_FILE", help="a packaged name, or a .json, .csv or .txt file")
    show.add_argument("--json", action="store_true", help="print all that is known, as a vocabulary file")


def _add_embed(commands: argparse._SubParsersAction) -> None:
    embed = add_parser(
        commands,
        "embed",
        "encode words into a file",
        "Encode words once, for many runs of `gkc segment --vocab`.",
        EMBED_EXAMPLES,
    )
    embed.set_defaults(run=_embed)
    add = embed.add_argument
    add("--labels", metavar="WORDS", required=True, help="the words")
    add("--out", metavar="FILE", required=True, help="file to write, .safetensors")
    add_templates_option(embed)
    add_model_options(embed)


def _list(arguments: argparse.Namespace) -> int:
    rows = []
    with user_errors("vocab list"):
        for name in PACKAGED_NAMES:
            facts = packaged_facts(name)
            rows.append([name, str(len(facts["classes"])), facts["description"]])
    _print_lines([*_table(["NAME", "CLASSES", "WHAT IT IS"], rows, right=(1,)), "", "gkc vocab show NAME lists one."])
    return 0


def _show(arguments: argparse.Namespace) -> int:
    text = arguments.vocabulary
    with user_errors("vocab show"), warnings_as_lines():
        if is_file_name(text) or Path(text).is_file():
            vocabulary, facts = Vocabulary.from_file(text), None
        else:
            vocabulary, facts = Vocabulary.named(text), packaged_facts(text)
    if arguments.json:
        _print_lines(_json_lines(facts or {"classes": _described(vocabulary)}))
    else:
        head = [facts["description"], f"source: {facts['source']}"] if facts else [text]
        _print_lines([*head, f"{len(vocabulary)} classes", "", *_class_table(vocabulary, sys.stdout.isatty())])
    return 0


def _class_table(vocabulary: Vocabulary, has_colors: bool) -> list[str]:
    kinds = vocabulary.is_thing or [None] * len(vocabulary)
    rows = [
        [str(index), KINDS[kind], "#{:02x}{:02x}{:02x}".format(*color), names[0], ", ".join(names[1:])]
        for index, (names, kind, color) in enumerate(zip(vocabulary.names, kinds, vocabulary.palette, strict=True))
    ]
    lines = _table(["INDEX", "KIND", "COLOUR", "LABEL", "SYNONYMS"], rows, right=(0,))
    if not has_colors:
        return lines
    swatches = ["  ", *("\33[48;2;{};{};{}m  \33[0m".format(*color) for color in vocabulary.palette)]
    return [f"{swatch} {line}" for swatch, line in zip(swatches, lines, strict=True)]


def _table(head: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Lines of columns that stand below each other; the last one is as wide as it comes."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _described(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The classes as objects of a vocabulary file."""
    none = [None] * len(vocabulary)
    columns = (vocabulary.is_thing or none, vocabulary.colors or none, vocabulary.templates or none)
    classes = []
    for names, is_thing, color, templates in zip(vocabulary.names, *columns, strict=True):
        fields = {"name": names[0], "synonyms": names[1:], "is_thing": is_thing, "color": color}
        classes.append(fields | ({"templates": templates} if templates else {}))
    return classes


def _json_lines(facts: dict[str, Any]) -> list[str]:
    """JSON with a class per line."""
    head = [f" {json.dumps(key)}: {_dump(value)}," for key, value in facts.items() if key != "classes"]
    classes = [f"  {_dump(entry)}" for entry in facts["classes"]]
    return ["{", *head, ' "classes": [', *(f"{line}," for line in classes[:-1]), classes[-1], " ]", "}"]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _print_lines(lines: list[str]) -> None:
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _embed(arguments: argparse.Namespace) -> int:
    # What was typed is read before the model, so that a slip costs no waiting.
    with user_errors("--labels"), warnings_as_lines():
        vocabulary = Vocabulary.parse(arguments.labels)
    with user_errors("--templates"):
        templates = resolve_templates(arguments.templates) if arguments.templates else None
    path = _prepare_output(arguments.out)
    model, processor = load_checkpoint(arguments.model or default_model_path())
    with user_errors("--device"):
        model.to(pick_device(arguments.device))
    with user_errors("--labels"), warnings_as_lines():
        prompts = processor(text=vocabulary, prompt_templates=templates, return_tensors="pt").to(model.device)
    embeddings = _encode(model, prompts)
    with user_errors("--labels"), warnings_as_lines():
        check_distinct(vocabulary, embeddings, processor)
    try:
        save_class_embeddings(path, model, embeddings, vocabulary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error
    counts = f"{len(vocabulary)} classes, {len(vocabulary.flat_names)} names, {len(prompts['input_ids'])} prompts"
    print(f"{path}: {counts}, width {embeddings.class_embeds.shape[-1]}, text tower of {model.name_or_path}")
    return 0


def _prepare_output(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".safetensors":
        raise UserError(f"--out: the file's name must end in .safetensors, got {text}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {path.parent}: {error.strerror}") from error
    return path


def _encode(model: Any, prompts: BatchFeature) -> GKCClassEmbeddings:
    """As `model.get_class_embeddings`, with a progress bar: what has been encoded, the model remembers."""
    steps = [prompts[name].split(PROMPTS_PER_STEP) for name in ("input_ids", "attention_mask")]
    with tqdm(total=len(prompts["input_ids"]), unit="prompt", disable=None) as bar:
        for ids, mask in zip(*steps, strict=True):
            model.get_text_features(ids, mask)
            bar.update(len(ids))
    return model.get_class_embeddings(**prompts)


__all__ = ["add_command"]
