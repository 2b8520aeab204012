"""Deterministic, parallel writing of the Parquet shards of a prepared benchmark.

The shards are managed by `train.storage.shard_folder.ShardFolder`. While a split is unfinished, `PROGRESS_FOLDER`
contains a report of every finished shard, from which an interrupted command resumes.
"""

import io
import itertools
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_gkc.file_checksums import DamagedFileError

from ..storage.checksums import Each, file_sha256, read_checksummed_json, write_checksummed_json
from ..storage.shard_folder import ShardFolder
from .benchmarks.base import Benchmark
from .prepared import is_damaged
from .schema import NO_CLASS, dataset_features, encode_ids
from .sources import AnnotatedImage, check_classes, read_annotated

PROGRESS_FOLDER = ".unfinished"
_ROWS_PER_GROUP = 32  # number of rows in memory
_SECONDS_BETWEEN_LOOKS = 0.2
_REPORT = {
    "file": str,
    "images": int,
    "left_out": int,
    "problems": [str],
    "notes": [str],
    "segments": Each(int),
    "class_images": Each(int),
    "sha256": str,
}


@dataclass(frozen=True)
class ShardPlan:
    """Range of the images of a split that one shard contains."""

    number: int
    file: str
    start: int
    stop: int


@dataclass
class ShardReport:
    """Report on a written shard.

    Attributes:
        file: File name of the shard.
        images: Number of rows.
        left_out: Number of images that the rules of the benchmark exclude.
        problems: Unusable images, one line each.
        notes: Skipped annotations of other images, one line each.
        segments: Number of segments of each train id.
        class_images: Number of images with each train id.
        sha256: SHA-256 of the file as a hexadecimal string.
    """

    file: str
    images: int = 0
    left_out: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    segments: Counter[int] = field(default_factory=Counter)
    class_images: Counter[int] = field(default_factory=Counter)
    sha256: str = ""

    def add(self, segments: Sequence[dict[str, Any]]) -> None:
        """Count the segments of one more image."""
        classes = Counter(segment["category_id"] for segment in segments)
        del classes[NO_CLASS]
        self.images += 1
        self.segments.update(classes)
        self.class_images.update(classes.keys())


@dataclass(frozen=True)
class Work:
    """Images of a split, with the shards to write."""

    benchmark: Benchmark
    split: str
    images: Sequence[AnnotatedImage]
    num_classes: int
    out: Path
    plans: Sequence[ShardPlan]

    @property
    def shards(self) -> ShardFolder:
        """Shards of the split; finished ones have a `ShardReport`."""
        files = [plan.file for plan in self.plans]
        return ShardFolder(self.out, files, lambda number: finished_report(self.out, self.plans[number]))


