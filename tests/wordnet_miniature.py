"""Miniature WordNet in the format of WordNet's files, and the real one where it is installed."""

import functools
import os
from collections import defaultdict
from pathlib import Path

import nltk
import pytest

from train.data.wordnet import database as wordnet_module
from train.data.wordnet.database import WORDNET_VARIABLE, WordNet, open_wordnet

TYPES = {"n": ("noun", 1), "v": ("verb", 2), "a": ("adj", 3), "r": ("adv", 4)}
TOPS, ANIMAL, ARTIFACT, FOOD, PERSON, PLANT, POSSESSION = 3, 5, 6, 13, 18, 20, 21
ADJECTIVE, ADVERB, MOTION = 0, 2, 38
HEADER = "  1 A miniature of WordNet, written for tests.\n"
EXCEPTIONS = {"noun": "mice mouse\n", "verb": "stood stand\n", "adj": "", "adv": ""}

# (name, part of speech, lexicographer file, {word: tag count}, hypernym, gloss), in the order of senses.
SYNSETS = [
    ("entity", "n", TOPS, {"entity": 0}, None, "what is"),
    ("animal", "n", TOPS, {"animal": 9, "beast": 0}, "entity", "what lives and moves"),
    ("dog", "n", ANIMAL, {"dog": 42, "domestic_dog": 0, "Canis_familiaris": 0}, "animal", "barks"),
    ("canis", "n", ANIMAL, {"Canis": 0, "genus_Canis": 0}, "entity", "dogs and wolves"),
    ("puppy", "n", ANIMAL, {"puppy": 2}, "dog", "a young dog"),
    ("dalmatian", "n", ANIMAL, {"dalmatian": 0}, "dog", "a large breed"),
    ("rodent", "n", ANIMAL, {"mouse": 7}, "animal", "small and grey"),
    ("timid", "n", PERSON, {"mouse": 0}, "entity", "a quiet person"),
    ("device", "n", ARTIFACT, {"mouse": 0, "computer_mouse": 0}, "entity", "moves a cursor"),
    ("cheque", "n", POSSESSION, {"kite": 0}, "entity", "a bank cheque that is not covered"),
    ("raptor", "n", ANIMAL, {"kite": 0}, "animal", "a bird of prey"),
    ("toy", "n", ARTIFACT, {"kite": 0}, "entity", "flies on a string"),
    ("banana_plant", "n", PLANT, {"banana": 1, "banana_tree": 0}, "entity", "a tall plant"),
    ("banana", "n", FOOD, {"banana": 1}, "entity", "a yellow fruit"),
    ("bottle", "n", ARTIFACT, {"bottle": 12}, "entity", "holds what is drunk"),
    ("wine_bottle", "n", ARTIFACT, {"wine_bottle": 0}, "bottle", "holds wine"),
    ("phial", "n", ARTIFACT, {"phial": 0}, "bottle", "a small one"),
    ("ampulla", "n", ARTIFACT, {"ampulla_bottle": 0}, "bottle", "used in no explanation"),
    ("cork", "n", ARTIFACT, {"cork": 1}, "entity", "closes a wine bottle, one of many wine bottles"),
    ("flask", "n", ARTIFACT, {"flask": 4}, "bottle", "flat"),
    ("wineglass", "n", ARTIFACT, {"wineglass": 0}, "entity", "a glass on a stem"),
    ("stone_wall", "n", ARTIFACT, {"stone_wall": 0, "rubble_wall": 0}, "entity", "a wall of stones"),
    ("automaton", "n", ARTIFACT, {"machine": 30}, "entity", "works by itself"),
    ("car", "n", ARTIFACT, {"car": 71, "auto": 4, "machine": 0}, "entity", "four wheels"),
    ("park", "n", ARTIFACT, {"park": 5}, "entity", "trees and lawns in a town"),
    ("standing", "n", ARTIFACT, {"standing": 1}, "entity", "where one stands"),
    ("stand", "v", MOTION, {"stand": 50}, None, "be upright"),
    ("park_a_car", "v", MOTION, {"park": 2}, None, "leave a car"),
    ("white", "a", ADJECTIVE, {"white": 38}, None, "like snow"),
    ("whiteness", "n", ARTIFACT, {"white": 3}, "entity", "what is white"),
    ("here", "r", ADVERB, {"here": 20}, None, "in this place"),
]


