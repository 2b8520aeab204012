"""Tests that metrics merged from two processes equal those of one process, in either order."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train import metrics as package

ROOT = Path(__file__).parents[1]
SCORING = """
import sys
import numpy as np
from train import metrics as package

IS_THING = [True, True, False]


def make():
    return [
        package.SemanticMetric(3),
        package.BoundaryMetric(3),
        package.PanopticMetric(IS_THING),
        package.InstanceMetric(3),
        package.VideoPanopticMetric(IS_THING),
        package.TrackingQualityMetric(IS_THING),
        package.VideoConsistencyMetric((2, 4)),
    ]


def score(metrics, video):
    draw = np.random.default_rng(video)
    truth = np.repeat(draw.integers(0, 4, (1, 9, 11)), 6, axis=0)
    truth = np.where(draw.random(truth.shape) < 0.1, 3, truth)
    found = np.where(draw.random(truth.shape) < 0.2, draw.integers(0, 4, truth.shape), truth)
    segments = [{"id": name, "category_id": name - 1, "iscrowd": False} for name in (1, 2, 3)]
    semantic, boundary, panoptic, instance, *video_metrics = metrics
    for time, (ids, truth_ids) in enumerate(zip(found, truth)):
        semantic.update(ids - 1, truth_ids - 1)
        boundary.update(ids - 1, truth_ids - 1)
        panoptic.update(ids, segments, truth_ids, segments)
        masks = [{"category_id": n - 1, "score": draw.random(), "mask": ids == n} for n in (1, 2, 3)]
        instance.update(f"{video} {time}", masks, truth_ids, segments)
    frames = [(ids, segments, truth_ids, segments) for ids, truth_ids in zip(found, truth)]
    video_metrics[0].update(frames)
    video_metrics[1].update(frames)
    video_metrics[2].update(found - 1, truth - 1)


def main(folder, *videos):
    metrics = make()
    for video in videos:
        score(metrics, int(video))
    for metric in metrics:
        np.savez(f"{folder}/{type(metric).__name__}.npz", **metric.state())
    assert "torch" not in sys.modules  # the metrics need numpy only


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    script = tmp_path_factory.mktemp("processes") / "scoring.py"
    script.write_text(SCORING)
    parts = {"all": range(5), "first": [3, 0], "second": [4, 1, 2]}
    running = []
    for name, videos in parts.items():
        (script.parent / name).mkdir()
        command = [sys.executable, str(script), str(script.parent / name), *map(str, videos)]
        running.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT))
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    return script.parent


@pytest.mark.parametrize("name", [name for name in package.__all__ if name.endswith("Metric")])
def test_two_processes_match_one_process_exactly(name, folders):
    metric_class = getattr(package, name)

    def merged(*parts):
        metrics = []
        for part in parts:
            with np.load(folders / part / f"{name}.npz") as state:
                metrics.append(metric_class.from_state(state))
        for other in metrics[1:]:
            metrics[0].merge(other)
        return metrics[0]

    alone = merged("all")
    for order in (("first", "second"), ("second", "first")):
        both = merged(*order)
        assert both.compute() == alone.compute()
        assert all(both.state()[key].tobytes() == array.tobytes() for key, array in alone.state().items())
    assert merged("first").compute() != alone.compute()