def plan_shards(split: str, images: int, per_shard: int) -> list[ShardPlan]:
    """Divide the images of a split into shards."""
    number = max(1, -(-images // per_shard))
    starts = [index * per_shard for index in range(number)]
    return [
        ShardPlan(index, f"{split}-{index:05d}-of-{number:05d}.parquet", start, min(images, start + per_shard))
        for index, start in enumerate(starts)
    ]


def finished_report(out: Path, plan: ShardPlan) -> ShardReport | None:
    """Return the report of a shard that an earlier run finished without problems, or None if either is invalid."""
    try:
        found = ShardReport(**read_checksummed_json(report_path(out, plan.file), _REPORT, ""))
    except DamagedFileError:
        return None
    if found.problems or is_damaged(out / plan.file, found.sha256):
        return None
    # JSON keys are strings.
    found.segments, found.class_images = (
        Counter({int(key): value for key, value in counts.items()}) for counts in (found.segments, found.class_images)
    )
    return found


def report_path(out: Path, file: str) -> Path:
    """Return the file of the report of a shard, which exists until its split is finished."""
    return out / PROGRESS_FOLDER / f"{file}.json"


def write_shards(
    work: Work, plans: Sequence[ShardPlan], num_proc: int, advance: Callable[[int], Any]
) -> list[ShardReport]:
    """Write shards in parallel, each with one process.

    Args:
        work: Images of the split.
        plans: Shards to write.
        num_proc: Number of processes. The output does not depend on it.
        advance: Progress callback that receives the number of newly processed images.

    Returns:
        The reports of the shards, in order.

    Raises:
        RuntimeError: If a worker process is killed.
    """
    (work.out / PROGRESS_FOLDER).mkdir(exist_ok=True)
    if num_proc <= 1 or len(plans) <= 1:
        return [_write_shard(work, plan, lambda: advance(1)) for plan in plans]
    # Forked processes share the list of images; spawned processes receive a copy.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "fork":  # imported once, before forking
        import modeling_gkc.image_processing_gkc  # noqa: F401
    context = multiprocessing.get_context(method)
    counter = context.Value("q", 0)
    processes = min(num_proc, len(plans))
    with ProcessPoolExecutor(processes, context, _start_process, (work, counter)) as pool:
        futures = [pool.submit(_write_in_process, plan) for plan in plans]
        try:
            reported, is_running = 0, True
            while is_running:
                done, running = wait(futures, _SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                is_running = bool(running) and not any(future.exception() for future in done)
                now = counter.value
                advance(now - reported)
                reported = now
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker process was killed, perhaps because memory ran out: repeat the command with a smaller "
                "--num-proc; it resumes after the finished shards."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_process: dict[str, Any] = {}


def _start_process(work: Work, counter: Any) -> None:
    _process["work"], _process["counter"] = work, counter
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Exit this process when its parent process is killed."""
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _write_in_process(plan: ShardPlan) -> ShardReport:
    def advance() -> None:
        with _process["counter"].get_lock():
            _process["counter"].value += 1

    return _write_shard(_process["work"], plan, advance)


def _write_shard(work: Work, plan: ShardPlan, advance: Callable[[], Any]) -> ShardReport:
    """Write a shard to a temporary file, then its report, then rename the shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    report, schema = ShardReport(plan.file), dataset_features().arrow_schema
    with work.shards.writing(plan.number) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="snappy", use_dictionary=False) as writer:
            rows = _rows(work, work.images[plan.start : plan.stop], report, advance)
            while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        report.sha256 = file_sha256(temporary)
        write_checksummed_json(report_path(work.out, plan.file), vars(report), sync=True)
    return report


def _rows(
    work: Work, images: Sequence[AnnotatedImage], report: ShardReport, advance: Callable[[], Any]
) -> Iterator[dict[str, Any]]:
    for image in images:
        try:
            row = make_row(work, image)
        except (OSError, ValueError, SyntaxError) as error:
            report.problems.append(problem_line(image, error))
        else:
            if row is None:
                report.left_out += 1
            else:
                report.add(row["segments"])
                report.notes += image.notes
                yield row
        advance()


def problem_line(image: AnnotatedImage, error: Exception) -> str:
    """Return the error of an image, beginning with the path of the faulty file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if image.problem or text.startswith(("/", str(image.path))) else f"{image.path}: {text}"


def make_row(work: Work, image: AnnotatedImage) -> dict[str, Any] | None:
    """Read an image as a row of `train.data.schema`, or return None if the rules of the benchmark exclude it.

    Raises:
        ValueError: If the image or its annotation is invalid.
        OSError: If a file cannot be read.
    """
    content, ids, segments = read_annotated(image)
    if not work.benchmark.keeps(work.split, segments):
        return None
    segments = work.benchmark.renumbered(segments)
    check_classes(image, segments, work.num_classes)
    return {
        "image": {"bytes": content, "path": image.path.name},
        "segmentation": {"bytes": _png(ids), "path": None},
        "segments": segments,
        "captions": list(image.captions),
        "image_id": image.image_id,
        "video_id": image.video_id,
        "frame": image.frame,
    }


def _png(ids: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(encode_ids(ids)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
