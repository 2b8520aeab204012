"""Scores of groups of classes, such as base and novel or seen and unseen classes."""

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
    """Named groups of classes.

    Attributes:
        members: Class indices of each group by its name.
        opposites: Pairs of groups whose harmonic mean is reported.
    """

    members: Mapping[str, Sequence[int]]
    opposites: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ClassFacts:
    """Annotation ids and held-out classes of a benchmark.

    Attributes:
        raw_ids: Id of each class in the annotation files of the benchmark; its index if unknown.
        novel: Indices of the classes that zero-shot experiments hold out from training.
    """

    raw_ids: list[int]
    novel: list[int]


def class_facts(benchmark: Benchmark, num_classes: int) -> ClassFacts:
    """Look up the annotation ids and held-out classes in the packaged vocabulary of a benchmark, if it has one."""
    if benchmark.vocabulary not in Vocabulary.packaged_names():
        return ClassFacts(list(range(num_classes)), [])
    stored = packaged_facts(benchmark.vocabulary)
    raw_ids = [entry["id"] for entry in stored["classes"]]
    if benchmark.subset is not None:
        raw_ids = [raw_ids[index] for index in benchmark.subset]
    if len(raw_ids) != num_classes:  # the vocabulary of the prepared data was edited
        return ClassFacts(list(range(num_classes)), [])
    held_out = set(stored.get("novel_ids") or [])
    return ClassFacts(raw_ids, [index for index, raw_id in enumerate(raw_ids) if raw_id in held_out])


def class_groups(
    vocabulary: Vocabulary, facts: ClassFacts, extra: Mapping[str, Sequence[str]], trained_on: Vocabulary | None
) -> ClassGroups:
    """Group the classes of a benchmark.

    Args:
        vocabulary: Classes of the benchmark.
        facts: Held-out classes of the benchmark.
        extra: Further groups, given by class names.
        trained_on: Classes of the training data. Benchmark classes that share a name with one of them are `seen`, the
            others `unseen`; None defines neither group.
    """
    everything = range(len(vocabulary))
    members: dict[str, list[int]] = {}
    if facts.novel and len(facts.novel) < len(vocabulary):
        members["base"] = [index for index in everything if index not in set(facts.novel)]
        members["novel"] = list(facts.novel)
    position = {label: index for index, label in enumerate(vocabulary.labels)}
    members |= {name: [position[label] for label in labels if label in position] for name, labels in extra.items()}
    if trained_on is not None:
        known = {_normalize_name(name) for name in trained_on.flat_names}
        seen = [
            index for index in everything if any(_normalize_name(name) in known for name in vocabulary.names[index])
        ]
        members["seen"] = seen
        members["unseen"] = [index for index in everything if index not in set(seen)]
    return ClassGroups({name: group for name, group in members.items() if group}, OPPOSITES)


def group_scores(groups: ClassGroups, computed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Average the scores of the classes of each group, and compute harmonic means of opposite groups.

    Args:
        groups: Groups of classes.
        computed: Lists of per-class scores by task and name.

    Returns:
        For each group, `classes` (their number) and the scores by task and name; for each pair of opposites, an entry
        `harmonic mean of A and B` with the scores by task and name.
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


def _normalize_name(name: str) -> str:
    return " ".join(name.casefold().split())
