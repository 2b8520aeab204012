"""Base and novel classes, against a slow reference and the published lists."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import packaged_facts
from train.data import (
    AugmentedDataset,
    JointTransform,
    check_dataset,
    encode_ids,
    novel_positions,
    read_row,
    split_categories,
)

from .training_toys import VOCABULARY, toy_dataset

NO_CHANGE = JointTransform(crop_size=None, flip_probability=0.0)
CLASSES = [{0, 1, 2}, {0, 2}, {0, 2}, {2}, {1}]  # of each picture; in the third the disc (0) is a crowd


def with_classes(index: int, row: dict) -> dict:
    segments = [s for s in row["segments"] if s["category_id"] in CLASSES[index]]
    _, ids = read_row(row)
    ids = np.where(np.isin(ids, [segment["id"] for segment in segments]), ids, 0)
    segments = [{**s, "iscrowd": index == 2 and s["category_id"] == 0} for s in segments]
    return {**row, "segments": segments, "segmentation": Image.fromarray(encode_ids(ids))}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return toy_dataset(len(CLASSES), change=with_classes)


def reference(dataset: Dataset, kept: list[int], variant: str) -> dict[str, np.ndarray]:
    """For each image that stays the new class of every pixel, -1 for void."""
    maps = {}
    for row in dataset:
        _, ids = read_row(row)
        has_kept = has_other = False
        classes = np.full(ids.shape, -1)
        for segment in row["segments"]:
            if segment["category_id"] in kept:
                has_kept = True
                if not segment["iscrowd"]:
                    classes[ids == segment["id"]] = kept.index(segment["category_id"])
            else:
                has_other = True
        if has_kept and not (variant == "delete" and has_other):
            maps[row["image_id"]] = classes
    return maps


@pytest.mark.parametrize("novel", [{0}, {1}, {0, 2}])
@pytest.mark.parametrize("variant", ["ignore", "delete"])
@pytest.mark.parametrize("keep", ["base", "novel"])
def test_splits_are_those_of_a_slow_reference(novel, variant, keep, dataset):
    kept = [index for index in range(3) if (index in novel) == (keep == "novel")]
    expected = reference(dataset, kept, variant)
    if not expected:
        with pytest.raises(ValueError, match="No image of the dataset"):
            split_categories(dataset, VOCABULARY, novel, variant, keep)
        return
    subset, vocabulary = split_categories(dataset, VOCABULARY, novel, variant, keep)
    assert vocabulary.names == [VOCABULARY.names[index] for index in kept]
    assert subset["image_id"] == list(expected)
    assert subset.features["segments"] == dataset.features["segments"]
    check_dataset(subset, vocabulary.labels, progress=False)
    augmented = AugmentedDataset(subset, NO_CHANGE, seed=0)
    for row, classes in zip((augmented[index] for index in range(len(subset))), expected.values(), strict=True):
        found = np.full(row["ids"].shape, -1)
        for segment in row["segments"]:
            found[row["ids"] == segment["id"]] = segment["category_id"]
        assert np.array_equal(found, classes) and np.array_equal(row["ids"] == 0, classes == -1)


def test_an_image_without_the_kept_classes_goes(dataset):
    assert split_categories(dataset, VOCABULARY, {1}, "ignore")[0]["image_id"] == ["toy-0", "toy-1", "toy-2", "toy-3"]
    assert split_categories(dataset, VOCABULARY, {1}, "delete")[0]["image_id"] == ["toy-1", "toy-2", "toy-3"]


def test_the_published_split_of_coco():
    novel = novel_positions("coco_panoptic_133")
    facts = packaged_facts("coco_panoptic_133")
    assert len(novel) == len(facts["novel_ids"]) == 18
    assert {facts["classes"][position]["id"] for position in novel} == set(facts["novel_ids"])
    vocabulary = Vocabulary.named("coco_panoptic_133")
    dataset = toy_dataset(1, change=lambda index, row: {**row, "segments": coco_segments(row, novel[0])})
    base_set, base = split_categories(dataset, vocabulary, "coco_panoptic_133", "ignore")
    novel_set, held_out = split_categories(dataset, vocabulary, "coco_panoptic_133", "ignore", keep="novel")
    assert (len(base), len(held_out)) == (115, 18) and not set(base.labels) & set(held_out.labels)
    assert base.labels == [label for index, label in enumerate(vocabulary.labels) if index not in novel]
    assert base.is_thing[:1] == vocabulary.is_thing[:1] and len(base.is_thing) == 115
    assert [s["category_id"] for s in base_set[0]["segments"]] == [0, 114, -1]
    assert [s["category_id"] for s in novel_set[0]["segments"]] == [-1, -1, 0]


def coco_segments(row: dict, novel: int) -> list[dict]:
    return [{**s, "category_id": category} for s, category in zip(row["segments"], (0, 132, novel), strict=True)]


def test_invalid_splits_raise(dataset):
    with pytest.raises(ValueError, match="marks no class as novel"):
        novel_positions("ade20k_150")
    with pytest.raises(ValueError, match=r"got \[7\]"):
        split_categories(dataset, VOCABULARY, {7}, "ignore")
    with pytest.raises(ValueError, match="Novel classes must be some"):
        split_categories(dataset, VOCABULARY, {0, 1, 2}, "ignore")
    with pytest.raises(ValueError, match="'drop'"):
        split_categories(dataset, VOCABULARY, {0}, "drop")
    with pytest.raises(ValueError, match="No image of the dataset"):
        split_categories(dataset.select([0]), VOCABULARY, {0}, "delete")
