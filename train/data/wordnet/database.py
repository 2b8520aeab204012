"""WordNet 3.0 database, read with NLTK from NLTK's data, the Debian package or a folder.

Debian's `wordnet-base` lacks the files `lexnames` and `index.sense`. The table `lexnames`, documented in the manual
page lexnames(5WN), is built into this module. `index.sense` is needed for other languages only.

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

# Parts of speech that are read; verbs, adjectives and adverbs distinguish nouns from other words in captions.
_PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(f"{kind}.{part}" for kind in ("index", "data") for part in _PARTS) + tuple(f"{p}.exc" for p in _PARTS)
_NLTK_NAMES = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")

# Names of the lexicographer files, in the order of the file numbers in `data.*`.
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
    """Reader of an English WordNet folder that does not require the files `lexnames` and `index.sense`.

    Args:
        root: WordNet folder, or an NLTK path pointer into an archive.
    """

    def __init__(self, root: str | os.PathLike | PathPointer):
        if not isinstance(root, PathPointer):
            root = os.path.realpath(root)
            if root not in nltk.data.path:  # NLTK opens files in these folders only
                nltk.data.path.append(root)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The multilingual functions are not available")
            super().__init__(root, None)

    def map_wn(self, version: str = "wordnet") -> None:
        """Skip the mapping to other languages, for which NLTK requires `index.sense`."""

    def open(self, file: str) -> IO[str]:
        """Open a database file, or the built-in table of lexicographer files if the folder lacks `lexnames`."""
        try:
            return super().open(file)
        except OSError:
            if file == "lexnames":
                return io.StringIO(lexnames_table())
            raise

    @cached_property
    def tag_counts(self) -> dict[str, int]:
        """Number of occurrences of each sense key in WordNet's tagged texts; empty without `cntlist.rev`."""
        try:
            with self.root.join("cntlist.rev").open() as file:
                rows = [line.split() for line in file.read().decode(self._ENCODING).splitlines()]
        except OSError:
            return {}
        return {key: int(count) for key, _, count in rows}

    def count(self, lemma: Lemma) -> int:
        """Return how often a lemma occurs in WordNet's tagged texts."""
        return self.tag_counts.get(lemma.key(), 0)

    def word_count(self, synset: Synset, word: str) -> int:
        """Return `count` of a word of a synset in any capitalization, or 0 if the synset lacks the word."""
        return sum(self.count(lemma) for lemma in synset.lemmas() if lemma.name().lower() == word.lower())

    def gloss_count(self, phrase: str) -> int:
        """Return how often a phrase or its plural in `s` occurs in WordNet's glosses."""
        words = " ".join(_words(phrase))
        return sum(self._glosses.count(f" {form} ") for form in (words, f"{words}s")) if words else 0

    @cached_property
    def _glosses(self) -> str:
        """All glosses and examples as one lowercase text, with single spaces between words."""
        lines = []
        for part in _PARTS:
            with self.root.join(f"data.{part}").open() as file:
                rows = file.read().decode(self._ENCODING).split("\n")
            lines += [" ".join(_words(line.partition("| ")[2])) for line in rows if not line.startswith(" ")]
        return " " + " \n ".join(lines) + " "

    def nouns(self, word: str) -> list[Synset]:
        """Return the noun senses of a word in WordNet's order; spaces and plural forms are accepted."""
        return self.synsets(word.strip().replace(" ", "_"), pos="n") if word.strip() else []

    def __reduce__(self) -> tuple:
        # Open files cannot be pickled or shared between processes.
        return open_wordnet, (str(self.root),) if isinstance(self.root, str) else ()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def lexnames_table() -> str:
    """Return the file `lexnames`: number, name and part of speech of each of the 45 lexicographer files."""
    parts = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    rows = [
        (f"{part.strip()}.{name}", parts[part.strip()]) for part, names in _LEXNAMES.items() for name in names.split()
    ]
    return "".join(f"{number:02d}\t{name}\t{part}\n" for number, (name, part) in enumerate(rows))


def find_wordnet(folder: str | os.PathLike | None = None) -> Path | PathPointer:
    """Locate the WordNet database.

    Args:
        folder: WordNet folder. None takes the folder in the environment variable GKC_WORDNET, else NLTK's data, else
            the folder of the Debian package.

    Raises:
        RuntimeError: If WordNet is not installed or incomplete. The message names the command that installs it.
    """
    if folder or os.environ.get(WORDNET_VARIABLE):
        named = Path(folder or os.environ[WORDNET_VARIABLE])
        return _check_complete(named, "" if folder else f" (from the environment variable {WORDNET_VARIABLE})")
    for name in _NLTK_NAMES:
        try:
            return nltk.data.find(name)
        except LookupError:
            continue
    if DEBIAN_FOLDER.is_dir():
        return _check_complete(DEBIAN_FOLDER)
    raise RuntimeError(f"WordNet is not installed: {HOW_TO_INSTALL}, or name its folder (--wordnet DIR).")


def open_wordnet(folder: str | os.PathLike | None = None) -> WordNet:
    """Open WordNet, which takes about two seconds.

    Args:
        folder: WordNet folder, as for `find_wordnet`.

    Raises:
        RuntimeError: If WordNet is not installed or incomplete.
    """
    return WordNet(find_wordnet(folder))


def _check_complete(folder: Path, origin: str = "") -> Path:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(
            f"{folder}{origin} is not a WordNet folder, it lacks {', '.join(missing)}: {HOW_TO_INSTALL}."
        )
    return folder
