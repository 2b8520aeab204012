"""Samples that cannot be read are passed over, counted and named, up to a limit."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset

from train.data import AugmentedDataset, JointTransform, SegmentationCollator, check_dataset, dataset_features

from .training_toys import VOCABULARY, toy_dataset, toy_processor, toy_row

TRANSFORM = JointTransform(crop_size=48)


def stored_rows(count: int) -> list[dict]:
    """Rows with their pictures as files hold them."""
    dataset = toy_dataset(count)
    return [{**toy_row(index), **row} for index, row in enumerate(dataset.with_format("arrow")[:].to_pylist())]


def truncated(row: dict) -> dict:
    return {**row, "image": {"bytes": row["image"]["bytes"][:200], "path": None}}


def missing(row: dict) -> dict:
    return {**row, "image": {"bytes": None, "path": "/nowhere/picture.png"}}


def no_picture(row: dict) -> dict:
    return {**row, "segmentation": {"bytes": b"no picture", "path": None}}


def other_size(row: dict) -> dict:
    return {**row, "segmentation": stored_row_of_size(32)["segmentation"]}


def unknown_id(row: dict) -> dict:
    return {**row, "segments": row["segments"][1:]}


def stored_row_of_size(size: int) -> dict:
    return toy_dataset(1, size=size).with_format("arrow")[:].to_pylist()[0]


def broken_dataset(count: int, breaks: dict) -> Dataset:
    rows = [breaks.get(index, dict)(row) for index, row in enumerate(stored_rows(count))]
    return Dataset.from_list(rows, features=dataset_features())


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (truncated, "cannot be read as an image"),
        (missing, "No such file"),
        (no_picture, "cannot be read as an image"),
        (other_size, r"The segmentation is \(32, 32\)"),
        (unknown_id, r"Ids \[7\] of the segmentation are not in its segments"),
    ],
)
def test_a_broken_sample_is_replaced_by_the_next_and_named(breaking, reason, caplog):
    dataset = AugmentedDataset(broken_dataset(4, {1: breaking}), TRANSFORM, seed=0, max_broken=1)
    good = AugmentedDataset(toy_dataset(4), TRANSFORM, seed=0)
    with caplog.at_level(logging.WARNING):
        rows = [dataset[index] for index in range(4)]
    assert [row["image_id"] for row in rows] == ["toy-0", "toy-2", "toy-2", "toy-3"]
    assert [row["draw_seed"] for row in rows] == [good[index]["draw_seed"] for index in range(4)]
    assert not np.array_equal(rows[1]["image"], rows[2]["image"])
    assert dataset.broken_count() == 1
    assert len(caplog.records) == 1
    caplog.records[0].getMessage().index("'toy-1'")
    with pytest.raises(ValueError, match=rf"sample 'toy-1': .*{reason}"):
        check_dataset(dataset.dataset, VOCABULARY.labels, progress=False)


def test_the_last_sample_is_replaced_by_the_first():
    dataset = AugmentedDataset(broken_dataset(3, {2: truncated}), TRANSFORM, seed=0, max_broken=1)
    assert dataset[2]["image_id"] == "toy-0"


def test_a_sample_counts_once_however_often_it_is_met():
    dataset = AugmentedDataset(broken_dataset(3, {0: truncated}), TRANSFORM, seed=0, max_broken=1)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        assert dataset[0]["image_id"] == "toy-1"
    assert dataset.broken_count() == 1


def test_one_too_many_stops_and_the_last_ones_are_named():
    breaks = {index: missing for index in (1, 3, 5)}
    dataset = AugmentedDataset(broken_dataset(6, breaks), TRANSFORM, seed=0, max_broken=2)
    assert [dataset[index]["image_id"] for index in range(5)] == ["toy-0", "toy-2", "toy-2", "toy-4", "toy-4"]
    with pytest.raises(RuntimeError, match=r"(?s)3 samples .* `max_broken_samples` = 2.*'toy-1'.*'toy-3'.*'toy-5'"):
        dataset[5]
    with pytest.raises(RuntimeError, match="3 samples"):
        dataset[1]


def test_none_is_passed_over_without_a_limit_of_some():
    dataset = AugmentedDataset(broken_dataset(3, {1: truncated}), TRANSFORM, seed=0)
    with pytest.raises(RuntimeError, match=r"(?s)1 samples .* `max_broken_samples` = 0.*'toy-1'"):
        dataset[1]


def test_nothing_but_broken_samples_ends():
    dataset = AugmentedDataset(broken_dataset(2, {0: truncated, 1: truncated}), TRANSFORM, seed=0, max_broken=9)
    with pytest.raises(RuntimeError, match="No sample of the dataset can be read"):
        dataset[0]


def loader_of(dataset: AugmentedDataset, **settings) -> torch.utils.data.DataLoader:
    collate = SegmentationCollator(toy_processor().image_processor, 3)
    return torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collate, **settings)


def test_broken_samples_are_counted_over_all_workers():
    breaks = {index: truncated for index in (0, 2, 5, 7)}
    dataset = AugmentedDataset(broken_dataset(12, breaks), TRANSFORM, seed=0, max_broken=4)
    for _ in range(2):
        batches = list(loader_of(dataset))
        assert [batch["pixel_values"].shape[0] for batch in batches] == [2] * 6
    assert dataset.broken_count() == 4
    named = " ".join(dataset.broken.messages())
    assert all(f"'toy-{index}'" in named for index in breaks)


def test_one_too_many_over_all_workers_stops():
    breaks = {index: truncated for index in (0, 2, 5, 7)}  # two in the batches of each worker
    dataset = AugmentedDataset(broken_dataset(12, breaks), TRANSFORM, seed=0, max_broken=2)
    with pytest.raises(RuntimeError, match="more than `max_broken_samples` = 2"):
        list(loader_of(dataset))