def write_wordnet(folder: Path, with_lexnames: bool = False) -> Path:
    """Write the miniature in the layout of Debian's package, without `lexnames` and `index.sense`."""
    folder.mkdir(parents=True, exist_ok=True)
    offsets = _offsets()
    for letter, (part, _) in TYPES.items():
        rows = [row for row in SYNSETS if row[1] == letter]
        (folder / f"data.{part}").write_text(HEADER + "".join(_data_line(row, offsets) for row in rows))
        (folder / f"index.{part}").write_text(HEADER + _index(letter, offsets))
        (folder / f"{part}.exc").write_text(EXCEPTIONS[part])
    (folder / "cntlist.rev").write_text(_counts())
    if with_lexnames:
        (folder / "lexnames").write_text("".join(f"{n:02d}\tnoun.own{n}\t1\n" for n in range(45)))
    return folder


def hide_wordnet(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    """Hide the WordNet and the nltk data of the machine, except for files that a test writes."""
    monkeypatch.delenv(WORDNET_VARIABLE, raising=False)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(wordnet_module, "DEBIAN_FOLDER", empty_folder / "none")


def real_wordnet() -> WordNet:
    """Return the real WordNet; if it is not installed, skip the test, or fail it if GKC_REQUIRE_WORDNET is set."""
    try:
        return _opened()
    except RuntimeError as error:
        if os.environ.get("GKC_REQUIRE_WORDNET"):
            pytest.fail(f"GKC_REQUIRE_WORDNET is set, and {error}")
        pytest.skip(f"NOT TESTED against the real WordNet: {error}")


@functools.cache
def _opened() -> WordNet:
    return open_wordnet()


def _lex_ids() -> dict[tuple[str, str], int]:
    """Assign numbers to the senses of a word within a lexicographer file, by synset and word."""
    seen: dict[tuple, int] = defaultdict(int)
    ids = {}
    for name, letter, topic, words, _, _ in SYNSETS:
        for word in words:
            ids[name, word] = seen[letter, topic, word.lower()]
            seen[letter, topic, word.lower()] += 1
    return ids


def _pointers(row: tuple) -> list[tuple[str, str]]:
    kinds = [("~", name) for name, _, _, _, parent, _ in SYNSETS if parent == row[0]]
    return ([("@", row[4])] if row[4] else []) + kinds


def _data_line(row: tuple, offsets: dict[str, int]) -> str:
    name, letter, topic, words, _, gloss = row
    ids, pointers = _lex_ids(), _pointers(row)
    fields = [f"{offsets[name]:08d}", f"{topic:02d}", letter, f"{len(words):02x}"]
    fields += [f"{word} {ids[name, word]:x}" for word in words]
    fields += [f"{len(pointers):03d}", *(f"{symbol} {offsets[other]:08d} n 0000" for symbol, other in pointers)]
    fields += ["01 + 02 00"] if letter == "v" else []
    return " ".join(fields) + f" | {gloss}  \n"


def _offsets() -> dict[str, int]:
    """Return the byte offset of each synset's line; the length of a line does not depend on the offsets in it."""
    zeros, offsets = dict.fromkeys((row[0] for row in SYNSETS), 0), {}
    for letter in TYPES:
        position = len(HEADER)
        for row in (row for row in SYNSETS if row[1] == letter):
            offsets[row[0]] = position
            position += len(_data_line(row, zeros))
    return offsets


def _index(letter: str, offsets: dict[str, int]) -> str:
    senses = defaultdict(list)
    for name, kind, _, words, _, _ in SYNSETS:
        for word in words if kind == letter else ():
            senses[word.lower()].append(f"{offsets[name]:08d}")
    return "".join(
        f"{word} {letter} {len(found)} 0 {len(found)} 0 {' '.join(found)}  \n"
        for word, found in sorted(senses.items())
    )


def _counts() -> str:
    ids = _lex_ids()
    rows = [
        f"{word.lower()}%{TYPES[letter][1]}:{topic:02d}:{ids[name, word]:02d}:: 1 {count}\n"
        for name, letter, topic, words, _, _ in SYNSETS
        for word, count in words.items()
        if count
    ]
    return "".join(sorted(rows))
