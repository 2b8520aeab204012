"""Crash-safe store of one vector per region of a dataset, written in shards and read by memory mapping.

A store is a folder:

    manifest.json            fingerprints of the inputs and, when the store is complete, the sizes of all shards
    shard-00000.safetensors  images of one shard: `rows` (R, D) fp16, `segment_ids` (R,), `counts` (I,), `images` (I,)
                             and `sums` (I,), the 64-bit xxh3 hashes of the rows of each image
    index.safetensors        positions and `sums` of the rows of all images

The shards are managed by `shard_folder.ShardFolder`, so that an interrupted writer resumes. Images are identified by a
64-bit hash of their id.

Every file has a checksum. A writer verifies all files and writes damaged shards again. A reader verifies the manifest
and the index when it opens a store, and the rows of an image whenever it reads them, which takes a microsecond for 13
regions.

Shapes: I images, R regions, S shards, N regions of an image, D columns.
"""

import hashlib
import json
import mmap
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from modeling_gkc.atomic_files import atomic_path
from modeling_gkc.file_checksums import EMPTY_CHECKSUM, DamagedFileError, verify_checksum, write_checksum

from .checksums import Each, Perhaps, read_checksummed_json, read_json, write_checksummed_json
from .shard_folder import ShardFolder

FORMAT = "gkc-region-rows-2"
_OLDER_FORMATS = ("gkc-region-rows-1",)
MANIFEST, INDEX = "manifest.json", "index.safetensors"
_SHAPE = {
    "format": str,
    "kind": str,
    "fingerprint": Each(str),
    "columns": int,
    "images": int,
    "images_per_shard": int,
    "writing": Each(str),
    "command": str,
    "index": Perhaps(str),
    "shards": Perhaps([{"bytes": int, "regions": int, "rows_at": int}]),
}
_NUMPY_TYPES = {"F16": "<f2", "I32": "<i4", "I64": "<i8", "U64": "<u8"}


