"""Samples as training reads them: decoded, transformed, and the broken ones passed over, counted and named."""

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

_READERS = 256  # worker processes that can note broken samples without getting into each other's way
_REMEMBERED = 3  # messages that are kept of each worker
_MESSAGE_BYTES = 400


def augmented_row(row: Mapping[str, Any], transform: JointTransform, key: tuple[int, int, int]) -> dict[str, Any]:
    """Decode and transform a row, its random draws made from a key (seed, epoch, number of the row).

    Returns:
        `image` (H, W, 3) uint8, `ids` (H, W) int32 of the segments or void, `segments` (crowds left out), `image_id`,
        `draw_seed` for all other draws about this sample, at least 0 and below 2**63, and `nouns`, those of one of the
        captions, drawn, if the dataset has them.

    Raises:
        ValueError: the sample cannot be read, or its segmentation has ids that its segments do not list.
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
    """A seed from (seed, epoch, number of the row), other than that of the augmentation."""
    return int(np.random.SeedSequence(key, spawn_key=(0,)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _nouns_of_one_caption(row: Mapping[str, Any], key: tuple[int, int, int]) -> list[str]:
    nouns = list(row.get("nouns") or [])
    if not nouns or isinstance(nouns[0], str):  # a dataset with a single caption an image may list its nouns as such
        return nouns
    generator = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(1,)))
    return list(nouns[generator.integers(len(nouns))])


class BrokenSamples:
    """The samples that could not be read, counted over all workers of this process; one too many stops training.

    A sample counts once, however often it is met. With several training processes each counts the samples that it
    meets; a resumed run starts from zero.

    Args:
        limit: how many are passed over.
    """

    def __init__(self, limit: int):
        self.limit = limit
        # In shared memory. Every worker writes to a row of its own, so no lock is needed.
        self._digests = torch.zeros(_READERS + 1, limit + 1, dtype=torch.int64).share_memory_()
        self._messages = torch.zeros(_READERS + 1, _REMEMBERED, _MESSAGE_BYTES, dtype=torch.uint8).share_memory_()

    def count(self) -> int:
        """How many different samples were broken so far."""
        return len(set(self._digests[self._digests != 0].tolist()))

    def messages(self) -> list[str]:
        """What was wrong with the last ones of each worker."""
        texts = [bytes(text.numpy()).rstrip(b"\0").decode(errors="ignore") for text in self._messages.flatten(0, 1)]
        return [text for text in texts if text]

    def add(self, image_id: str, reason: Exception) -> None:
        """Log a broken sample for a reason that names it.

        Raises:
            RuntimeError: it is one too many; the last ones are named.
        """
        digest, row = stable_number(image_id) or 1, _reader()
        known = self._digests[row]
        if not (self._digests == digest).any():
            position = int((known != 0).sum())
            logger.warning("Broken sample passed over: %s", reason)
            encoded = np.frombuffer(str(reason).encode()[:_MESSAGE_BYTES], dtype=np.uint8)
            slot = self._messages[row, position % _REMEMBERED].zero_()
            slot[: len(encoded)] = torch.from_numpy(encoded.copy())
            known[min(position, self.limit)] = digest
        if self.count() > self.limit:
            raise RuntimeError(
                f"{self.count()} samples cannot be read, more than `max_broken_samples` = {self.limit}. Mend or "
                "remove them, or raise the limit. The last ones:\n  " + "\n  ".join(self.messages())
            )


def _reader() -> int:
    """Row of the shared tables that this process may write to."""
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else 1 + worker.id % _READERS


def stable_number(text: str) -> int:
    """A number below 2**63 that is the same for a text in every run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


class AugmentedDataset(torch.utils.data.Dataset):
    """A dataset whose rows are decoded and transformed, each by a generator of (seed, epoch, row number).

    No state of a worker enters, so a resumed run sees what an undisturbed one would have seen. Rows are those of
    `augmented_row`. In the place of a broken sample stands the next one that can be read, with the draws of that
    place, so an epoch keeps its length and order.

    Args:
        dataset: in the schema of `train.data`.
        transform: the augmentation.
        seed: see above.
        max_broken: samples that are passed over at most.
    """

    def __init__(self, dataset: Dataset, transform: JointTransform, seed: int, max_broken: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.broken = BrokenSamples(max_broken)
        self._stored = without_decoding(dataset)
        # In shared memory, for workers that live on from one epoch to the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on."""
        self._epoch.fill_(epoch)

    def broken_count(self) -> int:
        """How many different samples could not be read so far, over all workers."""
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
