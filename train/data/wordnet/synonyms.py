"""Add synonyms from WordNet to a vocabulary.

    python -m train.synonyms --vocabulary cityscapes_19 --out cityscapes.json
    python -m train.synonyms --vocabulary my-words.csv --out my-words.json --overrides corrections.json
    gkc vocab show my-words.json

The output FILE.json is a vocabulary for `python -m train` and `gkc segment --labels`. FILE.provenance.csv is written
next to it and lists the WordNet sense of each word. The output is deterministic.

The words of a class are its label, then the synonyms that the vocabulary already has, then words from WordNet:
  1. The sense of a class is the noun sense that shares the most words with the class. Without shared words it is the
     first sense whose lexicographer file fits the supercategory of the class (COCO: "food" selects the fruit banana,
     not the plant), or its kind, thing or stuff, or any visible category; otherwise the first sense. Labels are
     looked up with underscores, joined (wineglass), in the singular, and with their two words swapped.
  2. The other lemmas of the sense are added if this is their main sense: "machine" does not primarily mean car.
     Scientific Latin names are skipped.
  3. The lemmas of the direct hyponyms are added if they are common: tagged with this sense in WordNet's texts, or a
     compound of the label ("wine bottle") that WordNet uses in its glosses. Breeds, species, hyponyms that are classes
     themselves and hyponyms with another lexicographer file are skipped. At most 4 are added.
  4. A word that equals a word of another class, ignoring spaces, hyphens and plural, is skipped. A word that two
     classes would receive is added to neither. A class has at most 8 words.

The option --overrides reads manual corrections: a JSON object that maps a label to any of "synset", its sense
("cake.n.03", "n07628870", or null for none); "words", all words after the label; "add" and "drop", lists of words.
    {"cake": {"synset": "cake.n.03", "drop": ["fish cake"]}, "stop sign": {"add": ["halt sign"]}}
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_gkc.atomic_files import atomic_write
from modeling_gkc.cli.common import interruptible, non_negative, positive
from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import PACKAGED_NAMES, packaged_facts
from modeling_gkc.vocabulary_provenance import WordOrigin, provenance_path, write_provenance

from ...storage.checksums import read_json

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Lemma, Synset

    from .database import WordNet

MAX_WORDS = 8
MAX_KINDS = 4

_ARTIFACT = frozenset({"artifact"})
_PLANT = frozenset({"plant"})
_OBJECT = frozenset({"object"})
# Lexicographer files, without "noun.", that fit a supercategory of COCO or a category of Cityscapes.
SUPERCATEGORY_LEXNAMES = {
    "animal": frozenset({"animal"}),
    "food": frozenset({"food"}),
    "food-stuff": frozenset({"food", "plant"}),
    "plant": _PLANT,
    "person": frozenset({"Tops"}),
    "human": frozenset({"Tops", "person"}),
    "ground": frozenset({"artifact", "object", "substance"}),
    "water": _OBJECT,
    "sky": _OBJECT,
    "solid": _OBJECT,
    "nature": _PLANT | _OBJECT,
    "raw-material": frozenset({"substance"}),
}
VISIBLE_LEXNAMES = frozenset({"Tops", "animal", "artifact", "food", "object", "person", "plant", "substance"})
KIND_LEXNAMES = {
    None: VISIBLE_LEXNAMES,
    True: VISIBLE_LEXNAMES - {"substance"},
    False: VISIBLE_LEXNAMES - {"animal", "person"},
}
# Pronouns, slang and vulgar words, which WordNet 3.0 does not mark.
_NEVER = frozenset(
    {"someone", "somebody", "mortal", "crapper", "shitter", "john", "lav", "sinker"}
    | {"boob tube", "goggle box", "idiot box", "red hot"}
)


@dataclass(frozen=True)
class Correction:
    """Manual correction of the words of one class; `synset` is False where the sense is not corrected."""

    synset: str | bool | None = False
    words: tuple[str, ...] | None = None
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedClass:
    """Class label with the vocabulary entries that help to select its WordNet sense."""

    label: str
    given: tuple[str, ...] = ()
    is_thing: bool | None = None
    supercategory: str | None = None
    correction: Correction = field(default_factory=Correction)

    @property
    def lexnames(self) -> frozenset[str]:
        """Lexicographer files that fit the class."""
        if self.supercategory is not None:
            return SUPERCATEGORY_LEXNAMES.get(self.supercategory, _ARTIFACT)
        return KIND_LEXNAMES[self.is_thing]


def word_key(word: str) -> str:
    """Return a comparison key of a word: lowercase letters and digits in the singular, without separators."""
    key = re.sub(r"[\W_]+", "", word.casefold())
    for ending, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh")):
        if key.endswith(ending):
            return key.removesuffix(ending) + singular
    return key.removesuffix("s") if not key.endswith("ss") else key


def build_synonyms(
    classes: Sequence[NamedClass], wordnet: WordNet, max_words: int = MAX_WORDS, max_kinds: int = MAX_KINDS
) -> list[list[WordOrigin]]:
    """Select the words of every class by the rules in the description of this module.

    Args:
        classes: All classes of the vocabulary, since their words must not collide.
        wordnet: WordNet database from `train.data.wordnet.database.open_wordnet`.
        max_words: Maximum number of words of a class, including its label.
        max_kinds: Maximum number of words of a class that come from hyponyms.

    Returns:
        The words of each class, the label first.

    Raises:
        ValueError: If a correction names a sense that WordNet does not have, or a word of another class.
    """
    return _Builder(list(classes), wordnet, max_words, max_kinds).build()


@dataclass
class _Builder:
    classes: list[NamedClass]
    wordnet: WordNet
    max_words: int
    max_kinds: int

    def build(self) -> list[list[WordOrigin]]:
        lemmas = [self._lemmas(index) for index in range(len(self.classes))]
        taken = _owners(lemmas)
        kinds = [self._kinds(index) for index in range(len(self.classes))]
        both = _owners([[*first, *second] for first, second in zip(lemmas, kinds, strict=True)])
        built = []
        for index, _ in enumerate(self.classes):
            own = [word for word in lemmas[index] if self._is_free(word, index, taken)]
            own += [word for word in kinds[index] if self._is_free(word, index, both)][: self.max_kinds]
            built.append(self._listed(index, own))
        return built

    @cached_property
    def senses(self) -> list[Synset | None]:
        return [choose_sense(named, self.wordnet) for named in self.classes]

    @cached_property
    def fixed(self) -> dict[str, set[int]]:
        """Indices of the classes that own a word independently of WordNet, by word key."""
        return _owners([[named.label, *named.given, *named.correction.add] for named in self.classes])

    @cached_property
    def ancestors(self) -> set[Synset]:
        """Senses of all classes and all their hypernyms."""
        chosen = {sense for sense in self.senses if sense}
        return chosen.union(*(sense.closure(lambda s: s.hypernyms()) for sense in chosen))

    def _lemmas(self, index: int) -> list[str]:
        sense = self.senses[index]
        if sense is None or self.classes[index].correction.words is not None:
            return []
        lemmas = [lemma for lemma in sense.lemmas() if self._is_main_sense(lemma) and not self._is_latin(lemma)]
        return [word for word in map(_text, lemmas) if self._may_have(word, index)]

    def _kinds(self, index: int) -> list[str]:
        """Return the words of the direct hyponyms of a class, the most common first."""
        sense = self.senses[index]
        if sense is None or self.classes[index].correction.words is not None:
            return []
        ranked = []
        for kind in sense.hyponyms():
            # A hyponym that is another class, or whose hyponym is one, is not a synonym.
            is_other_class = kind in self.ancestors or any(
                self.fixed.get(word_key(name), {index}) != {index} for name in kind.lemma_names()
            )
            if kind.lexname() == sense.lexname() and not is_other_class:
                ranked += self._common_words(kind, index)
        return [word for _, _, word in sorted(ranked, key=lambda row: (-row[0], -row[1], row[2]))]

    def _common_words(self, kind: Synset, index: int) -> list[tuple[int, int, str]]:
        """Return the most common word of a hyponym with its tag count and its count in glosses."""
        heads = {word_key(lemma.split("_")[-1]) for lemma in self.senses[index].lemma_names()}
        heads.add(word_key(re.split(r"[\s_-]+", self.classes[index].label)[-1]))
        found = []
        for lemma in kind.lemmas():
            word, tagged = _text(lemma), self.wordnet.count(lemma)
            is_compound = " " in word and word_key(word.split()[-1]) in heads
            # A single word for a plant is a species; a capitalized name is a breed, a brand or a place.
            is_species = _topic(kind) == "plant" or lemma.name() != lemma.name().lower()
            used = self.wordnet.gloss_count(word) if is_compound else 0
            common = used or (tagged and (is_compound or not is_species))
            if common and self._is_main_sense(lemma) and self._may_have(word, index):
                found.append((tagged, used, word))
        return sorted(found, key=lambda row: (-row[0], -row[1]))[:1]

    def _is_main_sense(self, lemma: Lemma) -> bool:
        """Return whether a lemma is its word's first sense, or the first visible one if no other sense is tagged."""
        sense = lemma.synset()
        senses = self.wordnet.synsets(lemma.name(), pos="n")
        if not senses or senses[0] == sense:
            return True
        visible = [other for other in senses if _topic(other) in VISIBLE_LEXNAMES]
        tagged = sum(self.wordnet.word_count(other, lemma.name()) for other in senses if other != sense)
        return not tagged and visible[:1] == [sense]

    def _is_latin(self, lemma: Lemma) -> bool:
        """Return whether a lemma is a scientific name, whose genus is a WordNet entry: Canis familiaris."""
        first, *rest = lemma.name().split("_")
        genera = self.wordnet.synsets(f"genus_{first}", pos="n") if first[:1].isupper() else []
        return bool(genera) and (bool(rest) or lemma.synset() in genera)

    def _may_have(self, word: str, index: int) -> bool:
        named = self.classes[index]
        last = word_key(word.split()[-1])
        heads = {word_key(name) for name in (named.label, re.split(r"[\s_-]+", named.label)[-1], *named.given)}
        is_kind_of_another = " " in word and last not in heads and self.fixed.get(last, {index}) != {index}
        dropped = {word_key(other) for other in named.correction.drop} | {word_key(other) for other in _NEVER}
        return word_key(word) not in dropped and not is_kind_of_another

    def _is_free(self, word: str, index: int, claims: dict[str, set[int]]) -> bool:
        key = word_key(word)
        return self.fixed.get(key, claims.get(key, {index})) == {index}

    def _listed(self, index: int, built: list[str]) -> list[WordOrigin]:
        named, sense = self.classes[index], self.senses[index]
        by_hand = [*(named.correction.words or ()), *named.correction.add]
        for word in by_hand:
            others = self.fixed.get(word_key(word), set()) - {index}
            if others:
                label = self.classes[min(others)].label
                raise ValueError(
                    f"The corrections (--overrides) add {word!r} to {named.label!r}, but it is a word of {label!r}."
                )
        given = [word for word in named.given if word not in named.correction.drop]
        given = given if named.correction.words is None else []
        lemmas = {_text(lemma) for lemma in sense.lemmas()} if sense else set()
        ranked = [(named.label, "name"), *((word, "manual") for word in by_hand), *((word, "given") for word in given)]
        ranked += [(word, "lemma" if word in lemmas else "hyponym") for word in built]
        first = {}
        for word, origin in ranked:
            first.setdefault(word.casefold(), WordOrigin(named.label, word, origin, *_names(sense)))
        return list(first.values())[: max(self.max_words, 1 + len(given) + len(by_hand))]


