"""Training data read in its own order, without random access: from Arrow or Parquet files, here or on the Hub.

A *stream* is what one worker process of one training process reads; there are P x W of them. They share the data: each
reads its own shards (files, record batches) where the shards can be dealt out evenly, else each reads everything and
keeps one row in P x W.
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
    """Rows of `augmented_row`, in an order and with draws that depend on seed and epoch.

    In an epoch every row comes once over all streams, in an order made by shuffling the shards and then the rows
    within a buffer. All draws about a sample depend on (seed, epoch, image id) alone, however the data is shared.

    For training, `streaming_loader` makes each stream give the same number of full batches, so that all processes take
    equally many steps: what is over is left out of this epoch, at most a batch and, where shards hold unequal numbers
    of rows, the difference; each epoch leaves out others. A stream that has too few, because samples are broken,
    continues with the next epoch's order.

    Args:
        dataset: in the schema of `train.data`; a map-style one is read in contiguous shards.
        transform: the augmentation.
        seed: see above.
        max_broken: samples that cannot be read and are left out, at most; see `BrokenSamples`.
        num_rows: length of `dataset`, where it does not know it.
        buffer_rows: rows that each stream holds undecoded to shuffle them; 0 keeps the order of the data.

    Raises:
        ValueError: the number of rows is not known.
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
        # In shared memory, for workers that live on from one epoch to the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._process, self._processes, self._workers = 0, 1, 1
        self._rows_per_stream = None

    def set_epoch(self, epoch: int) -> None:
        """Take another order and other augmentations from now on."""
        self._epoch.fill_(epoch)

    def broken_count(self) -> int:
        """How many different samples could not be read so far, over all workers."""
        return self.broken.count()

    def share(self, process: int, processes: int, workers: int = 0, batch_size: int | None = None) -> None:
        """Say which part of the data this process reads, by so many workers.

        Args:
            process: number of this training process.
            processes: how many there are.
            workers: worker processes of each, as for `DataLoader`.
            batch_size: makes all streams give the same number of full batches; None gives every row.

        Raises:
            ValueError: no stream has a full batch.
        """
        self._process, self._processes, self._workers = process, processes, max(1, workers)
        self._rows_per_stream = None
        if batch_size is not None:
            self._rows_per_stream = self._least_rows() // batch_size * batch_size
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
            raise ValueError(f"`share` was told of {self._workers} workers, but there are {worker.num_workers}.")
        stream = self._process * self._workers + (0 if worker is None else worker.id)
        epoch = int(self._epoch)
        if self._rows_per_stream is None:
            return self._read(stream, epoch)
        return islice(self._read_on(stream, epoch), self._rows_per_stream)

    @property
    def _streams(self) -> int:
        return self._processes * self._workers

    def _read_on(self, stream: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Epoch after epoch."""
        while True:
            row = None
            for row in self._read(stream, epoch):
                yield row
            if row is None:
                raise RuntimeError(f"Stream {stream} has no sample that can be read. {self.broken.messages()}")
            epoch += 1

    def _read(self, stream: int, epoch: int) -> Iterator[dict[str, Any]]:
        """The rows of one stream and epoch that can be read."""
        for row in self._stored_rows(stream, epoch):
            key = (self.seed, epoch, stable_number(row["image_id"]))
            try:
                yield augmented_row(row, self.transform, key)
            except ValueError as error:
                self.broken.add(row["image_id"], error)

    def _stored_rows(self, stream: int, epoch: int) -> Iterator[Mapping[str, Any]]:
        dataset = self._source()
        if self.buffer_rows:
            order = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
            dataset = dataset.shuffle(seed=order, buffer_size=self.buffer_rows)
        # `iter` reads the whole of a part in a worker process too, where `__iter__` would divide it once more.
        for rows in split_dataset_by_node(dataset, stream, self._streams).iter(_ROWS_AT_ONCE):
            for values in zip(*rows.values(), strict=True):
                yield dict(zip(rows, values, strict=True))

    def _source(self) -> IterableDataset:
        if isinstance(self._dataset, IterableDataset):
            return self._dataset
        return self._dataset.to_iterable_dataset(num_shards=self._num_shards())

    def _num_shards(self) -> int:
        if isinstance(self._dataset, IterableDataset):
            return self._dataset.num_shards
        # Many shards mix well; but those of some streams hold a row each more, which training leaves out.
        rows = len(self._dataset) // self._streams
        return self._streams * max(1, min(_MOST_SHARDS_PER_STREAM, rows // _LEAST_ROWS_PER_SHARD))

    def _least_rows(self) -> int:
        """Rows that every stream has at least, if the shards hold equally many but for one."""
        shards = self._num_shards()
        if shards % self._streams:
            return self.num_rows // self._streams
        return self.num_rows // shards * (shards // self._streams)


def _number_of_rows(dataset: Dataset | IterableDataset) -> int:
    if isinstance(dataset, Dataset):
        return len(dataset)
    split = (dataset.info.splits or {}).get(dataset.split)
    if split is None or not split.num_examples:
        raise ValueError("The streamed dataset does not know how many rows it has: give `num_rows`.")
    return split.num_examples


def streaming_loader(
    dataset: StreamingDataset,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    batch_size: int,
    accelerator: Accelerator,
    num_workers: int = 0,
    **settings: Any,
) -> torch.utils.data.DataLoader:
    """The batches of this training process.

    accelerate would have every process read and augment everything and keep its part, or one process do it for all;
    here each reads its own, so the loader is prepared as that of a single process.

    Args:
        dataset: is told its share.
        collate: rows -> batch.
        batch_size: of this process.
        accelerator: knows the processes and the device.
        num_workers: worker processes.
        settings: further ones of `DataLoader`.
    """
    dataset.share(accelerator.process_index, accelerator.num_processes, num_workers, batch_size)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=collate, drop_last=True, **settings
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
