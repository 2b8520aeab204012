"""End-to-end test with the commands alone: prepare a benchmark, train, evaluate and report."""

import json
from pathlib import Path

from train.data import prepare
from train.data.benchmarks import miniworld
from train.engine.main import main as train
from train.evaluate.command import main as evaluate

ROOT = Path(__file__).parent.parent


def test_benchmark_is_prepared_trained_evaluated_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    world, learned, asked, model = (str(tmp_path / name) for name in ("world", "learned", "asked", "model"))
    assert miniworld.main(["--out", world, "--train-scenes", "6", "--val-scenes", "3"]) == 0
    assert prepare.main(["miniworld_train", "--source", world, "--out", learned]) == 0
    assert prepare.main(["miniworld", "--source", world, "--out", asked, "--split", "val"]) == 0

    changes = ["steps=2", "batch_size=2", "num_workers=0", "log_every=1", "save_every=2", "evaluate_every=2"]
    assert train(["custom", f"dataset={learned}", *changes, "--out", model]) == 0

    results = [str(tmp_path / f"{name}.json") for name in ("trained", "shipped")]
    for name, result in zip((model, "hub_card/gkc-mini"), results, strict=True):
        assert evaluate(["--model", name, "--benchmark", "miniworld", "--data", asked, "--out", result, "--cpu"]) == 0
    trained, shipped = (json.loads(Path(result).read_text()) for result in results)
    assert trained["images"]["evaluated"] == shipped["images"]["evaluated"] == 3
    assert trained["model"]["sha256"] != shipped["model"]["sha256"] and trained["scores"] != shipped["scores"]
    # Two steps from the shipped weights hardly change the model, whose scores are far above those of random weights.
    assert abs(trained["scores"]["semantic"]["miou"] - shipped["scores"]["semantic"]["miou"]) < 0.15
    assert shipped["scores"]["semantic"]["miou"] > 0.15

    capsys.readouterr()
    assert evaluate(["report", *results]) == 0
    table = capsys.readouterr().out
    for result in (trained, shipped):
        assert f"{result['per_cent']['semantic']['miou']:.1f}" in table
    assert "GKC, CLIP R-50" not in table  # has no scores of the mini-world