@dataclass(frozen=True)
class StoreSettings:
    """Content and origin of a store.

    Attributes:
        kind: `teacher` or `synonyms`.
        fingerprint: Hash of each input of the rows, by name.
        columns: Number D of columns.
        images: Number of images in the dataset.
        images_per_shard: Number I of images in a shard; the last shard may have fewer.
        writing: Further settings that must not change while a store is written, such as the teacher's precision.
        command: Command that completes an unfinished store.
    """

    kind: str
    fingerprint: Mapping[str, str]
    columns: int
    images: int
    images_per_shard: int = 500
    writing: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def num_shards(self) -> int:
        """Number S of shards."""
        return -(-self.images // self.images_per_shard)

    def images_of(self, shard: int) -> range:
        """Return the dataset positions of the images of a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.images))

    def mark(self, shard: int) -> str:
        """Return the identifier that is stored in a shard, which distinguishes it from shards of other stores."""
        decisive = {name: value for name, value in asdict(self).items() if name != "command"}
        return hashlib.sha256(json.dumps([decisive, shard], sort_keys=True).encode()).hexdigest()[:32]


class StoreWriter:
    """Writer of a store, which resumes an unfinished store; several processes may write different shards.

    Args:
        folder: Folder of the store.
        settings: Content and origin of the store.

    Raises:
        ValueError: If the folder contains a store of other inputs.
    """

    def __init__(self, folder: str | Path, settings: StoreSettings):
        self.folder = Path(folder)
        if (self.folder / MANIFEST).exists():
            manifest = read_manifest(self.folder)
            check_not_stale(self.folder, manifest, settings)
            settings = StoreSettings(**{**asdict(settings), "images_per_shard": manifest["images_per_shard"]})
        self.settings = settings
        names = [shard_name(number) for number in range(settings.num_shards)]
        self.shards = ShardFolder(self.folder, names, self._verify)

    def begin(self) -> None:
        """Prepare the folder; call it from one process before any shard is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards.remove_leftovers()
        if not self._is_finished():
            self._write_manifest({})

    def pending(self) -> list[int]:
        """Return the numbers of the missing or damaged shards."""
        return self.shards.pending()

    def write(
        self, shard: int, image_ids: Sequence[str], counts: Sequence[int], segment_ids: np.ndarray, rows: np.ndarray
    ) -> None:
        """Write one shard.

        Args:
            shard: Number of the shard.
            image_ids: Ids of its I images.
            counts: Number of regions of each image (I,).
            segment_ids: Segment ids of the regions (R,), image by image.
            rows: Vectors of the regions (R, D).

        Raises:
            ValueError: If a row is not finite.
        """
        _require_finite(image_ids, counts, rows)
        tensors = {
            "rows": rows.astype(np.float16),
            "segment_ids": segment_ids.astype(np.int32),
            "counts": np.asarray(counts, dtype=np.int32),
            "images": np.array([_hash(image_id) for image_id in image_ids], dtype=np.uint64),
        }
        tensors["sums"] = _sums_of_images(tensors["rows"], tensors["counts"])
        with self.shards.writing(shard) as temporary:
            _save(temporary, tensors, {"mark": self.settings.mark(shard)})

    def finish(self) -> None:
        """Write the index and the manifest; call it from one process after all shards have been written.

        Raises:
            ValueError: If shards are missing, images share an id, or no image has a region.
        """
        if missing := self.pending():
            raise ValueError(f"{self.folder} still lacks the shards {missing[:10]}: {_complete(self.settings)}")
        if not self._is_finished():
            with atomic_path(self.folder / INDEX, sync=True) as temporary:
                _save(temporary, self._index(), {"format": FORMAT})
            shards = [self._describe(number) for number in range(self.settings.num_shards)]
            self._write_manifest({"shards": shards, "index": verify_checksum(self.folder / INDEX, "write it again.")})

    def _verify(self, shard: int) -> bool | None:
        """Return True if a shard is undamaged and belongs to this store, else None, by reading the whole file."""
        path = self.shards.path(shard)
        try:
            verify_checksum(path, "")
            with safe_open(path, framework="numpy") as file:
                return (file.metadata() or {}).get("mark") == self.settings.mark(shard) or None
        except (OSError, SafetensorError, DamagedFileError):
            return None

    def _is_finished(self) -> bool:
        manifest = read_manifest(self.folder) if (self.folder / MANIFEST).exists() else {}
        if "shards" not in manifest or self.pending():
            return False
        return not _damaged_file(self.folder, manifest)

    def _write_manifest(self, files: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, **asdict(self.settings), **files}
        write_checksummed_json(self.folder / MANIFEST, content, sync=True)

    def _describe(self, shard: int) -> dict[str, int]:
        path = self.shards.path(shard)
        _, rows_at, shape = _places(path)["rows"]
        return {"bytes": path.stat().st_size, "regions": shape[0], "rows_at": rows_at}

    def _index(self) -> dict[str, np.ndarray]:
        shards = [mapped_tensors(self.shards.path(number)) for number in range(self.settings.num_shards)]
        joined = {
            name: np.concatenate([shard[name] for shard in shards]) for name in ("images", "counts", "segment_ids")
        }
        if not len(joined["segment_ids"]):
            raise ValueError("The dataset has no annotated region with a pixel: there is nothing to embed.")
        order = np.argsort(joined["images"], kind="stable")
        sums = np.concatenate([shard["sums"] for shard in shards])
        images = joined["images"][order]
        if (images[1:] == images[:-1]).any():
            raise ValueError("Several images of the dataset have the same image_id: make the ids unique.")
        ends = np.cumsum(joined["counts"], dtype=np.int64)
        return {
            "images": images,
            "starts": (ends - joined["counts"])[order],
            "stops": ends[order],
            "sums": sums[order],
            "segment_ids": joined["segment_ids"],
            "shard_starts": np.cumsum([0, *(len(shard["segment_ids"]) for shard in shards)], dtype=np.int64),
        }


class RegionStore:
    """Reader of a complete store, which reads only the requested rows.

    The index is memory-mapped, with 32 bytes per image and 4 bytes per region. The rows of an image are verified
    whenever they are read.
    """

    kind: ClassVar[str]
    holds: ClassVar[str]

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.fingerprint: dict[str, str] = manifest["fingerprint"]
        self.columns: int = manifest["columns"]
        self.command: str = manifest["command"] or f"python -m train.cache {self.kind} DATASET --clip CLIP"
        self._rows_at: list[int] = [shard["rows_at"] for shard in manifest["shards"]]
        self._index = {name: np.asarray(array) for name, array in mapped_tensors(folder / INDEX).items()}

    @classmethod
    def open(cls, folder: str | Path, fingerprint: Mapping[str, str]) -> "RegionStore":
        """Open a store of the given inputs.

        Args:
            folder: Folder of the store.
            fingerprint: Expected hash of each input.

        Raises:
            ValueError: If the store is missing, incomplete, damaged or of other inputs.
        """
        folder = Path(folder)
        command = f"python -m train.cache {cls.kind} DATASET --clip CLIP"
        if not (folder / MANIFEST).exists():
            raise ValueError(f"There are no {cls.holds} in {folder}: create them with `{command}`.")
        manifest = read_manifest(folder)
        command = manifest["command"] or command
        if manifest["kind"] != cls.kind:
            raise ValueError(f"{folder} does not hold {cls.holds} but {manifest['kind']!r}: name another folder.")
        if differing := _differing(manifest["fingerprint"], fingerprint):
            raise ValueError(_stale(folder, differing))
        if "shards" not in manifest:
            done, all_shards = len(list(folder.glob("shard-*.safetensors"))), StoreSettings(**_settings(manifest))
            raise ValueError(
                f"{folder} is incomplete, {done} of {all_shards.num_shards} shards exist: complete it with "
                f"`{command}`."
            )
        if damaged := _damaged_file(folder, manifest):
            raise DamagedFileError(f"{folder / damaged} is missing or damaged: `{command}` writes it again.")
        return cls(folder, manifest)

    def __reduce__(self):
        return type(self).open, (self.folder, self.fingerprint)

    def __len__(self) -> int:
        """Return the number R of regions."""
        return len(self._index["segment_ids"])

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the fp32 rows (N, D) of the segments (N,) of each image.

        Args:
            image_ids: Ids of the images.
            segment_ids: Segment ids (N,) of each image.

        Raises:
            KeyError: If the store lacks a segment.
        """
        return [self._of_image(image_id, ids.cpu()) for image_id, ids in zip(image_ids, segment_ids, strict=True)]

    def _of_image(self, image_id: str, segment_ids: Tensor) -> Tensor:
        start, stop, checksum = self._range(image_id)
        found = segment_ids.numpy()[:, None] == self._index["segment_ids"][start:stop]
        has_row = found.any(axis=1)
        if not has_row.all():
            raise missing_regions(self.holds, image_id, segment_ids[~torch.from_numpy(has_row)].tolist())
        if not len(segment_ids):
            return torch.empty(0, self.columns)
        return torch.from_numpy(self._rows(start, stop, checksum)[found.argmax(axis=1)])

    def _range(self, image_id: str) -> tuple[int, int, int]:
        """Return the start, stop and checksum of the rows of an image."""
        key = np.uint64(_hash(image_id))
        place = int(np.searchsorted(self._index["images"], key))
        if place == len(self._index["images"]) or self._index["images"][place] != key:
            return 0, 0, 0
        start, stop, checksum = (int(self._index[name][place]) for name in ("starts", "stops", "sums"))
        return start, stop, checksum

    def _rows(self, start: int, stop: int, checksum: int) -> np.ndarray:
        """Read and verify the rows of one image in fp32.

        The memory mapping is closed after each call, since its pages would count as used memory.
        """
        shard = int(np.searchsorted(self._index["shard_starts"], start, side="right")) - 1
        row_bytes = 2 * self.columns
        offset = self._rows_at[shard] + (start - int(self._index["shard_starts"][shard])) * row_bytes
        page_start = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset - page_start + (stop - start) * row_bytes
        path = self.folder / shard_name(shard)
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=page_start) as pages,
        ):
            stored = pages[offset - page_start :]
        if xxhash.xxh3_64_intdigest(stored) != checksum:
            raise DamagedFileError(
                f"{path} is damaged, the checksum of rows {start} to {stop} has changed since writing: "
                f"`{self.command}` writes it again."
            )
        return np.frombuffer(stored, "<f2").astype(np.float32).reshape(-1, self.columns)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def missing_regions(holds: str, image_id: str, segments: list[int]) -> KeyError:
    """Return the error for segments that a store lacks."""
    return KeyError(
        f"There are no {holds} of the segments {segments} of image {image_id!r}. Embed the training dataset."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a store.

    Raises:
        ValueError: If the manifest is missing, damaged or of an older format.
    """
    path, remedy = folder / MANIFEST, f"delete {folder} (`rm -r {shlex.quote(str(folder))}`) and write it again."
    found = read_json(path, remedy)
    if isinstance(found, dict) and found.get("format") in _OLDER_FORMATS:
        raise ValueError(f"{folder} has the format {found['format']!r}, not {FORMAT!r}, and no checksums: {remedy}")
    return read_checksummed_json(path, _SHAPE, remedy)


def check_not_stale(folder: Path, manifest: Mapping[str, Any], settings: StoreSettings) -> None:
    """Check that an unfinished store has the same inputs as the settings.

    Args:
        folder: Folder of the store, for the error.
        manifest: Manifest of the store.
        settings: Content and origin of the store to write.

    Raises:
        ValueError: If an input differs.
    """
    if manifest["kind"] != settings.kind:
        raise ValueError(
            f"{folder} holds {manifest['kind']!r}, not {settings.kind!r}: name another folder with --out."
        )
    differing = _differing(manifest["fingerprint"], settings.fingerprint)
    if not differing and (manifest["columns"], manifest["images"]) != (settings.columns, settings.images):
        differing = ["data"]
    if differing or (differing := _differing(manifest["writing"], settings.writing)):
        raise ValueError(_stale(folder, differing))


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in StoreSettings.__dataclass_fields__}


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _stale(folder: Path, differing: list[str]) -> str:
    return (
        f"{folder} was made with another {' and another '.join(differing)} than now requested. Delete it to write it "
        f"again (`rm -r {shlex.quote(str(folder))}`), or name another folder."
    )


