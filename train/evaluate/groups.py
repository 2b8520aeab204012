"""Groups of classes that have scores of their own: base and novel, seen and unseen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import packaged_facts

from ..data.benchmarks.base import Benchmark
from ..metrics.base import harmonic_mean, mean
from ..metrics.score import all_scores

OPPOSITES = (("base", "novel"), ("seen", "unseen"))


@dataclass(frozen=True)
class ClassGroups:
    """
    Named groups of classes.

    Attributes:
        members: name -> classes.
        opposites: pairs of groups whose harmonic mean is told.
    """

    members: Mapping[str, Sequence[int]]
    opposites: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ClassFacts:
    """
    What is known of a benchmark's classes beside their names.

    Attributes:
        raw_ids: the id of each in the benchmark's annotation files; positions where none is known.
        novel: classes that zero-shot experiments hold out.
    """

    raw_ids: list[int]
    novel: list[int]


def class_facts(benchmark: Benchmark, num_classes: int) -> ClassFacts:
    """Facts of the packaged vocabulary that a benchmark's classes come from; of others, positions and no more."""
    if benchmark.vocabulary not in Vocabulary.packaged_names():
        return ClassFacts(list(range(num_classes)), [])
    stored = packaged_facts(benchmark.vocabulary)
    raw_ids = [entry["id"] for entry in stored["classes"]]
    if benchmark.subset is not None:
        raw_ids = [raw_ids[index] for index in benchmark.subset]
    if len(raw_ids) != num_classes:  # a folder whose vocabulary was edited by hand
        return ClassFacts(list(range(num_classes)), [])
    held_out = set(stored.get("novel_ids") or [])
    return ClassFacts(raw_ids, [index for index, raw_id in enumerate(raw_ids) if raw_id in held_out])


def class_groups(
    vocabulary: Vocabulary, facts: ClassFacts, extra: Mapping[str, Sequence[str]], trained_on: Vocabulary | None
) -> ClassGroups:
    """
    The groups of a benchmark.

    Args:
        vocabulary: its classes.
        facts: of its file.
        extra: further groups by the names of their classes; `base` and `novel` among them are opposites.
        trained_on: classes of the training data; those that share a name with one of them are `seen`, the others
            `unseen`.
    """
    everything = range(len(vocabulary))
    members: dict[str, list[int]] = {}
    if facts.novel and len(facts.novel) < len(vocabulary):
        members["base"] = [index for index in everything if index not in set(facts.novel)]
        members["novel"] = list(facts.novel)
    position = {label: index for index, label in enumerate(vocabulary.labels)}
    members |= {name: [position[label] for label in labels if label in position] for name, labels in extra.items()}
    if trained_on is not None:
        known = {_key(name) for name in trained_on.flat_names}
        seen = [index for index in everything if any(_key(name) in known for name in vocabulary.names[index])]
        members["seen"] = seen
        members["unseen"] = [index for index in everything if index not in set(seen)]
    return ClassGroups({name: group for name, group in members.items() if group}, OPPOSITES)


def group_scores(groups: ClassGroups, computed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    Scores of every group, and harmonic means.

    Args:
        groups: the groups.
        computed: task -> what its metric computed, lists per class among it.

    Returns:
        Group -> `classes` (their number) and task -> score; and `harmonic_mean of A and B` -> task -> score.
    """
    known = [score for score in all_scores().values() if score.class_means and score.name in computed]
    class_means = {score.name: score.class_means for score in known}
    scores: dict[str, Any] = {}
    for group, members in groups.members.items():
        scores[group] = {"classes": len(members)} | {
            task: {name: mean(computed[task][column][index] for index in members) for name, column in means.items()}
            for task, means in class_means.items()
        }
    for first, second in groups.opposites:
        if first in scores and second in scores:
            scores[f"harmonic mean of {first} and {second}"] = {
                task: {name: harmonic_mean(scores[first][task][name], scores[second][task][name]) for name in means}
                for task, means in class_means.items()
            }
    return scores


def _key(name: str) -> str:
    return " ".join(name.casefold().split())