def choose_sense(named: NamedClass, wordnet: WordNet) -> Synset | None:
    """Return the WordNet sense of a class by rule 1 of this module's description, or None if there is none.

    Raises:
        ValueError: If the correction of the class names a sense that WordNet does not have.
    """
    if named.correction.synset is not False:
        name = named.correction.synset
        if not name:
            return None
        from nltk.corpus.reader.wordnet import WordNetError

        try:
            if re.fullmatch(r"n\d{8}", name):
                return wordnet.synset_from_pos_and_offset("n", int(name[1:]))
            return wordnet.synset(name)
        except (WordNetError, ValueError, AttributeError) as error:
            raise ValueError(
                f"The corrections (--overrides) give {named.label!r} the sense {name!r}, which WordNet does not have."
            ) from error
    senses = next(filter(None, map(wordnet.nouns, spellings(named.label))), [])
    given = {word_key(word) for word in named.given}
    shared = {sense: len(given & {word_key(name) for name in sense.lemma_names()}) for sense in senses}
    fitting = [sense for sense in senses if _topic(sense) in named.lexnames] or senses
    if any(shared.values()):
        return max(senses, key=lambda sense: (shared[sense], sense in fitting))
    return fitting[0] if fitting else None


def spellings(label: str) -> list[str]:
    """Return the spellings under which WordNet may list a label, the most likely first."""
    words = re.sub(r"[-_\s]+(merged|other|stuff)\b", "", label.strip()).replace("_", " ").split()
    parts = " ".join(words).replace("-", " ").split()
    exchanged = [" ".join(reversed(parts))] if len(parts) == 2 else []
    return list(dict.fromkeys([" ".join(words), " ".join(parts), "".join(parts), *exchanged]))


