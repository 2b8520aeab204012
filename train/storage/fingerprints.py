"""Fingerprints of datasets, models and settings, by which a cache detects that its inputs have changed.

Fingerprints are 128-bit xxHash values, which are not cryptographically secure.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from tqdm.auto import tqdm

from modeling_gkc.file_checksums import DamagedFileError

from .checksums import read_checksummed_json, write_checksummed_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from torch import nn

_PICTURES = ("image", "segmentation")
_ROWS_PER_PASS = 256
# Settings of a CLIP tower that its weights do not determine. Other configuration fields vary with library versions.
_ARCHITECTURE = (
    "model_type",
    "image_size",
    "patch_size",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "eos_token_id",
)


def data_fingerprint(dataset: Dataset, remember: str | Path | None = None, progress: bool = True) -> str:
    """Return a hash of the image ids, segments, images and segmentations of a dataset, in row order.

    Embedded images are hashed by all their encoded bytes, and referenced image files by path, size and modification
    time. The hash does not depend on captions, on further columns or on the division into files.

    Args:
        dataset: Dataset in the schema of `train.data.schema` as loaded, not filtered or shuffled.
        remember: File that caches the result. The cached value is valid while the names, sizes and modification times
            of the Arrow files and the fingerprint of `datasets` do not change.
        progress: Whether to show a progress bar while images are read.
    """
    key = _files_key(dataset) if remember is not None else None
    if key is not None and (known := _recall(Path(remember), key)):
        return known
    reader = _RowsDigest()
    rows = dataset.select_columns(["image_id", "segments", *_PICTURES]).with_format("arrow")
    with tqdm(total=len(dataset), desc="Fingerprint of the data", unit="image", disable=not progress) as bar:
        for table in rows.iter(_ROWS_PER_PASS):
            reader.update(table)
            bar.update(len(table))
    if key is not None and not reader.refers_to_files:
        _keep(Path(remember), key, reader.hexdigest())
    return reader.hexdigest()


def model_fingerprint(*models: nn.Module) -> str:
    """Return a hash of the weights of models and of the settings of CLIP towers that affect their outputs."""
    import torch

    digest = xxhash.xxh3_128()
    for model in models:
        settings = {name: getattr(model.config, name, None) for name in _ARCHITECTURE}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_fingerprint(settings: Any) -> str:
    """Return a hash of settings that are serializable as JSON."""
    return xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class _RowsDigest:
    """Incremental hash of dataset rows that is independent of the division into Arrow chunks."""

    def __init__(self):
        self._streams: dict[str, xxhash.xxh3_128] = {}
        self.refers_to_files = False

    def update(self, table: pa.Table) -> None:
        for name in ("image_id", "segments", *_PICTURES):
            for chunk in table.column(name).chunks:
                if name == "image_id":
                    self._add_bytes(name, chunk)
                elif name == "segments":
                    self._add_segments(chunk)
                else:
                    self._add_pictures(name, chunk)

    def hexdigest(self) -> str:
        return settings_fingerprint({name: stream.hexdigest() for name, stream in self._streams.items()})

    def _add(self, name: str, values: Any) -> None:
        self._streams.setdefault(name, xxhash.xxh3_128()).update(values)

    def _add_segments(self, chunk: pa.Array) -> None:
        import pyarrow.compute as pc

        self._add("segments.counts", _numbers(pc.list_value_length(chunk)))
        flat = chunk.flatten()
        for name in ("id", "category_id", "iscrowd"):
            self._add(f"segments.{name}", _numbers(pc.struct_field(flat, name)))

    def _add_pictures(self, name: str, chunk: pa.Array) -> None:
        import pyarrow.compute as pc

        embedded = pc.struct_field(chunk, "bytes")
        self._add_bytes(name, embedded)
        referred = pc.filter(pc.struct_field(chunk, "path"), pc.is_null(embedded))
        for path in referred.to_pylist():
            self.refers_to_files = True
            self._add(f"{name}.files", _file_state(path))

    def _add_bytes(self, name: str, array: pa.Array) -> None:
        """Hash the lengths and contents of binary values."""
        import pyarrow as pa
        import pyarrow.compute as pc

        self._add(f"{name}.lengths", _numbers(pc.binary_length(array)))
        _, offsets, data = array.buffers()
        if data is not None:
            width = (
                np.int64 if pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type) else np.int32
            )
            bounds = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1]
            self._add(f"{name}.bytes", memoryview(data)[bounds[0] : bounds[-1]])


def _numbers(array: pa.Array) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.fill_null(pc.cast(array, pa.int64()), -1).to_numpy(zero_copy_only=False)


def _file_state(path: str | None) -> bytes:
    try:
        state = os.stat(path)
    except (OSError, TypeError) as error:
        raise ValueError(f"The dataset refers to an image {path!r}, which cannot be read: {error}.") from error
    return json.dumps([path, state.st_size, state.st_mtime_ns]).encode()


def _files_key(dataset: Dataset) -> dict[str, Any] | None:
    """Return a key that identifies an unmodified dataset on disk without reading it, or None if rows are selected."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if not files or dataset._indices is not None:
        return None
    states = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"files": states, "rows": len(dataset), "datasets": dataset._fingerprint}


_REMEMBERED = {"key": {"files": [list], "rows": int, "datasets": str}, "fingerprint": str}


def _recall(path: Path, key: Mapping[str, Any]) -> str | None:
    try:
        known = read_checksummed_json(path, _REMEMBERED, "")
    except DamagedFileError:  # or missing: the fingerprint is computed again
        return None
    return known["fingerprint"] if known["key"] == key else None


def _keep(path: Path, key: Mapping[str, Any], fingerprint: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checksummed_json(path, {"key": key, "fingerprint": fingerprint})
    except OSError as error:  # the fingerprint of a read-only dataset is computed every time
        logging.getLogger(__name__).warning("Cannot store the fingerprint of the dataset: %s", error)
