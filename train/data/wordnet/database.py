"""WordNet 3.0 by nltk's reader: from nltk's own data, from Debian's package, or from a folder.

Debian's `wordnet-base` has neither `lexnames` nor `index.sense`. The first is a short table of the manual,
lexnames(5WN), and given here from memory; the second serves other languages only. So the folder is read where it lies
and nothing is copied.

WordNet is a product of Princeton University: C. Fellbaum (ed.), *WordNet: An Electronic Lexical Database*, 1998.
"""

import io
import os
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import IO

import nltk
from nltk.corpus.reader.wordnet import Lemma, Synset, WordNetCorpusReader
from nltk.data import PathPointer

WORDNET_VARIABLE = "GKC_WORDNET"
DEBIAN_FOLDER = Path("/usr/share/wordnet")
HOW_TO_INSTALL = "install it with `apt-get install wordnet-base` or `python -m nltk.downloader wordnet`"

# All that is read; the files of verbs, adjectives and adverbs tell nouns from other words in a caption.
_PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(f"{kind}.{part}" for kind in ("index", "data") for part in _PARTS) + tuple(f"{p}.exc" for p in _PARTS)
_NLTK_NAMES = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")

# Lexicographer files by their number, as `data.*` gives it.
_LEXNAMES = {
    "adj": "all pert",
    "adv": "all",
    "noun": (
        "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
        "object person phenomenon plant possession process quantity relation shape state substance time"
    ),
    "verb": (
        "body change cognition communication competition consumption contact creation emotion motion perception "
        "possession social stative weather"
    ),
    "adj ": "ppl",
}


class WordNet(WordNetCorpusReader):
    """nltk's reader of a WordNet folder, English only, that needs neither `lexnames` nor `index.sense`.

    Args:
        root: A folder, or a pointer of nltk's into one of its archives.
    """

    def __init__(self, root: str | os.PathLike | PathPointer):
        if not isinstance(root, PathPointer):
            root = os.path.realpath(root)
            if root not in nltk.data.path:  # nltk reads no other folders
                nltk.data.path.append(root)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The multilingual functions are not available")
            super().__init__(root, None)

    def map_wn(self, version: str = "wordnet") -> None:
        """No mapping to other languages, for which nltk wants `index.sense`."""

    def open(self, file: str) -> IO[str]:
        """As nltk's, with the table of lexicographer files where the folder lacks it."""
        try:
            return super().open(file)
        except OSError:
            if file == "lexnames":
                return io.StringIO(lexnames_table())
            raise

    @cached_property
    def tag_counts(self) -> dict[str, int]:
        """How often each sense, by its key, was met in WordNet's own tagged texts; empty without `cntlist.rev`."""
        try:
            with self.root.join("cntlist.rev").open() as file:
                rows = [line.split() for line in file.read().decode(self._ENCODING).splitlines()]
        except OSError:
            return {}
        return {key: int(count) for key, _, count in rows}

    def count(self, lemma: Lemma) -> int:
        """How often a word was met in this sense in WordNet's tagged texts."""
        return self.tag_counts.get(lemma.key(), 0)

    def word_count(self, synset: Synset, word: str) -> int:
        """As `count`, for a word of a synset however it is written; 0 if it is none of its words."""
        return sum(self.count(lemma) for lemma in synset.lemmas() if lemma.name().lower() == word.lower())

    def gloss_count(self, phrase: str) -> int:
        """How often WordNet uses a word, or words in this order, in explaining its senses; a plural `s` counts too."""
        words = " ".join(_words(phrase))
        return sum(self._glosses.count(f" {form} ") for form in (words, f"{words}s")) if words else 0

    @cached_property
    def _glosses(self) -> str:
        """All explanations and examples as one text of small letters, a blank between two words."""
        lines = []
        for part in _PARTS:
            with self.root.join(f"data.{part}").open() as file:
                rows = file.read().decode(self._ENCODING).split("\n")
            lines += [" ".join(_words(line.partition("| ")[2])) for line in rows if not line.startswith(" ")]
        return " " + " \n ".join(lines) + " "

    def nouns(self, word: str) -> list[Synset]:
        """The noun senses of a word in WordNet's order; blanks may be blanks, plurals are understood."""
        return self.synsets(word.strip().replace(" ", "_"), pos="n") if word.strip() else []

    def __reduce__(self) -> tuple:
        # Open files cannot go to another process, nor be shared with one.
        return open_wordnet, (str(self.root),) if isinstance(self.root, str) else ()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def lexnames_table() -> str:
    """The file `lexnames`: number, name and part of speech of each of the 45 lexicographer files."""
    parts = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    rows = [
        (f"{part.strip()}.{name}", parts[part.strip()]) for part, names in _LEXNAMES.items() for name in names.split()
    ]
    return "".join(f"{number:02d}\t{name}\t{part}\n" for number, (name, part) in enumerate(rows))


def find_wordnet(folder: str | os.PathLike | None = None) -> Path | PathPointer:
    """Where WordNet is.

    Args:
        folder: Its folder; by default the one that the environment variable GKC_WORDNET names, else what
            `nltk.downloader` fetched, else Debian's.

    Raises:
        RuntimeError: it is not there, or incomplete; the message has the command that installs it.
    """
    if folder or os.environ.get(WORDNET_VARIABLE):
        told = Path(folder or os.environ[WORDNET_VARIABLE])
        return _complete(told, "" if folder else f", which {WORDNET_VARIABLE} names")
    for name in _NLTK_NAMES:
        try:
            return nltk.data.find(name)
        except LookupError:
            continue
    if DEBIAN_FOLDER.is_dir():
        return _complete(DEBIAN_FOLDER)
    raise RuntimeError(f"WordNet is not on this machine: {HOW_TO_INSTALL}, or name its folder (--wordnet DIR).")


def open_wordnet(folder: str | os.PathLike | None = None) -> WordNet:
    """Open WordNet, which takes about two seconds; raises as `find_wordnet`."""
    return WordNet(find_wordnet(folder))


def _complete(folder: Path, why: str = "") -> Path:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(f"{folder}{why} has no WordNet, it lacks {', '.join(missing)}: {HOW_TO_INSTALL}.")
    return folder
