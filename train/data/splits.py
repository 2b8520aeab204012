"""Base and novel class splits, as in zero-shot experiments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import packaged_facts

from .schema import NO_CLASS

if TYPE_CHECKING:
    from datasets import Dataset

VARIANTS = ("ignore", "delete")


def novel_positions(vocabulary_name: str) -> list[int]:
    """Return the positions of the held-out classes of the zero-shot experiments in a packaged vocabulary.

    Raises:
        ValueError: If the vocabulary does not exist or marks no class as novel.
    """
    facts = packaged_facts(vocabulary_name)
    if not facts.get("novel_ids"):
        raise ValueError(
            f"The vocabulary {vocabulary_name!r} marks no class as novel: set the recipe's `category_split` to 'all', "
            "or use coco_panoptic_133 or vipseg_124."
        )
    novel = set(facts["novel_ids"])
    return [position for position, entry in enumerate(facts["classes"]) if entry["id"] in novel]


def split_categories(
    dataset: Dataset, vocabulary: Vocabulary, novel: str | Collection[int], variant: str, keep: str = "base"
) -> tuple[Dataset, Vocabulary]:
    """Restrict a dataset and its vocabulary to the base or the novel classes.

    The kept classes are renumbered in order. Segments of other classes become void, with the class -1. Images and
    segmentations do not change.

    Args:
        dataset: Dataset in the schema of `train.data.schema`.
        vocabulary: Vocabulary of the dataset.
        novel: Positions of the novel classes, or the name of the packaged vocabulary that defines them.
        variant: `ignore` keeps the images with a segment of the kept classes; `delete` drops those of them that have a
            segment of another class, too. Crowds count as segments.
        keep: Classes to keep, `base` or `novel`.

    Returns:
        The restricted dataset and vocabulary.

    Raises:
        ValueError: If the variant is unknown, or no class or no image is left.
    """
    if variant not in VARIANTS or keep not in ("base", "novel"):
        raise ValueError(
            f"`variant` must be one of {', '.join(VARIANTS)} and `keep` base or novel, got {variant!r} and {keep!r}."
        )
    positions = set(novel_positions(novel) if isinstance(novel, str) else novel)
    kept = [index for index in range(len(vocabulary.names)) if (index in positions) == (keep == "novel")]
    if not 0 < len(kept) < len(vocabulary.names) or not positions <= set(range(len(vocabulary.names))):
        raise ValueError(f"Novel classes must be some of the {len(vocabulary.names)}, got {sorted(positions)}.")
    new_ids = {old: new for new, old in enumerate(kept)}
    all_segments = dataset.select_columns("segments")["segments"]
    rows = []
    for index, segments in enumerate(all_segments):
        classes = {segment["category_id"] for segment in segments} - {NO_CLASS}
        if classes & new_ids.keys() and (variant != "delete" or not classes - new_ids.keys()):
            rows.append(index)
    if not rows:
        raise ValueError(f"No image of the dataset has segments of the {keep} classes as `{variant}` needs them.")
    renumbered = [
        [{**segment, "category_id": new_ids.get(segment["category_id"], NO_CLASS)} for segment in segments]
        for segments in all_segments
    ]
    feature = dataset.features["segments"]
    # Replacing a column does not rewrite the images, unlike `map`.
    subset = dataset.remove_columns("segments").add_column("segments", renumbered, feature=feature).select(rows)
    return subset, vocabulary_subset(vocabulary, kept)


def vocabulary_subset(vocabulary: Vocabulary, kept: Sequence[int]) -> Vocabulary:
    """Return the classes of a vocabulary at the given positions, in their order."""
    columns = vocabulary.names, vocabulary.is_thing, vocabulary.colors, vocabulary.templates
    return Vocabulary.from_stored(
        *(None if column is None else [column[index] for index in kept] for column in columns)
    )
