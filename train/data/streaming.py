"""Streaming of training data without random access, from Arrow or Parquet files on disk or on the Hub.

A *stream* is the data that one of W worker processes of one of P training processes reads. Each stream reads its own
shards (files or record batches) if the number of shards is a multiple of P x W. Otherwise each stream reads all rows
and keeps every (P x W)-th row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from .samples import BrokenSamples, augmented_row, stable_number
from .schema import without_decoding
from .transforms import JointTransform

BUFFER_ROWS = 256
_MOST_SHARDS_PER_STREAM = 16
_LEAST_ROWS_PER_SHARD = 64
_ROWS_AT_ONCE = 16


class StreamingDataset(torch.utils.data.IterableDataset):
    """Iterable dataset of augmented samples, shuffled by shards and within a buffer.

    Every row occurs once per epoch over all streams. The rows are those of `augmented_row`; their random numbers
    depend on (seed, epoch, image id) alone, not on the division into streams.

    In training, `streaming_loader` limits all streams to the same number of full batches, so that all processes take
    the same number of steps. The remaining rows are skipped in this epoch: at most one batch, plus the difference
    between shards of unequal length. A stream with too few readable samples continues with the order of the next
    epoch.

    Args:
        dataset: Dataset in the schema of `train.data.schema`. A map-style dataset is read in contiguous shards.
        transform: Augmentation.
        seed: Random seed.
        max_broken: Maximum number of unreadable samples to skip; see `BrokenSamples`.
        num_rows: Length of `dataset`, if the dataset does not provide it.
        buffer_rows: Number of undecoded rows in the shuffle buffer of each stream. 0 does not shuffle.

    Raises:
        ValueError: If the number of rows is unknown.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        transform: JointTransform,
        seed: int,
        max_broken: int = 0,
        num_rows: int | None = None,
        buffer_rows: int = BUFFER_ROWS,
    ):
        self.transform = transform
        self.seed = seed
        self.buffer_rows = buffer_rows
        self.broken = BrokenSamples(max_broken)
        self.num_rows = num_rows or _number_of_rows(dataset)
        self._dataset = without_decoding(dataset)
        # In shared memory, since workers persist across epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._process, self._processes, self._workers = 0, 1, 1
        self._rows_per_stream = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the order and the random augmentations depend on."""
        self._epoch.fill_(epoch)

    def broken_count(self) -> int:
        """Return the number of distinct unreadable samples over all workers."""
        return self.broken.count()

    def share(self, process: int, processes: int, workers: int = 0, batch_size: int | None = None) -> None:
        """Set the part of the data that this training process reads.

        Args:
            process: Rank of this training process.
            processes: Number of training processes.
            workers: Number of worker processes of each training process, as for `DataLoader`.
            batch_size: Batch size, which limits all streams to the same number of full batches. None yields every row.

        Raises:
            ValueError: If a stream has fewer rows than a batch.
        """
        self._process, self._processes, self._workers = process, processes, max(1, workers)
        self._rows_per_stream = None
        if batch_size is not None:
            # The shards' lengths differ by at most one row.
            shards = self._num_shards()
            divides = shards % self._streams == 0
            least = self.num_rows // shards * (shards // self._streams) if divides else self.num_rows // self._streams
            self._rows_per_stream = least // batch_size * batch_size
            if self._rows_per_stream == 0:
                raise ValueError(
                    f"The dataset has {self.num_rows} images, too few for a batch of {batch_size} in each of "
                    f"{self._streams} streams (processes times workers): make the recipe's `batch_size` or "
                    "`num_workers` smaller."
                )

    def __len__(self) -> int:
        """Rows of an epoch in this process; nearly so, without the `batch_size` of `share`."""
        if self._rows_per_stream is None:
            return self.num_rows // self._processes
        return self._rows_per_stream * self._workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers != self._workers:
            raise ValueError(
                f"`share` was called with {self._workers} workers, but the loader has {worker.num_workers}: pass the "
                "same number."
            )
        stream = self._process * self._workers + (0 if worker is None else worker.id)
        epoch = int(self._epoch)
        if self._rows_per_stream is None:
            return self._read(stream, epoch)
        return islice(self._read_on(stream, epoch), self._rows_per_stream)

    @property
    def _streams(self) -> int:
        return self._processes * self._workers

    def _read_on(self, stream: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of one stream over consecutive epochs."""
        while True:
            row = None
            for row in self._read(stream, epoch):
                yield row
            if row is None:
                raise RuntimeError(f"Stream {stream} has no sample that can be read. {self.broken.messages()}")
            epoch += 1

    def _read(self, stream: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the readable rows of one stream and epoch."""
        for row in self._stored_rows(stream, epoch):
            key = (self.seed, epoch, stable_number(row["image_id"]))
            try:
                yield augmented_row(row, self.transform, key)
            except ValueError as error:
                self.broken.add(row["image_id"], error)

    def _stored_rows(self, stream: int, epoch: int) -> Iterator[Mapping[str, Any]]:
        dataset = self._dataset
        if not isinstance(dataset, IterableDataset):
            dataset = dataset.to_iterable_dataset(num_shards=self._num_shards())
        if self.buffer_rows:
            order = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
            dataset = dataset.shuffle(seed=order, buffer_size=self.buffer_rows)
        # `__iter__` would divide the part again among the worker processes; `iter` does not.
        for rows in split_dataset_by_node(dataset, stream, self._streams).iter(_ROWS_AT_ONCE):
            for values in zip(*rows.values(), strict=True):
                yield dict(zip(rows, values, strict=True))

    def _num_shards(self) -> int:
        if isinstance(self._dataset, IterableDataset):
            return self._dataset.num_shards
        # More shards shuffle better, but each shard with a surplus row costs a row in training.
        rows = len(self._dataset) // self._streams
        return self._streams * max(1, min(_MOST_SHARDS_PER_STREAM, rows // _LEAST_ROWS_PER_SHARD))


def _number_of_rows(dataset: Dataset | IterableDataset) -> int:
    if isinstance(dataset, Dataset):
        return len(dataset)
    split = (dataset.info.splits or {}).get(dataset.split)
    if split is None or not split.num_examples:
        raise ValueError("The streamed dataset does not provide its number of rows: set `num_rows`.")
    return split.num_examples


def streaming_loader(
    dataset: StreamingDataset,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    batch_size: int,
    accelerator: Accelerator,
    num_workers: int = 0,
    **settings: Any,
) -> torch.utils.data.DataLoader:
    """Create the data loader of this training process.

    By default accelerate makes every process read all data, or one process read it for all. Here each process reads
    its own part, so that the loader is prepared like that of a single process.

    Args:
        dataset: Dataset to load, which is set to the part of this process.
        collate: Function that builds a batch from rows.
        batch_size: Batch size of this process.
        accelerator: Accelerator that provides the processes and the device.
        num_workers: Number of worker processes.
        **settings: Further arguments of `DataLoader`.
    """
    dataset.share(accelerator.process_index, accelerator.num_processes, num_workers, batch_size)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=collate, drop_last=True, **settings
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