def read_classes(vocabulary: str, labels_only: bool = False) -> tuple[list[NamedClass], dict[str, Any]]:
    """Read the classes of a vocabulary and its other entries.

    Args:
        vocabulary: Packaged name, or a file that `Vocabulary.from_file` reads.
        labels_only: Whether to ignore the synonyms of the vocabulary.

    Returns:
        The classes, and the content of the vocabulary in the format of a JSON vocabulary file.

    Raises:
        ValueError: If `Vocabulary.named` or `Vocabulary.from_file` rejects the vocabulary.
    """
    if vocabulary in PACKAGED_NAMES:
        parsed, facts = Vocabulary.named(vocabulary), packaged_facts(vocabulary)
    else:
        parsed = Vocabulary.from_file(vocabulary) if Path(vocabulary).suffix else Vocabulary.named(vocabulary)
        facts = _facts(Path(vocabulary), parsed)
    classes = []
    for index, (names, entry) in enumerate(zip(parsed.names, facts["classes"], strict=True)):
        kind = parsed.is_thing[index] if parsed.is_thing else None
        group = entry.get("supercategory", entry.get("category"))
        classes.append(NamedClass(names[0], () if labels_only else tuple(names[1:]), kind, group))
    return classes, facts


def _facts(path: Path, parsed: Vocabulary) -> dict[str, Any]:
    """Return the content of a user's vocabulary file in the format of a packaged vocabulary."""
    content = json.loads(path.read_text(encoding="utf-8-sig")) if path.suffix.casefold() == ".json" else []
    head = content if isinstance(content, dict) and "classes" in content else {"classes": content}
    known = head["classes"] if isinstance(head["classes"], list) else []
    known = known or [None] * len(parsed)
    none = [None] * len(parsed)
    columns = zip(parsed.is_thing or none, parsed.colors or none, parsed.templates or none, strict=True)
    described = []
    for entry, row in zip(known, columns, strict=True):
        fields = {key: value for key, value in zip(("is_thing", "color", "templates"), row, strict=True) if value}
        kind = {} if row[0] is None else {"is_thing": row[0]}
        described.append({**(entry if isinstance(entry, dict) else {}), **fields, **kind})
    return {**head, "classes": described}


