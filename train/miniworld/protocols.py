"""Evaluation vocabularies of the mini-world, with the ground-truth class of every region."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data.drawn_world.words import (
    COARSE,
    COARSE_SHAPES,
    COARSE_STUFFS,
    COLORS,
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
    """Evaluation vocabulary with the ground truth of regions.

    Attributes:
        name: Name of the protocol.
        prompts: Prompts of each of the K classes, one or more per class.
        class_of: Function that maps the attributes of a region to its class, or to -1 if the region is ignored.
        groups: Names of scores, with the classes that each score averages.
    """

    name: str
    prompts: tuple[tuple[str, ...], ...]
    class_of: Callable[[Attributes], int]
    groups: dict[str, tuple[int, ...]]


def seen(name: str = "seen", word: int = 0) -> Protocol:
    """Return the protocol of the training labels, prompted with word `word` (4 and 5 are held out of training)."""
    prompts = tuple((WORDS[concept][word],) for concept in COARSE)
    return _protocol(name, COARSE, prompts, lambda attributes: coarse_label(attributes["concept"]))


def finer(attribute: str, values: Sequence[str]) -> Protocol:
    """Return the protocol of attribute and shape pairs, such as `red round`, and the training labels of stuff."""
    pairs = [(value, shape) for shape in COARSE_SHAPES for value in values]

    def key(attributes: Attributes):
        label = coarse_label(attributes["concept"])
        return (attributes[attribute], label) if attributes["kind"] == "shape" else label

    prompts = tuple((f"{value} {shape}",) for value, shape in pairs) + tuple((stuff,) for stuff in COARSE_STUFFS)
    return _protocol(attribute, [*pairs, *COARSE_STUFFS], prompts, key, {attribute: range(len(pairs))})


def concepts(name: str, chosen: Sequence[str], groups: dict[str, Sequence[str]] | None = None) -> Protocol:
    """Return the protocol of chosen concepts, prompted with their own names; `groups` lists names of concepts."""
    numbered = {
        group: [chosen.index(concept) for concept in members] for group, members in (groups or {name: chosen}).items()
    }
    prompts = tuple((concept,) for concept in chosen)
    return _protocol(name, chosen, prompts, lambda attributes: attributes["concept"], numbered)


def all_protocols() -> list[Protocol]:
    """Return all evaluation protocols of the mini-world.

    The protocol `all` has every concept as a class. Its group `seen` contains the concepts that are labeled with their
    own name in training, and `novel` all others.
    """
    novel = SUB + VOID + NEVER_SEEN
    joined = {"all/seen": KEPT, "all/novel": novel, "all/sub": SUB, "all/void": VOID, "all/never": NEVER_SEEN}
    return [
        seen(),
        seen("seen by 5th word", word=4),
        seen("seen by 6th word", word=5),
        finer("colour", COLORS),
        finer("fill", FILLS),
        concepts("sub", SUB),
        concepts("void", VOID),
        concepts("never", NEVER_SEEN),
        concepts("all", CONCEPTS, joined),
    ]


def _protocol(name, keys, prompts, key_of, groups=None) -> Protocol:
    """Create a protocol where the class of a region is the position of its key in `keys`."""
    positions = {key: position for position, key in enumerate(keys)}
    groups = groups or {name: range(len(keys))}
    return Protocol(
        name,
        prompts,
        lambda attributes: positions.get(key_of(attributes), IGNORED),
        {group: tuple(classes) for group, classes in groups.items()},
    )
