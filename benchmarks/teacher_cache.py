# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Measure disk, memory and time of a teacher cache as large as COCO's and print a Markdown table. Linux only.

    python benchmarks/teacher_cache.py --folder /data/try                   # needs 3.3 GB of disk space temporarily
    python benchmarks/teacher_cache.py --folder /data/try --images 2000

The embeddings are random numbers. The cache is deleted at the end. The last column is the growth of the process's
resident memory over the look-ups of all batches after the first.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from modeling_gkc.cli.common import positive

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import memory_mb
from train.storage.shards import StoreSettings, StoreWriter
from train.teacher.region_teacher import TeacherCache

FINGERPRINT = {"data": "synthetic"}


def write(folder: Path, settings: StoreSettings, counts: np.ndarray) -> None:
    """Write a cache of random embeddings."""
    generator = np.random.default_rng(1)
    writer = StoreWriter(folder, settings)
    writer.begin()
    for shard in range(settings.num_shards):
        images = settings.images_of(shard)
        of_shard = counts[images.start : images.stop]
        rows = generator.standard_normal((int(of_shard.sum()), settings.columns), dtype=np.float32)
        segment_ids = np.concatenate([np.arange(1, count + 1) for count in of_shard])
        writer.write(shard, [f"{image:012d}" for image in images], of_shard.tolist(), segment_ids, rows)
    writer.finish()


def look_up(store: TeacherCache, counts: np.ndarray, batch: int, batches: int) -> tuple[float, float]:
    """Look up random batches of images.

    Args:
        store: Cache to read.
        counts: Number of regions of each image.
        batch: Number of images per look-up.
        batches: Number of timed look-ups.

    Returns:
        The median seconds of a look-up and the growth of resident memory in MB over all of them.
    """
    generator = np.random.default_rng(2)
    seconds, before = [], 0.0
    for _ in range(batches + 1):
        images = generator.choice(len(counts), batch, replace=False)
        image_ids = [f"{image:012d}" for image in images]
        segment_ids = [torch.arange(int(counts[image]), 0, -1) for image in images]
        start = time.perf_counter()
        store.lookup(image_ids, segment_ids)
        seconds.append(time.perf_counter() - start)
        before = before or memory_mb("VmRSS")
    return float(np.median(seconds[1:])), memory_mb("VmRSS") - before


def main() -> None:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the cache")
    parser.add_argument("--images", type=positive, default=118_287, help="number of images (default: %(default)s)")
    parser.add_argument("--regions", type=float, default=12.69, help="mean regions per image (default: %(default)s)")
    parser.add_argument("--columns", type=positive, default=1024, help="embedding dimension (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=112, help="images per look-up (default: %(default)s)")
    parser.add_argument(
        "--batches", type=positive, default=500, help="number of timed look-ups (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder {options.folder} already exists: name a new folder")
    counts = np.random.default_rng(0).poisson(options.regions, options.images)
    settings = StoreSettings("teacher", FINGERPRINT, options.columns, options.images)
    try:
        start = time.perf_counter()
        write(options.folder, settings, counts)
        writing = time.perf_counter() - start
        disk = sum(path.stat().st_size for path in options.folder.iterdir()) / 1e9
        start, before = time.perf_counter(), memory_mb("VmRSS")
        store = TeacherCache.open(options.folder, FINGERPRINT)
        opening, opened = time.perf_counter() - start, memory_mb("VmRSS") - before
        seconds, growth = look_up(store, counts, options.batch, options.batches)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    sys.stdout.write(
        "| images | regions | disk GB | writing s | opening s, MB | batch size | look-up ms | batches | growth MB |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        f"| {options.images} | {counts.sum()} | {disk:.2f} | {writing:.0f} | {opening:.2f}, {opened:.1f} | "
        f"{options.batch} | {1000 * seconds:.0f} | {options.batches} | {growth:.1f} |\n"
    )


if __name__ == "__main__":
    main()
