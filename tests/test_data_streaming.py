"""Streamed data: shared by processes and workers without loss, in an order that can be repeated and resumed."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset, load_dataset

from train.data import JointTransform, SegmentationCollator, StreamingDataset, dataset_features, streaming_loader

from .test_data_broken import broken_dataset, truncated
from .training_toys import toy_dataset, toy_processor

TRANSFORM = JointTransform(crop_size=32)
ROWS = 44


@pytest.fixture(autouse=True)
def short_sleep(monkeypatch):
    """Shorten the 5 s that datasets waits for Arrow threads after reading Parquet to the end."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return toy_dataset(ROWS, size=32)


@pytest.fixture(scope="module")
def parquet(dataset, tmp_path_factory) -> dict[int, list[str]]:
    """Write the dataset to files, for several numbers of files."""
    folder = tmp_path_factory.mktemp("parquet")
    files = {}
    for number in (3, 4):
        files[number] = [str(folder / f"{number}-{part}.parquet") for part in range(number)]
        for part, path in enumerate(files[number]):
            dataset.shard(number, part, contiguous=True).to_parquet(path)
    return files


def source(kind: str, dataset: Dataset, parquet: dict[int, list[str]]) -> Dataset | IterableDataset:
    if kind == "arrow":
        return dataset
    return load_dataset("parquet", data_files=parquet[int(kind[-1])], split="train", streaming=True)


def loader_of(stream: StreamingDataset, workers: int, batch_size: int | None = None) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        stream, batch_size, num_workers=workers, collate_fn=lambda rows: rows, drop_last=batch_size is not None
    )


def ids_of_an_epoch(stream: StreamingDataset, workers: int, processes: int = 1, epoch: int = 0) -> list[list[str]]:
    """Return the image ids that each process reads, simulated one after the other."""
    stream.set_epoch(epoch)
    seen = []
    for process in range(processes):
        stream.share(process, processes, workers)
        seen.append([row["image_id"] for row in loader_of(stream, workers)])
    return seen


@pytest.mark.parametrize("kind", ["arrow", "parquet in 4", "parquet in 3"])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2), (3, 1)])
def test_every_row_comes_once_in_an_epoch(kind, processes, workers, dataset, parquet):
    stream = StreamingDataset(source(kind, dataset, parquet), TRANSFORM, seed=0, num_rows=ROWS, buffer_rows=8)
    orders = [ids_of_an_epoch(stream, workers, processes, epoch) for epoch in (0, 1)]
    for seen in orders:
        assert Counter(sum(seen[1:], seen[0])) == Counter(dataset["image_id"])
    assert orders[0] != orders[1]
    assert ids_of_an_epoch(stream, workers, processes, epoch=0) == orders[0]


def test_the_order_is_shuffled_by_seed_far_and_near(dataset, monkeypatch):
    monkeypatch.setattr("train.data.streaming._LEAST_ROWS_PER_SHARD", 3)
    orders = []
    for seed in (0, 1):
        stream = StreamingDataset(dataset, TRANSFORM, seed, buffer_rows=8)
        orders.append([int(name.removeprefix("toy-")) for name in ids_of_an_epoch(stream, 0)[0]])
    assert orders[0] != orders[1]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(ROWS))[0, 1]) < 0.5 and np.abs(np.diff(order)).mean() > 4
    plain = StreamingDataset(dataset, TRANSFORM, seed=0, buffer_rows=0)
    assert ids_of_an_epoch(plain, 0)[0] == dataset["image_id"]


def test_draws_depend_on_the_sample_and_not_on_who_reads_it(dataset):
    def draws(processes: int, workers: int) -> dict:
        stream = StreamingDataset(dataset, TRANSFORM, seed=0, buffer_rows=8)
        rows = {}
        for process in range(processes):
            stream.share(process, processes, workers)
            rows |= {row["image_id"]: (row["draw_seed"], row["image"].sum()) for row in loader_of(stream, workers)}
        return rows

    assert draws(1, 0) == draws(2, 2)
    assert len({seed for seed, _ in draws(1, 0).values()}) == ROWS


