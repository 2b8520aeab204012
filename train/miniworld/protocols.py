"""The vocabularies of evaluation: which words are asked, and which region is right for which of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data.drawn_world.words import (
    COARSE,
    COARSE_SHAPES,
    COARSE_STUFFS,
    COLOURS,
    CONCEPTS,
    FILLS,
    KEPT,
    NEVER_SEEN,
    SUB,
    VOID,
    WORDS,
    Attributes,
    coarse_label,
)

IGNORED = -1


@dataclass(frozen=True)
class Protocol:
    """One vocabulary.

    Attributes:
        prompts: for every class the words that ask for it (K classes, one or more prompts each).
        class_of: attributes of a region -> its class, or -1 if the protocol leaves the region out.
        groups: name of a score -> the classes it is the mean of.
    """

    name: str
    prompts: tuple[tuple[str, ...], ...]
    class_of: Callable[[Attributes], int]
    groups: dict[str, tuple[int, ...]]


def seen(name: str = "seen", word: int = 0) -> Protocol:
    """The labels of training, asked by their word number `word` (4 and 5 were held out of training)."""
    prompts = tuple((WORDS[concept][word],) for concept in COARSE)
    return _protocol(name, COARSE, prompts, lambda attributes: coarse_label(attributes["concept"]))


def finer(attribute: str, values: Sequence[str]) -> Protocol:
    """Every pair of an attribute's value and a training label, such as `red round`; the stuffs of training beside."""
    pairs = [(value, shape) for shape in COARSE_SHAPES for value in values]

    def key(attributes: Attributes):
        label = coarse_label(attributes["concept"])
        return (attributes[attribute], label) if attributes["kind"] == "shape" else label

    prompts = tuple((f"{value} {shape}",) for value, shape in pairs) + tuple((stuff,) for stuff in COARSE_STUFFS)
    return _protocol(attribute, [*pairs, *COARSE_STUFFS], prompts, key, {attribute: range(len(pairs))})


def concepts(name: str, chosen: Sequence[str], groups: dict[str, Sequence[str]] | None = None) -> Protocol:
    """Some concepts under their own names; `groups` as names of concepts."""
    numbered = {
        group: [chosen.index(concept) for concept in members] for group, members in (groups or {name: chosen}).items()
    }
    prompts = tuple((concept,) for concept in chosen)
    return _protocol(name, chosen, prompts, lambda attributes: attributes["concept"], numbered)


def all_protocols() -> list[Protocol]:
    """Every vocabulary that the mini-world is measured on; `all` asks for every concept at once.

    In `all`, `seen` are the concepts that training labels by their own name, `novel` all others.
    """
    novel = SUB + VOID + NEVER_SEEN
    joined = {"all/seen": KEPT, "all/novel": novel, "all/sub": SUB, "all/void": VOID, "all/never": NEVER_SEEN}
    return [
        seen(),
        seen("seen by 5th word", word=4),
        seen("seen by 6th word", word=5),
        finer("colour", COLOURS),
        finer("fill", FILLS),
        concepts("sub", SUB),
        concepts("void", VOID),
        concepts("never", NEVER_SEEN),
        concepts("all", CONCEPTS, joined),
    ]


def _protocol(name, keys, prompts, key_of, groups=None) -> Protocol:
    """Protocol whose class is the position of the region's key among `keys`."""
    positions = {key: position for position, key in enumerate(keys)}
    groups = groups or {name: range(len(keys))}
    return Protocol(
        name,
        prompts,
        lambda attributes: positions.get(key_of(attributes), IGNORED),
        {group: tuple(classes) for group, classes in groups.items()},
    )
