"""Fuzzer of every kind of store: flipped bytes, truncated, deleted and exchanged files, changed JSON.

A store is copied, one file of the copy is damaged, and the whole copy is read. The result must equal the stored data,
or the reader must raise a `ValueError` of one line that names the damaged file or its folder.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from PIL import Image

from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from train.data.benchmarks.base import Benchmark, semantic_segments
from train.data.from_folder import convert
from train.data.load import load_split
from train.data.prepare import Settings, prepare
from train.data.prepared import load_prepared
from train.data.schema import without_decoding
from train.data.sources import AnnotatedImage
from train.engine.checkpoints import last_complete_checkpoint, verify_checkpoint, write_manifest
from train.evaluate.chunks import ChunkFolder
from train.evaluate.result import read_result, write_result
from train.metrics.semantic import SemanticMetric, SemanticScore
from train.storage.shards import StoreSettings, StoreWriter
from train.teacher.region_teacher import TeacherCache, TeacherEmbeddings

from ..test_evaluate_report import result
from ..training_toys import VOCABULARY, toy_model, toy_processor

FINGERPRINT = {"data": "d" * 32, "teacher": "t" * 32}
REGIONS = {f"image-{number}": number % 4 for number in range(7)}
CHUNKS = 3


@dataclass
class Store:
    """Valid store and its reader.

    Args:
        folder: Folder of the store; copies of it are damaged.
        read: Function that reads a whole copy; its results are compared.
        stored: Result of `read` for the intact store, or a function that returns whether a result is right.
    """

    folder: Path
    read: Callable[[Path], Any]
    stored: Any = None

    def __post_init__(self):
        if self.stored is None:
            self.stored = self.read(self.folder)


@dataclass
class Context:
    """Stores by kind, and the folder for damaged copies."""

    stores: dict[str, Store]
    scratch: Path


def setup(folder: Path) -> Context:
    """Build a store of each kind."""
    disable_progress_bars()
    (folder / "copy").mkdir()
    makers = {
        "prepared": _prepared,
        "dataset": _dataset,
        "regions": _regions,
        "rows": _rows,
        "chunks": _chunks,
        "results": _results,
        "embeddings": _embeddings,
        "checkpoints": _checkpoints,
    }
    return Context({kind: make(folder / kind) for kind, make in makers.items()}, folder / "copy")


def check(context: Context, rng: random.Random) -> str:
    """Damage a store of a random kind and read it."""
    return check_kind(context, rng.choice(list(context.stores)), rng)


def check_kind(context: Context, kind: str, rng: random.Random) -> str:
    """Damage a store of the given kind and read it."""
    store = context.stores[kind]
    copy = context.scratch / "store"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store.folder, copy)
    damage = _damage(copy, rng)
    try:
        value = store.read(copy)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text.strip(), f"{kind}, {damage}: the message has several lines: {text}"
        assert str(copy) in text, f"{kind}, {damage}: the message does not name a file of the store: {text}"
        return "refused"
    except Exception as error:
        raise RuntimeError(f"{kind}, {damage}: {type(error).__name__}: {error}") from error
    right = store.stored(value) if callable(store.stored) else value == store.stored
    assert right, f"{kind}, {damage}: the data read differ from the data stored"
    return "accepted"


# ---- damage


def _damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder, or exchange two, and return a description."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    kind = rng.choice(
        ("flip", "flip", "flip", "json", "truncate", "delete", "exchange", "overwrite", "append", "fill")
    )
    if kind == "json" and path.suffix != ".json":
        kind, path = (
            ("flip", path) if not (texts := [f for f in files if f.suffix == ".json"]) else (kind, rng.choice(texts))
        )
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind in ("exchange", "overwrite"):
        other = rng.choice([file for file in files if file.suffix == path.suffix])
        taken = other.read_bytes()
        if kind == "exchange":
            other.write_bytes(content)
        path.write_bytes(taken)
    elif kind == "json":
        value = json.loads(content)
        value = _changed(value, rng)
        path.write_text(json.dumps(value))
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "append":
        path.write_bytes(content + rng.randbytes(rng.randrange(1, 40)))
    elif content:
        length = 1 if kind == "flip" else rng.randrange(1, 64)
        start = rng.randrange(len(content))
        for place in range(start, min(start + length, len(content))):
            content[place] = content[place] ^ (1 << rng.randrange(8)) if kind == "flip" else 0
        path.write_bytes(content)
    return f"{kind} of {path.relative_to(folder)}"


def _changed(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one change at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        action = rng.random()
        if action < 0.15:
            del changed[key]
        elif action < 0.25:
            changed[f"{key}x"] = changed.pop(key)
        else:
            changed[key] = _changed(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        position = rng.randrange(len(value))
        return [_changed(item, rng) if index == position else item for index, item in enumerate(value)]
    if isinstance(value, bool):
        return rng.choice([not value, "no", None])
    if isinstance(value, int | float) and rng.random() < 0.6:
        return rng.choice([value + 1, -value - 1, 2**70, float("nan"), float("inf"), 0, str(value)])
    if isinstance(value, str) and rng.random() < 0.6:
        return rng.choice(["", value[:-1], value + "/../x", value.upper(), "\ud800"])
    return rng.choice([None, [], {}, 0, -1, 1.5, "x", True, [[]], {"a": []}])


# ---- stores


def _write_image(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder / f"{number:03d}.png"


def _rows_of(dataset: Any) -> list[dict]:
    return list(without_decoding(dataset))


def _prepared(folder: Path) -> Store:
    """Prepare five images in two Parquet files; reading them once also creates the cache that is damaged."""
    source = folder.with_name("source")
    paths = [_write_image(source / "images", number) for number in range(5)]

    def find(_: Path, split: str) -> list[AnnotatedImage]:
        return [
            AnnotatedImage(path.stem, path, lambda shape, n=number: semantic_segments(np.full(shape, n)), split)
            for number, path in enumerate(paths)
        ]

    toy = Benchmark("toy", "pascal_voc_20", "A toy.", find, {"val": None})
    prepare(toy, source, folder, None, Settings(progress=False, images_per_shard=3))

    def read(copy: Path) -> tuple:
        found = load_prepared(copy, "val")
        return _rows_of(found.dataset), found.vocabulary, found.benchmark, found.info

    return Store(folder, read)


def _dataset(folder: Path) -> Store:
    """Make a dataset of `save_to_disk` with a train and a val split, as `train.data.from_folder` does."""
    source = folder.with_name("annotated")
    for number in range(5):
        _write_image(source / "images", number)
        (source / "masks").mkdir(exist_ok=True)
        mask = np.arange(20, dtype=np.uint8).reshape(4, 5) % (number + 2)
        Image.fromarray(mask).save(source / "masks" / f"{number:03d}.png")
    (source / "names.json").write_text(json.dumps([f"class {number}" for number in range(8)]))
    convert(source, folder, val_share=0.4)
    for name in ("report.json", "vocabulary.json"):  # users may edit these
        (folder / name).unlink()
    return Store(folder, lambda copy: [_rows_of(load_split(copy, split)) for split in ("train", "val")])


def _region_rows() -> tuple[np.ndarray, np.ndarray]:
    """Return segment ids (R,) and rows (R, 6) of REGIONS."""
    count = sum(REGIONS.values())
    return np.arange(1, count + 1), np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)


def _lookups(store: Any) -> list[list]:
    ids = iter(np.array_split(_region_rows()[0], np.cumsum(list(REGIONS.values()))[:-1]))
    return [rows.tolist() for rows in store.lookup(list(REGIONS), [torch.from_numpy(next(ids)) for _ in REGIONS])]


def _regions(folder: Path) -> Store:
    """Write a region store of three shards, as used for teacher embeddings and synonym probabilities."""
    settings = StoreSettings("teacher", FINGERPRINT, 6, len(REGIONS), images_per_shard=3, command="make it again")
    writer = StoreWriter(folder, settings)
    writer.begin()
    segment_ids, rows = _region_rows()
    ends = np.cumsum([0, *REGIONS.values()])
    for shard in range(settings.num_shards):
        images = settings.images_of(shard)
        part = slice(ends[images.start], ends[images.stop])
        names = list(REGIONS)[images.start : images.stop]
        writer.write(shard, names, [REGIONS[name] for name in names], segment_ids[part], rows[part])
    writer.finish()
    return Store(folder, lambda copy: _lookups(TeacherCache.open(copy, FINGERPRINT)))


def _rows(folder: Path) -> Store:
    """Write teacher embeddings to one file, as `RegionTeacher.embed_dataset` does."""
    segment_ids, rows = _region_rows()
    ends = np.cumsum(list(REGIONS.values())).tolist()
    places = {name: (end - REGIONS[name], end) for name, end in zip(REGIONS, ends, strict=True)}
    embeddings = TeacherEmbeddings(torch.from_numpy(rows).half(), torch.from_numpy(segment_ids), places, FINGERPRINT)
    embeddings.save(folder / "rows.safetensors")

    def read(copy: Path) -> list:
        if not (copy / "rows.safetensors").exists():  # a missing file is computed
            return _lookups(embeddings)
        return _lookups(TeacherEmbeddings.load(copy / "rows.safetensors", FINGERPRINT))

    return Store(folder, read)


def _chunks(folder: Path) -> Store:
    """Write the counts of three finished chunks of an evaluation."""
    chunks, generator = ChunkFolder(folder, CHUNKS), np.random.default_rng(0)
    for number in range(CHUNKS):
        score = SemanticScore(SemanticMetric(4))
        score.metric.update(generator.integers(0, 5, (9, 9)), generator.integers(-1, 4, (9, 9)))
        chunks.write(number, {"semantic": score}, {"images": number, "broken": ["one"], "seconds": {"model": 0.5}})

    def read(copy: Path) -> Any:
        scores, found = {"semantic": SemanticScore(SemanticMetric(4))}, ChunkFolder(copy, CHUNKS)
        if found.pending():  # pending chunks are evaluated again
            return "again"
        metas = [found.merge_into(number, scores) for number in range(CHUNKS)]
        return metas, scores["semantic"].metric.confusion.tolist()

    stored = read(folder)
    return Store(folder, read, lambda value: value in ("again", stored))


def _results(folder: Path) -> Store:
    """Write the result file of an evaluation."""
    write_result(result(), folder / "result.json")
    return Store(folder, lambda copy: read_result(copy / "result.json"))


def _embeddings(folder: Path) -> Store:
    """Write class embeddings as `gkc embed` does."""
    folder.mkdir()
    model, processor = toy_model().eval(), toy_processor()
    with torch.no_grad():
        EncodedVocabulary.encode(VOCABULARY, model, processor).save(folder / "words.safetensors", model)

    def read(copy: Path) -> tuple:
        with torch.no_grad():
            try:
                found = EncodedVocabulary.load(copy / "words.safetensors", model)
            except FileNotFoundError as error:
                raise ValueError(str(error)) from error
        return found.class_embeds.tolist(), found.class_ids.tolist(), found.vocabulary

    return Store(folder, read)


def _checkpoints(folder: Path) -> Store:
    """Write two training checkpoints; if the newer one is incomplete, the older one must be used."""
    for step in (10, 20):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            content = random.Random(f"{step} {name}").randbytes(300)
            (checkpoint / name).write_bytes(b"{}" if name.endswith("json") else content)
        write_manifest(checkpoint)

    def read(copy: Path) -> dict[str, bytes]:
        checkpoint = verify_checkpoint(last_complete_checkpoint(copy))
        names = ("model.safetensors", "optimizer.pt", "trainer_state.json")
        return {name: (checkpoint / name).read_bytes() for name in names}

    stored = [read(folder)]
    shutil.move(folder / "checkpoint-20", folder.with_name("newest"))
    stored.append(read(folder))
    shutil.move(folder.with_name("newest"), folder / "checkpoint-20")
    return Store(folder, read, lambda value: value in stored)