def test_every_process_gets_equally_many_full_batches(dataset, parquet):
    for kind in ("arrow", "parquet in 3", "parquet in 4"):
        stream = StreamingDataset(source(kind, dataset, parquet), TRANSFORM, seed=0, num_rows=ROWS, buffer_rows=8)
        seen = []
        for process in range(2):
            stream.share(process, 2, workers=2, batch_size=3)
            batches = list(loader_of(stream, 2, batch_size=3))
            assert len(batches) == len(loader_of(stream, 2, batch_size=3)) == 6, kind  # 44 // 4 streams // 3 * 2
            assert all(len(batch) == 3 for batch in batches)
            seen += [row["image_id"] for batch in batches for row in batch]
        assert len(set(seen)) == len(seen) == 36


def test_resumed_by_passing_over_batches_equals_undisturbed(dataset):
    def batches(skip: int, workers: int) -> list[tuple]:
        stream = StreamingDataset(dataset, TRANSFORM, seed=0, buffer_rows=8)
        collate = SegmentationCollator(toy_processor().image_processor, 3)
        loader = streaming_loader(stream, collate, 4, Accelerator(cpu=True), workers)
        loader.set_epoch(1)
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(1)
        return [(batch["image_ids"], batch["draw_seeds"], batch["pixel_values"]) for batch in loader]

    for workers in (0, 2):
        whole, rest = batches(0, workers), batches(3, workers)
        assert len(whole) == (10 if workers else 11) and len(rest) == len(whole) - 3
        for expected, batch in zip(whole[3:], rest, strict=True):
            assert expected[:2] == batch[:2] and torch.equal(expected[2], batch[2])


def test_broken_samples_are_left_out_and_the_length_kept(caplog):
    broken = broken_dataset(12, {4: truncated, 9: truncated})
    stream = StreamingDataset(broken, TRANSFORM, seed=0, max_broken=2, buffer_rows=4)
    with caplog.at_level(logging.WARNING):
        rows = ids_of_an_epoch(stream, 0)[0]
    assert sorted(rows) == sorted(f"toy-{index}" for index in range(12) if index not in (4, 9))
    assert stream.broken_count() == 2 and len(caplog.records) == 2
    stream.share(0, 1, workers=0, batch_size=6)
    assert len([row for row in stream]) == len(stream) == 12
    stream = StreamingDataset(broken, TRANSFORM, seed=0, max_broken=1, buffer_rows=4)
    with pytest.raises(RuntimeError, match=r"2 samples cannot be read.*\n.*'toy-(4|9)'"):
        ids_of_an_epoch(stream, 0)


def test_a_stream_without_a_readable_sample_ends():
    stream = StreamingDataset(broken_dataset(2, {0: truncated, 1: truncated}), TRANSFORM, seed=0, max_broken=9)
    stream.share(0, 1, batch_size=1)
    with pytest.raises(RuntimeError, match="no sample that can be read"):
        next(iter(stream))


def test_too_few_images_and_an_unknown_length_are_refused(dataset):
    stream = StreamingDataset(dataset, TRANSFORM, seed=0)
    with pytest.raises(ValueError, match="44 images, too few for a batch of 12 in each of 4 streams"):
        stream.share(0, 2, workers=2, batch_size=12)
    unknown = IterableDataset.from_generator(lambda: iter(dataset), features=dataset_features())
    with pytest.raises(ValueError, match="set `num_rows`"):
        StreamingDataset(unknown, TRANSFORM, seed=0)
    with pytest.raises(ValueError, match="called with 1 workers, but the loader has 2"):
        list(loader_of(StreamingDataset(dataset, TRANSFORM, seed=0), 2))


def run_process(rank: int, folder: str) -> None:
    """One of two training processes: the image ids of three epochs, as accelerate's loader gives them."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what earlier tests left in this copy of their process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=(Path(folder) / "rendezvous").as_uri(), rank=rank, world_size=2
    )
    stream = StreamingDataset(Dataset.load_from_disk(f"{folder}/data"), TRANSFORM, seed=0, buffer_rows=8)
    collate = SegmentationCollator(toy_processor().image_processor, 3)
    loader = streaming_loader(stream, collate, 1, Accelerator(cpu=True), num_workers=2)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append([image_id for batch in loader for image_id in batch["image_ids"]])
    (Path(folder) / f"{rank}.json").write_text(json.dumps(epochs))
    torch.distributed.destroy_process_group()


def test_two_processes_with_two_workers_share_the_data(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "data")
    torch.multiprocessing.start_processes(run_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for epoch in range(3):
        assert len(first[epoch]) == len(second[epoch]) == ROWS // 2
        assert Counter(first[epoch] + second[epoch]) == Counter(dataset["image_id"])
    assert first[0] != first[1] != first[2]
