"""Tests of the metrics as modules of the `evaluate` library, loaded from local paths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.metrics import (
    BoundaryMetric,
    InstanceMetric,
    PanopticMetric,
    SemanticMetric,
    TrackingQualityMetric,
    VideoConsistencyMetric,
    VideoPanopticMetric,
)

ROOT = Path(__file__).parents[1]
MODULES = ROOT / "train" / "metrics" / "modules"
LOADED = """
import json, sys

sys.modules["transformers"] = None  # only the pipelines of `evaluate` need it, and it is slow to import
import evaluate
import numpy as np

examples = dict(np.load(sys.argv[1]))
segments = json.loads(sys.argv[2])
scores = {}


def score(name, example, **options):
    module = evaluate.load(f"train/metrics/modules/{name}", **options)
    module.add(prediction=example[0], reference=example[1])
    assert len(module) == 1
    first = module.compute()
    assert len(module) == 0  # the module is reset
    second = module.compute(predictions=[example[0]], references=[example[1]])
    assert first == second and module.features.keys() == {"predictions", "references"}
    scores[name] = first


maps = examples["found"], examples["truth"]
frames = tuple({"ids": ids[0].tolist(), "segments": segments} for ids in maps)
videos = tuple({"ids": ids, "segments": [segments] * len(ids)} for ids in maps)
kinds = [True, True, False]
score("mean_iou", (maps[0][0] - 1, maps[1][0] - 1), num_classes=3)
score("boundary_iou", (maps[0][0].tolist(), maps[1][0].tolist()), num_classes=4)
score("panoptic_quality", frames, is_thing=kinds)
detections = [{"category_id": s["category_id"], "score": 0.5, "mask": maps[0][0] == s["id"]} for s in segments]
score("instance_ap", (detections, {"image_id": "a", **frames[1]}), num_classes=3)
score("video_panoptic_quality", videos, is_thing=kinds)
score("tracking_quality", videos, is_thing=kinds)
score("video_consistency", maps)
try:
    evaluate.load("train/metrics/modules/mean_iou", num_classes=3, num_process=2)
except ValueError as error:
    scores["num_process"] = str(error)
print("SCORES" + json.dumps(scores))
"""


@pytest.fixture(scope="module")
def example():
    draw = np.random.default_rng(0)
    truth = np.repeat(np.kron(draw.integers(0, 4, (1, 3, 3)), np.ones((1, 4, 4), int)), 9, axis=0)
    found = np.where(draw.random(truth.shape) < 0.02, 1, truth)
    return found, truth, [{"id": name, "category_id": name - 1, "iscrowd": False} for name in (1, 2, 3)]


@pytest.fixture(scope="module")
def loaded(example, tmp_path_factory):
    folder, (found, truth, segments) = tmp_path_factory.mktemp("evaluate"), example
    np.savez(folder / "maps.npz", found=found, truth=truth)
    offline = {"HF_HOME": str(folder), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(folder / "maps.npz"), json.dumps(segments)],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("SCORES")[2])


def as_json(scores):
    return json.loads(json.dumps(scores))


def test_modules_match_the_metric_classes(example, loaded):
    found, truth, segments = example
    kinds = [True, True, False]
    semantic, boundary, panoptic = SemanticMetric(3), BoundaryMetric(4), PanopticMetric(kinds)
    semantic.update(found[0] - 1, truth[0] - 1)
    boundary.update(found[0], truth[0])
    panoptic.update(found[0], segments, truth[0], segments)
    instance = InstanceMetric(3)
    detections = [{"category_id": s["category_id"], "score": 0.5, "mask": found[0] == s["id"]} for s in segments]
    instance.update("a", detections, truth[0], segments)
    frames = [(ids, segments, truth_ids, segments) for ids, truth_ids in zip(found, truth, strict=True)]
    video, tracking, consistency = VideoPanopticMetric(kinds), TrackingQualityMetric(kinds), VideoConsistencyMetric()
    video.update(frames)
    tracking.update(frames)
    consistency.update(found, truth)
    expected = {
        "mean_iou": semantic,
        "boundary_iou": boundary,
        "panoptic_quality": panoptic,
        "instance_ap": instance,
        "video_panoptic_quality": video,
        "tracking_quality": tracking,
        "video_consistency": consistency,
    }
    assert expected.keys() == {path.name for path in MODULES.iterdir() if path.is_dir() and path.name[0] != "_"}
    for name, metric in expected.items():
        assert loaded[name] == as_json(metric.compute()), name
    assert 0 < loaded["mean_iou"]["miou"] < 1 and 0 < loaded["video_consistency"]["mVC8"] < 1


def test_modules_reject_several_processes(loaded):
    assert "create a `SemanticMetric` of train.metrics in every process" in loaded["num_process"]
