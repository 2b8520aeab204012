"""Reading data for hours takes no more memory than reading it for a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.data import AugmentedDataset, JointTransform, SegmentationCollator, StreamingDataset

from .processes import forked
from .training_toys import toy_dataset, toy_processor

WARM_UP, BATCHES, BATCH_SIZE = 100, 500, 2
BOUND_MB = 8
KINDS = ("random access", "streaming")


def own_memory_mb(process: int) -> float:
    """Memory of a process that is its own, not shared with others or of a mapped file."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def own_memory_of_all(iterator) -> dict[str, float]:
    workers = {f"worker {worker.pid}": own_memory_mb(worker.pid) for worker in iterator._workers}
    return {"main process": own_memory_mb(os.getpid())} | workers


def grown_mb(streaming: bool) -> dict[str, float]:
    """Return the memory growth of the main process and two workers after the warm-up."""
    rows = (WARM_UP + BATCHES + 20) * BATCH_SIZE
    small = toy_dataset(4, size=32)
    dataset = small.select([index % 4 for index in range(rows)])
    transform = JointTransform(crop_size=32, scale_range=(0.1, 2.0))
    source = (
        StreamingDataset(dataset, transform, seed=0) if streaming else AugmentedDataset(dataset, transform, seed=0)
    )
    if streaming:
        source.share(0, 1, workers=2, batch_size=BATCH_SIZE)
    loader = torch.utils.data.DataLoader(
        source, BATCH_SIZE, num_workers=2, collate_fn=SegmentationCollator(toy_processor().image_processor, 3)
    )
    iterator = iter(loader)
    for _ in range(WARM_UP):
        next(iterator)
    before = own_memory_of_all(iterator)
    for _ in range(BATCHES):
        next(iterator)
    after = own_memory_of_all(iterator)
    return {process: megabytes - before[process] for process, megabytes in after.items()}


@pytest.fixture(scope="module")
def grown() -> dict[str, dict[str, float]]:
    """In a process of its own: what earlier tests left behind would be shared with the workers, and then no more."""
    command = [sys.executable, "-m", "tests.test_data_memory"]
    root = Path(__file__).parent.parent
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return dict(map(json.loads, finished.stdout.splitlines()))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_batches(grown, kind, within):
    assert len(grown[kind]) == 3
    for process, megabytes in grown[kind].items():
        within(f"memory grown over {BATCHES} batches, MB, {kind}, {process.split()[0]}", megabytes, BOUND_MB)


def print_grown(kind: str) -> None:
    print(json.dumps([kind, grown_mb(kind == "streaming")]), flush=True)  # noqa: T201


def main() -> None:
    """Print what memory grows by; each kind is forked, so that none finds what another left behind."""
    for kind in KINDS:
        assert forked(lambda kind=kind: print_grown(kind)) == 0


if __name__ == "__main__":
    main()
