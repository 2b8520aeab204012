"""Extraction of nouns from captions for the grounding loss, stored as a dataset column `nouns`.

Nouns are tagged with NLTK's perceptron tagger, as in the published method, if its data is installed
(`python -m nltk.downloader averaged_perceptron_tagger_eng`). Otherwise a word is a noun if it occurs in WordNet's
tagged texts more often as a noun than as any other part of speech.
"""

import functools
import itertools
import multiprocessing
import os
import re
from collections.abc import Sequence

import nltk
from datasets import Dataset, List, Value
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize import NLTKWordTokenizer
from tqdm.auto import tqdm

from .database import WordNet, open_wordnet

NOUN_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS"})
TAGGER = "averaged_perceptron_tagger_eng"
HOW_TO_TAG = f"`python -m nltk.downloader {TAGGER}` (nltk's tagger) or `apt-get install wordnet-base` (WordNet)"

# Words that WordNet lists as nouns (a: vitamin A, in: indium) but that are rarely nouns in a caption.
_STOP_WORDS = (
    "a an the this that these those some any no all each every both either neither one two three four five six seven "
    "eight nine ten few many much more most lot lots several other another such same own "
    "i me my he him his she her it its we us our you your they them their who whom whose which what where when why "
    "how at by as in on of off to up out over under into onto from for with about above below near next down through "
    "around along across behind between beside front back top and or but nor if so than then while not only just very "
    "too also there here now be am is are was were been being do does did have has had having can could may might "
    "will would shall should must get gets go goes set like"
)


class LexiconTagger:
    """Noun tagger based on WordNet's sense frequencies.

    Args:
        wordnet: WordNet database from `train.data.wordnet.database.open_wordnet`.
    """

    def __init__(self, wordnet: WordNet):
        self.wordnet = wordnet
        self._known: dict[str, bool] = {}

    def nouns(self, caption: str) -> list[str]:
        """Return the nouns of a caption in order and unchanged."""
        return [word for word in _words(caption) if self.is_noun(word)]

    def is_noun(self, word: str) -> bool:
        """Return whether a word, singular or plural, is most often a noun."""
        word = word.lower()
        if word not in self._known:
            senses = {part: self.wordnet.synsets(word, pos=part) for part in "nvar"}
            counts = {part: self._count(word, part, found) for part, found in senses.items()}
            others = [(counts[part], len(found)) for part, found in senses.items() if part != "n"]
            # For words without tag counts, the part of speech with the most senses decides.
            is_mostly_noun = bool(senses["n"]) and (counts["n"], len(senses["n"])) >= max(others)
            self._known[word] = is_mostly_noun and word not in _STOP_WORDS.split()
        return self._known[word]

    def _count(self, word: str, part: str, senses: Sequence) -> int:
        forms = {word, self.wordnet.morphy(word, part)}
        return sum(self.wordnet.word_count(sense, form) for sense in senses for form in forms if form)


class PerceptronNouns:
    """Noun tagger based on NLTK's perceptron tagger: the tags NN, NNS, NNP and NNPS, as published."""

    def __init__(self):
        self._tagger = PerceptronTagger()
        self._tokenizer = NLTKWordTokenizer()

    def nouns(self, caption: str) -> list[str]:
        """Return the nouns of a caption in order and unchanged."""
        tagged = self._tagger.tag(self._tokenizer.tokenize(caption))
        return [word for word, tag in tagged if tag in NOUN_TAGS and any(map(str.isalpha, word))]


def open_tagger(wordnet: WordNet | str | os.PathLike | None = None) -> LexiconTagger | PerceptronNouns:
    """Open a noun tagger: WordNet if it is given, else NLTK's tagger if its data is installed, else WordNet.

    Args:
        wordnet: WordNet database or its folder. None prefers NLTK's tagger.

    Raises:
        RuntimeError: If neither is installed. The message names the commands that install them.
    """
    if isinstance(wordnet, WordNet):
        return LexiconTagger(wordnet)
    if wordnet is None and has_tagger():
        return PerceptronNouns()
    try:
        return LexiconTagger(open_wordnet(wordnet))
    except RuntimeError as error:
        if wordnet is not None:
            raise
        raise RuntimeError(f"No noun tagger for captions is installed: install one with {HOW_TO_TAG}.") from error


def has_tagger() -> bool:
    """Return whether the data of NLTK's tagger is installed."""
    try:
        return bool(nltk.data.find(f"taggers/{TAGGER}/"))
    except LookupError:
        return False


def caption_nouns(caption: str | None, tagger: LexiconTagger | PerceptronNouns | None = None) -> list[str]:
    """Return the distinct nouns of a caption in lowercase and in order; plurals are kept.

    Args:
        caption: Caption. None and the empty string have no nouns.
        tagger: Tagger from `open_tagger`. None opens the default tagger once.

    Raises:
        RuntimeError: If no tagger is installed.
    """
    if not caption or not caption.strip():
        return []
    tagger = tagger or _default_tagger()
    return list(dict.fromkeys(word.lower() for word in tagger.nouns(caption)))


def add_nouns(dataset: Dataset, wordnet: WordNet | str | os.PathLike | None = None, num_proc: int = 1) -> Dataset:
    """Add a column with the nouns of each caption to a dataset.

    Images are neither read nor copied.

    Args:
        dataset: Dataset with a column `captions` of lists of sentences. An existing column `nouns` is replaced.
        wordnet: WordNet database or its folder, to use instead of NLTK's tagger; see `open_tagger`.
        num_proc: Number of worker processes.

    Returns:
        The dataset with a column `nouns`, a list of nouns for each caption. It is in memory until `save_to_disk`.

    Raises:
        ValueError: If the dataset has no column `captions`.
        RuntimeError: If no tagger is installed.
    """
    if "captions" not in dataset.column_names:
        raise ValueError(f"The dataset has no column 'captions' to extract nouns from: it has {dataset.column_names}.")
    captions = [list(row or []) for row in dataset.with_format(None).select_columns(["captions"])["captions"]]
    flat = [caption for row in captions for caption in row]
    tagger = open_tagger(wordnet)
    progress = functools.partial(tqdm, total=len(flat), desc="Nouns of captions", disable=None)
    if num_proc <= 1:
        found = iter(list(progress(caption_nouns(caption, tagger) for caption in flat)))
    else:
        # Forked processes would share the file positions of WordNet's open files.
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_proc, initializer=_start_process, initargs=(tagger,)) as pool:
            found = iter(list(progress(pool.imap(_find_nouns, flat, chunksize=1000))))
    nouns = [list(itertools.islice(found, len(row))) for row in captions]
    others = dataset.remove_columns("nouns") if "nouns" in dataset.column_names else dataset
    return others.add_column("nouns", nouns, feature=List(List(Value("string"))))


_process: dict[str, LexiconTagger | PerceptronNouns] = {}


def _start_process(tagger: LexiconTagger | PerceptronNouns) -> None:
    _process["tagger"] = tagger


def _find_nouns(caption: str | None) -> list[str]:
    return caption_nouns(caption, _process["tagger"])


@functools.cache
def _default_tagger() -> LexiconTagger | PerceptronNouns:
    return open_tagger()


def _words(caption: str) -> list[str]:
    # Words include hyphens (t-shirt) but not the suffix 's; other words with an apostrophe (don't) are not nouns.
    words = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", caption.replace("’", "'"))
    return [word for word in (word.removesuffix("'s") for word in words) if "'" not in word]
