"""The whole path at toy size: world -> tiny CLIP -> gate -> segmenter by arm -> scores -> published checkpoint."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configuration import load_recipe
from hub_card.publish_mini import GROUP_NAMES, card, publish
from modeling_gkc import GKCForOpenVocabSegmentation, GKCProcessor
from train.miniworld import clip as clip_module
from train.miniworld.clip import CLIPTraining
from train.miniworld.experiment import Experiment, _write, format_results, run

ROOT = Path(__file__).parent.parent
ARMS = ("baseline", "both")


def toy(out: Path, **changes) -> Experiment:
    recipe = load_recipe("miniworld", steps=6, batch_size=4, train_num_points=64)
    values = {
        "train_scenes": 12,
        "test_scenes": 6,
        "clip": CLIPTraining(steps=4, scenes=12, batch_size=16),
        "recipe": recipe,
        "arms": ARMS,
    }
    return Experiment(out, **(values | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Experiment, dict]:
    torch.manual_seed(0)
    experiment = toy(tmp_path_factory.mktemp("experiment"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "OTHER_WORLD_PICTURES", 4)  # drawing 600 of each kind would take most of the time
        return experiment, run(experiment)


def test_results_hold_every_vocabulary_and_arm(finished):
    experiment, results = finished
    assert set(results["arms"]) == set(ARMS)
    for scores in results["arms"].values():
        assert set(GROUP_NAMES) <= set(scores["scores"])
        assert scores["images"] == 6
        mious = [values["miou"] for values in scores["scores"].values()]
        assert all(miou is None or 0 <= miou <= 1 for miou in mious)
    assert results["gate"]["rows"].keys() >= {"coarse", "colour", "fill", "sub", "void"}
    assert json.loads((experiment.out / "results.json").read_text())["minutes"].keys() >= {"clip", "teacher", *ARMS}
    table = format_results(results)
    assert "baseline" in table and "seen by 5th word" in table


def test_arms_share_everything_but_the_losses(finished):
    experiment, _ = finished
    baseline, both = (
        GKCForOpenVocabSegmentation.from_pretrained(experiment.out / arm / "model").state_dict() for arm in ARMS
    )
    assert baseline.keys() == both.keys()
    frozen = [name for name in both if name.startswith("text_model")]
    assert frozen and all(torch.equal(baseline[name], both[name]) for name in frozen)
    assert any(not torch.equal(baseline[name], both[name]) for name in both)
    assert not any("distillation" in name for name in both)


def test_a_second_run_does_nothing(finished):
    experiment, results = finished
    files = {path: path.stat().st_mtime_ns for path in experiment.out.rglob("*.safetensors")}
    again = run(experiment)
    assert again["arms"] == results["arms"]
    assert {path: path.stat().st_mtime_ns for path in experiment.out.rglob("*.safetensors")} == files


def test_other_settings_in_the_same_folder_are_refused(finished):
    experiment, _ = finished
    with pytest.raises(ValueError, match="other settings of train_scenes"):
        run(replace(experiment, train_scenes=13))
    with pytest.raises(ValueError, match="nonsense"):
        replace(experiment, arms=("nonsense",))


def test_publishing_writes_a_checkpoint_and_its_card(finished, tmp_path):
    experiment, results = finished
    publish(experiment.out, tmp_path / "gkc-mini")
    model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "gkc-mini")
    GKCProcessor.from_pretrained(tmp_path / "gkc-mini")
    assert len(model.config.id2label) == 18
    card = (tmp_path / "gkc-mini" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0")
    assert "nothing of photographs" in card and "<<" not in card
    assert f"{100 * results['arms']['both']['scores']['colour']['miou']:.1f}" in card
    assert "circle: disc, dot" in card


def test_what_was_not_measured_is_null_in_files_and_a_dash_in_tables(finished, tmp_path):
    experiment, results = finished
    for path in (experiment.out / "results.json", *(experiment.out / arm / "scores.json" for arm in ARMS)):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # called for NaN and infinity only
    results = json.loads(json.dumps(results, allow_nan=False))
    for scores in results["arms"].values():
        scores["scores"]["void"] = {"miou": None, "region_accuracy": None}
        scores["harmonic_mean"] = None
    results["gate"]["rows"]["void"] = {"accuracy": None, "collapse": None, "regions": 0}
    table = format_results(results)
    assert "| void | - | - |" in table and "seen and novel | - | - |" in table
    settings = json.loads((experiment.out / "settings.json").read_text())
    text = card(results, settings, "both", {"vocabulary": [["circle", "disc"]]})
    assert f"| {GROUP_NAMES['void']} | - | - |" in text and "last two | - | - |" in text
    assert "| void | - | - |" in text
    with pytest.raises(ValueError, match="JSON"):
        _write(tmp_path / "scores.json", {"miou": float("nan")})


def test_publishing_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished experiment"):
        publish(tmp_path)


HELP = """
import runpy, sys
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print(f"{module} ended with {end.code}")
"""


def test_help_teaches():
    # One process for all three: the imports take seconds.
    modules = ["hub_card.publish_mini", "train.miniworld", "train.miniworld.clip"]
    finished = subprocess.run(
        [sys.executable, "-c", HELP, *modules], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rest = finished.stdout
    for module in modules:
        text, ended, rest = rest.partition(f"{module} ended with 0\n")
        assert ended and f"python -m {module}" in text
    assert not rest
