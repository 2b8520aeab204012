"""Decoding and augmentation of training samples; unreadable samples are skipped, counted and logged."""

import logging
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from .schema import annotated_segments, learnable_ids, read_row, without_decoding
from .transforms import JointTransform

logger = logging.getLogger(__name__)

_READERS = 256  # maximum number of worker processes with a row of their own in the shared tables
_REMEMBERED = 3  # number of stored messages per worker
_MESSAGE_BYTES = 400


def augmented_row(row: Mapping[str, Any], transform: JointTransform, key: tuple[int, int, int]) -> dict[str, Any]:
    """Decode and augment a row with random numbers that depend on a key alone.

    Args:
        row: Row in the schema of `train.data.schema`.
        transform: Augmentation.
        key: Seed, epoch and row number.

    Returns:
        A dictionary of `image` (H, W, 3) uint8; `ids` (H, W) int32, segment ids or void; `segments` without crowds;
        `image_id`; `draw_seed`, the seed of all other random draws about the sample, in 0..2**63 - 1; and `nouns` of
        one randomly chosen caption, if the dataset has nouns.

    Raises:
        ValueError: If the sample cannot be read, or its segmentation has ids that its segments do not list.
    """
    image, ids = read_row(row)
    image, ids = transform(image, learnable_ids(row, ids), np.random.default_rng(key))
    return {
        "image": image,
        "ids": ids,
        "segments": annotated_segments(row),
        "image_id": row["image_id"],
        "draw_seed": draw_seed(key),
        "nouns": _nouns_of_one_caption(row, key),
    }


def draw_seed(key: tuple[int, int, int]) -> int:
    """Derive a seed from (seed, epoch, row number) that is independent of the augmentation."""
    return int(np.random.SeedSequence(key, spawn_key=(0,)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _nouns_of_one_caption(row: Mapping[str, Any], key: tuple[int, int, int]) -> list[str]:
    nouns = list(row.get("nouns") or [])
    if not nouns or isinstance(nouns[0], str):  # a flat list belongs to a single caption
        return nouns
    generator = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(1,)))
    return list(nouns[generator.integers(len(nouns))])


class BrokenSamples:
    """Counter of unreadable samples over all workers of a training process, which raises above a limit.

    Each sample counts once. Every training process has its own counter, and a resumed run starts at zero.

    Args:
        limit: Maximum number of unreadable samples to skip.
    """

    def __init__(self, limit: int):
        self.limit = limit
        # In shared memory; every worker writes to its own row, so that no lock is needed.
        self._digests = torch.zeros(_READERS + 1, limit + 1, dtype=torch.int64).share_memory_()
        self._messages = torch.zeros(_READERS + 1, _REMEMBERED, _MESSAGE_BYTES, dtype=torch.uint8).share_memory_()

    def count(self) -> int:
        """Return the number of distinct unreadable samples so far."""
        return len(set(self._digests[self._digests != 0].tolist()))

    def messages(self) -> list[str]:
        """Return the last error messages of each worker."""
        texts = [bytes(text.numpy()).rstrip(b"\0").decode(errors="ignore") for text in self._messages.flatten(0, 1)]
        return [text for text in texts if text]

    def add(self, image_id: str, reason: Exception) -> None:
        """Log and count an unreadable sample.

        Args:
            image_id: Image id of the sample.
            reason: Error that names the sample.

        Raises:
            RuntimeError: If the limit is exceeded.
        """
        digest, row = stable_number(image_id) or 1, _reader()
        known = self._digests[row]
        if not (self._digests == digest).any():
            position = int((known != 0).sum())
            logger.warning("Skipped broken sample: %s", reason)
            encoded = np.frombuffer(str(reason).encode()[:_MESSAGE_BYTES], dtype=np.uint8)
            slot = self._messages[row, position % _REMEMBERED].zero_()
            slot[: len(encoded)] = torch.from_numpy(encoded.copy())
            known[min(position, self.limit)] = digest
        if self.count() > self.limit:
            raise RuntimeError(
                f"{self.count()} samples cannot be read, more than `max_broken_samples` = {self.limit}. Repair or "
                "remove them, or raise the limit. The last ones:\n  " + "\n  ".join(self.messages())
            )


def _reader() -> int:
    """Return the row of the shared tables that belongs to this process."""
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else 1 + worker.id % _READERS


def stable_number(text: str) -> int:
    """Return a deterministic hash of a text in 0..2**63 - 1."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


class AugmentedDataset(torch.utils.data.Dataset):
    """Map-style dataset of augmented samples, whose random numbers depend on (seed, epoch, row number) alone.

    Rows are those of `augmented_row`. They do not depend on the state of a worker, so that a resumed run sees the same
    samples as an uninterrupted run. An unreadable sample is replaced by the next readable one, with the random numbers
    of its position, so that the length and order of an epoch do not change.

    Args:
        dataset: Dataset in the schema of `train.data.schema`.
        transform: Augmentation.
        seed: Random seed.
        max_broken: Maximum number of unreadable samples to skip.
    """

    def __init__(self, dataset: Dataset, transform: JointTransform, seed: int, max_broken: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.broken = BrokenSamples(max_broken)
        self._stored = without_decoding(dataset)
        # In shared memory, since workers persist across epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the random augmentations depend on."""
        self._epoch.fill_(epoch)

    def broken_count(self) -> int:
        """Return the number of distinct unreadable samples over all workers."""
        return self.broken.count()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = (self.seed, int(self._epoch), index)
        for offset in range(len(self)):
            row = self._stored[(index + offset) % len(self)]
            try:
                return augmented_row(row, self.transform, key)
            except ValueError as error:
                self.broken.add(row["image_id"], error)
        raise RuntimeError(f"No sample of the dataset can be read. The last ones: {self.broken.messages()}")
