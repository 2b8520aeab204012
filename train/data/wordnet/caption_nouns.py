"""Nouns of captions, for grounding: kept with the data as a column `nouns`.

By nltk's tagger where its data is (`python -m nltk.downloader averaged_perceptron_tagger_eng`), as published,
otherwise by WordNet: a word is a noun if WordNet's tagged texts have it as a noun more often than as anything else.
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

# Words that WordNet knows as nouns (a: vitamin A, in: indium) but that hardly ever are one in a caption.
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
    """Nouns by WordNet alone.

    Args:
        wordnet: See `train.data.wordnet.database.open_wordnet`.
    """

    def __init__(self, wordnet: WordNet):
        self.wordnet = wordnet
        self._known: dict[str, bool] = {}

    def nouns(self, caption: str) -> list[str]:
        """The nouns of a caption in its order, as they stand in it."""
        return [word for word in _words(caption) if self.is_noun(word)]

    def is_noun(self, word: str) -> bool:
        """Whether a word, singular or plural, is a noun more often than anything else."""
        word = word.lower()
        if word not in self._known:
            self._known[word] = word not in _STOP_WORDS.split() and self._is_mostly_noun(word)
        return self._known[word]

    def _is_mostly_noun(self, word: str) -> bool:
        senses = {part: self.wordnet.synsets(word, pos=part) for part in "nvar"}
        if not senses["n"]:
            return False
        counts = {part: self._count(word, part, found) for part, found in senses.items()}
        others = [(counts[part], len(found)) for part, found in senses.items() if part != "n"]
        # Words that were never tagged are what most of their senses are.
        return (counts["n"], len(senses["n"])) >= max(others)

    def _count(self, word: str, part: str, senses: Sequence) -> int:
        forms = {word, self.wordnet.morphy(word, part)}
        return sum(self.wordnet.word_count(sense, form) for sense in senses for form in forms if form)


class PerceptronNouns:
    """Nouns by nltk's tagger: the tags NN, NNS, NNP and NNPS, as published."""

    def __init__(self):
        self._tagger = PerceptronTagger()
        self._tokenizer = NLTKWordTokenizer()

    def nouns(self, caption: str) -> list[str]:
        """The nouns of a caption in its order, as they stand in it."""
        tagged = self._tagger.tag(self._tokenizer.tokenize(caption))
        return [word for word, tag in tagged if tag in NOUN_TAGS and any(map(str.isalpha, word))]


def open_tagger(wordnet: WordNet | str | os.PathLike | None = None) -> LexiconTagger | PerceptronNouns:
    """What tells nouns: WordNet if it is given, else nltk's tagger if its data is there, else WordNet if it is.

    Raises:
        RuntimeError: neither is there; the message has the commands that install them.
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
        raise RuntimeError(f"nothing on this machine tells the nouns of captions: install {HOW_TO_TAG}.") from error


def has_tagger() -> bool:
    """Whether the data of nltk's tagger is on this machine."""
    try:
        return bool(nltk.data.find(f"taggers/{TAGGER}/"))
    except LookupError:
        return False


def caption_nouns(caption: str | None, tagger: LexiconTagger | PerceptronNouns | None = None) -> list[str]:
    """The nouns of a caption: small letters, each once, in the order of the caption, plurals as they stand.

    Args:
        caption: None and an empty text have no nouns.
        tagger: From `open_tagger`, which is called without it; give it when there are many captions.

    Raises:
        RuntimeError: as `open_tagger`.
    """
    if not caption or not caption.strip():
        return []
    tagger = tagger or _default_tagger()
    return list(dict.fromkeys(word.lower() for word in tagger.nouns(caption)))


def add_nouns(dataset: Dataset, wordnet: WordNet | str | os.PathLike | None = None, num_proc: int = 1) -> Dataset:
    """Add the nouns of each sample's captions.

    Images are neither read nor copied.

    Args:
        dataset: With a column `captions`, lists of sentences; one of `nouns` is replaced.
        wordnet: WordNet or its folder, instead of nltk's tagger; see `open_tagger`.
        num_proc: Processes.

    Returns:
        The dataset with a column `nouns`, for each caption the list of its nouns; nothing is written until
        `save_to_disk`.

    Raises:
        ValueError: it has no captions.
        RuntimeError: as `open_tagger`.
    """
    if "captions" not in dataset.column_names:
        raise ValueError(f"The dataset has no column 'captions' to take nouns from; it has {dataset.column_names}.")
    captions = [list(row or []) for row in dataset.with_format(None).select_columns(["captions"])["captions"]]
    flat = [caption for row in captions for caption in row]
    found = iter(_all_nouns(flat, open_tagger(wordnet), num_proc))
    nouns = [list(itertools.islice(found, len(row))) for row in captions]
    others = dataset.remove_columns("nouns") if "nouns" in dataset.column_names else dataset
    return others.add_column("nouns", nouns, feature=List(List(Value("string"))))


def _all_nouns(captions: list[str | None], tagger: LexiconTagger | PerceptronNouns, num_proc: int) -> list[list[str]]:
    progress = functools.partial(tqdm, total=len(captions), desc="Nouns of captions", disable=None)
    if num_proc <= 1:
        return list(progress(caption_nouns(caption, tagger) for caption in captions))
    # "spawn": processes that share the open files of WordNet would read at each other's places.
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_proc, initializer=_start_process, initargs=(tagger,)) as pool:
        return list(progress(pool.imap(_find_nouns, captions, chunksize=1000)))


_process: dict[str, LexiconTagger | PerceptronNouns] = {}


def _start_process(tagger: LexiconTagger | PerceptronNouns) -> None:
    _process["tagger"] = tagger


def _find_nouns(caption: str | None) -> list[str]:
    return caption_nouns(caption, _process["tagger"])


@functools.cache
def _default_tagger() -> LexiconTagger | PerceptronNouns:
    return open_tagger()


def _words(caption: str) -> list[str]:
    # Hyphens belong to a word (t-shirt), the ending 's does not, and what else has an apostrophe is no noun (don't).
    words = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", caption.replace("’", "'"))
    return [word for word in (word.removesuffix("'s") for word in words) if "'" not in word]