def _complete(settings: StoreSettings) -> str:
    return f"complete it with `{settings.command}`." if settings.command else "run the same command again."


def _damaged_file(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return the name of a missing or damaged file of a complete store, checking shards by size only, or None."""
    for number, shard in enumerate(manifest["shards"]):
        path = folder / shard_name(number)
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            return path.name
    try:
        return None if verify_checksum(folder / INDEX, "") == manifest.get("index") else INDEX
    except DamagedFileError:
        return INDEX


def mapped_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the memory-mapped tensors of a safetensors file by name.

    Raises:
        ValueError: If the file is shorter than its header states.
    """
    return {name: _map(path, *place) for name, place in _places(path).items()}


def _places(path: Path) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Return the type, file offset and shape of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (_NUMPY_TYPES[tensor["dtype"]], 8 + length + tensor["data_offsets"][0], tuple(tensor["shape"]))
        for name, tensor in header.items()
    }


def _map(path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, shape) if 0 not in shape else np.empty(shape, dtype)


def _hash(image_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")


def _require_finite(image_ids: Sequence[str], counts: Sequence[int], rows: np.ndarray) -> None:
    wrong = np.flatnonzero(~(np.abs(rows) <= np.finfo(np.float16).max).all(axis=1))  # also true for NaN
    if len(wrong):
        image = image_ids[int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))]
        raise ValueError(
            f"A row of image {image!r} is not finite: use a teacher of higher precision (--dtype float32)."
        )


def _sums_of_images(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the checksums (I,) of the consecutive rows (R, D) of each of I images."""
    ends = np.cumsum(counts)
    parts = (rows[end - count : end] for end, count in zip(ends, counts, strict=True))
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(part)) for part in parts], dtype=np.uint64)


def _save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    save_file(dict(tensors), path, {**metadata, **EMPTY_CHECKSUM})
    write_checksum(path)