def read_corrections(path: str | Path, labels: Iterable[str]) -> dict[str, Correction]:
    """Read a JSON file of manual corrections by class label.

    Raises:
        ValueError: If the file cannot be read, or names an unknown class or field.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain an object that maps labels to corrections.")
    unknown = sorted(set(content) - set(labels))
    if unknown:
        raise ValueError(f"{path} corrects {unknown}, which are not labels of the vocabulary.")
    return {label: _correction(value, f"{path}, {label!r}") for label, value in content.items()}


def _correction(value: Any, place: str) -> Correction:
    fields = ("synset", "words", "add", "drop")
    if not isinstance(value, dict) or set(value) - set(fields):
        raise ValueError(f"{place}: A correction must be an object with any of {', '.join(fields)}, got {value!r}.")
    lists = {name: value[name] for name in fields[1:] if name in value}
    for name, words in lists.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"{place}: {name!r} must be a list of words, got {words!r}.")
    synset = value.get("synset", False)
    if "synset" in value and not isinstance(synset, str | None):
        raise ValueError(f"{place}: 'synset' must be a name such as 'cake.n.03', or null, got {synset!r}.")
    return Correction(synset, **{name: tuple(words) for name, words in lists.items()})


def write_vocabulary(path: str | Path, facts: dict[str, Any], words: Sequence[Sequence[WordOrigin]]) -> None:
    """Write a vocabulary file with one class per line, and the provenance of its words next to it."""
    head = {
        **facts,
        "synonyms_source": "WordNet 3.0 (Princeton University), chosen by the rules of train.synonyms",
    }
    classes = [
        {"name": origins[0].label, "synonyms": [origin.word for origin in origins[1:]]} | _without_names(entry)
        for entry, origins in zip(facts["classes"], words, strict=True)
    ]
    lines = [f" {_dump(key)}: {_dump(value)},\n" for key, value in head.items() if key != "classes"]
    rows = ",\n".join(f"  {_dump(entry)}" for entry in classes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f'{{\n{"".join(lines)} "classes": [\n{rows}\n ]\n}}\n')
    write_provenance(provenance_path(path), [origin for origins in words for origin in origins])


def summary(words: Sequence[Sequence[WordOrigin]]) -> str:
    """Return a readable summary of the number of words by origin, and of the classes without synonyms."""
    origins = Counter(origin.origin for row in words for origin in row[1:])
    without = [row[0].label for row in words if len(row) == 1]
    lengths = Counter(map(len, words))
    lines = [
        f"{len(words)} classes, {sum(map(len, words))} words: the labels, "
        + ", ".join(f"{count} {origin}" for origin, count in sorted(origins.items())),
        "words per class: " + ", ".join(f"{length}: {lengths[length]} classes" for length in sorted(lengths)),
    ]
    if without:
        lines.append(f"{len(without)} classes have only their label: {', '.join(without)}")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.synonyms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vocabulary", required=True, metavar="NAME|FILE", help="packaged name, or a .json, .csv or .txt file")
    add("--out", required=True, metavar="FILE.json", type=Path, help="vocabulary file to write")
    add(
        "--wordnet",
        metavar="DIR",
        help="WordNet folder (default: $GKC_WORDNET, NLTK's data or the Debian package wordnet-base)",
    )
    add("--overrides", metavar="FILE", help="JSON file of manual corrections, as described above")
    add("--labels-only", action="store_true", help="ignore the synonyms that the vocabulary already has")
    add(
        "--max-words",
        type=positive,
        default=MAX_WORDS,
        metavar="N",
        help="maximum number of words of a class, including its label (default: %(default)s)",
    )
    add(
        "--max-kinds",
        type=non_negative,
        default=MAX_KINDS,
        metavar="N",
        help="maximum number of words of a class from WordNet hyponyms (default: %(default)s)",
    )
    return parser.parse_args(arguments)


@interruptible("train.synonyms")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse(arguments)
    from .database import open_wordnet  # imports nltk, which --help must not need

    try:
        if options.out.suffix != ".json":
            raise ValueError(f"--out must end in .json, got {options.out}.")
        classes, facts = read_classes(options.vocabulary, options.labels_only)
        if options.overrides:
            corrections = read_corrections(options.overrides, [named.label for named in classes])
            classes = [replace(named, correction=corrections.get(named.label, Correction())) for named in classes]
        words = build_synonyms(classes, open_wordnet(options.wordnet), options.max_words, options.max_kinds)
        write_vocabulary(options.out, facts, words)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"python -m train.synonyms: {error_line(error) if isinstance(error, OSError) else error}\n")
        return 2
    sys.stdout.write(f"{options.out} and {provenance_path(options.out).name}\n{summary(words)}")
    return 0


def _owners(words: Sequence[Sequence[str]]) -> dict[str, set[int]]:
    owners: dict[str, set[int]] = {}
    for index, row in enumerate(words):
        for word in row:
            owners.setdefault(word_key(word), set()).add(index)
    return owners


def _text(lemma: Lemma) -> str:
    return lemma.name().replace("_", " ").lower()


def _topic(sense: Synset) -> str:
    return sense.lexname().removeprefix("noun.")


def _names(sense: Synset | None) -> tuple[str, str]:
    return (sense.name(), f"{sense.pos()}{sense.offset():08d}") if sense else ("", "")


def _without_names(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("name", "synonyms")}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
