"""The experiment at toy size: world, tiny CLIP, gate, warm-up, a segmenter for each ablation, scores, publishing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file

from configuration import load_recipe
from hub_card.publish_mini import PAGE, publish, update_page
from modeling_gkc import GKCForOpenVocabSegmentation, GKCProcessor
from train.miniworld import clip as clip_module
from train.miniworld import zero_shot
from train.miniworld.experiment import WARM_UP, _write, run
from train.miniworld.settings import ABLATIONS, CLIPTraining, Experiment
from train.miniworld.summary import (
    HARMONIC_MEAN,
    ROW_TITLES,
    TABLE_TITLES,
    TEACHER_COSINE,
    by_seed,
    mean_and_spread,
    read_seeds,
    score_table,
    tables,
    write_summary,
)

ROOT = Path(__file__).parent.parent
TRAINED = ("baseline", "both", "both-query", "distillation-own-head", "distillation-own-head-both")


def toy(out: Path, **changes) -> Experiment:
    recipe = load_recipe("miniworld", steps=4, batch_size=4, train_num_points=64)
    values = {
        "train_scenes": 12,
        "test_scenes": 6,
        "clip": CLIPTraining(steps=4, scenes=12, batch_size=16),
        "recipe": recipe,
        "warmup_steps": 3,
        "ablations": TRAINED,
    }
    return Experiment(out / "seed-0", **(values | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Experiment, dict]:
    torch.manual_seed(0)
    experiment = toy(tmp_path_factory.mktemp("experiment"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "OTHER_WORLD_PICTURES", 4)  # drawing 600 of each kind would take most of the time
        results = run(experiment)
    write_summary(experiment.out.parent, read_seeds(experiment.out.parent))
    return experiment, results


def test_results_contain_every_vocabulary_and_ablation(finished):
    experiment, results = finished
    assert set(results["arms"]) == set(TRAINED) <= set(ABLATIONS)
    for scores in results["arms"].values():
        assert set(ROW_TITLES) == set(scores["scores"]) | {HARMONIC_MEAN, TEACHER_COSINE}
        assert scores["images"] == 6 and -1 <= scores["teacher_cosine"] <= 1
        mious = [values["miou"] for values in scores["scores"].values()]
        assert all(miou is None or 0 <= miou <= 1 for miou in mious)
    assert results["gate"]["rows"].keys() >= {"coarse", "colour", "fill", "sub", "void"}
    trained = {"clip", "teacher", WARM_UP, *TRAINED} - {"distillation-own-head-both"}
    assert json.loads((experiment.out / "results.json").read_text())["minutes"].keys() >= trained


def test_ablations_differ_in_their_losses_only(finished):
    experiment, _ = finished
    baseline, both = (
        GKCForOpenVocabSegmentation.from_pretrained(experiment.out / ablation / "model").state_dict()
        for ablation in ("baseline", "both")
    )
    assert baseline.keys() == both.keys()
    frozen = [name for name in both if name.startswith("text_model")]
    assert frozen and all(torch.equal(baseline[name], both[name]) for name in frozen)
    assert any(not torch.equal(baseline[name], both[name]) for name in both)
    assert not any("distillation" in name for name in both)


def test_ablations_start_from_class_agnostic_warm_up_weights(finished):
    experiment, _ = finished
    warm_up = load_file(experiment.out / WARM_UP / "model.safetensors")
    # A decoder bias starts at zero, so what an ablation has is what the warm-up gave it and what it added itself.
    name = "model.mask_decoder.layers.0.self_attn.q_proj.weight"
    ablations = [
        load_file(experiment.out / ablation / "model" / "model.safetensors")[name] for ablation in ("baseline", "both")
    ]
    moved = [(ablation - warm_up[name]).abs().max() for ablation in ablations]
    assert all(0 < distance < 0.02 for distance in moved)  # four steps of 1e-3; initial weights differ by about 0.2
    config = json.loads((experiment.out / "both-query" / "model" / "config.json").read_text())
    assert config["class_feature"] == "query"


def test_ablation_of_testing_only_has_the_same_weights(finished):
    experiment, results = finished
    names = ("distillation-own-head", "distillation-own-head-both")
    first, second = (load_file(experiment.out / name / "model" / "model.safetensors") for name in names)
    assert all(torch.equal(first[name], second[name]) for name in first)
    cosines = [
        results["arms"][name]["teacher_cosine"] for name in ("distillation-own-head", "distillation-own-head-both")
    ]
    assert cosines[1] > cosines[0]  # only the head's own embedding was drawn to the teacher's


def test_a_second_run_does_nothing(finished):
    experiment, results = finished
    files = {path: path.stat().st_mtime_ns for path in experiment.out.rglob("*.safetensors")}
    again = run(experiment)
    assert again["arms"] == results["arms"]
    assert {path: path.stat().st_mtime_ns for path in experiment.out.rglob("*.safetensors")} == files


def test_other_settings_in_the_same_folder_are_rejected(finished):
    experiment, _ = finished
    with pytest.raises(ValueError, match=r"results of other settings \(train_scenes\)"):
        run(replace(experiment, train_scenes=13))
    with pytest.raises(ValueError, match="nonsense"):
        replace(experiment, ablations=("nonsense",))


def test_publishing_writes_a_checkpoint_its_card_and_the_page(finished, tmp_path):
    experiment, results = finished
    publish(experiment.out.parent, tmp_path / "gkc-mini")
    model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "gkc-mini")
    GKCProcessor.from_pretrained(tmp_path / "gkc-mini")
    assert len(model.config.id2label) == 18
    card = (tmp_path / "gkc-mini" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0")
    assert "It cannot segment photographs" in card and "<<" not in card
    assert f"{100 * results['arms']['both']['scores']['colour']['miou']:.1f}" in card
    assert "circle: disc, dot" in card
    (tmp_path / "page.md").write_text(PAGE.read_text())
    for _ in range(2):  # the second time replaces tables by the same tables
        update_page(experiment.out.parent, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    found = tables({0: results})
    assert set(found) == set(TABLE_TITLES)
    for name, table in found.items():
        assert page.count(f"<!-- table {name} -->\n{table}\n<!-- end -->") == 1, name
    assert Image.open(tmp_path / "page.png").width > 1000


def test_publishing_an_ablation_that_was_not_run_is_rejected(finished, tmp_path):
    with pytest.raises(ValueError, match="seed-7/both/model does not exist"):
        publish(finished[0].out.parent, tmp_path / "gkc-mini", seed=7)
    assert not (tmp_path / "gkc-mini").exists()


def test_tables_give_mean_spread_and_every_seed(finished):
    _, results = finished
    other = json.loads(json.dumps(results))
    del other["arms"]["both-query"]
    for scores in other["arms"].values():
        scores["scores"]["seen"]["miou"] = 0.5
    first = 100 * results["arms"]["both"]["scores"]["seen"]["miou"]
    seeds = {0: results, 3: other}
    line = next(line for line in tables(seeds)["scores"].splitlines() if line.startswith(f"| {ROW_TITLES['seen']} |"))
    assert line.endswith(f" {mean([first, 50]):.1f} ± {stdev([first, 50]):.1f} |")
    line = next(line for line in tables(seeds)["scores_by_seed"].splitlines() if ROW_TITLES["seen"] in line)
    assert line.endswith(f" {first:.1f} / 50.0 |")
    assert mean_and_spread([0.25]) == "25.0" and mean_and_spread([None, None]) == "-"
    assert by_seed([0.1, None]) == "10.0 / -"
    assert score_table(seeds, ["synonyms-max"]) == ""


def test_missing_scores_are_null_in_files_and_dashes_in_tables(finished, tmp_path):
    experiment, results = finished
    for path in (
        experiment.out / "results.json",
        *(experiment.out / ablation / "scores.json" for ablation in TRAINED),
    ):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # called for NaN and infinity only
    results = json.loads(json.dumps(results, allow_nan=False))
    for scores in results["arms"].values():
        scores["scores"]["void"] = {"miou": None, "region_accuracy": None}
        scores["harmonic_mean"] = None
    results["gate"]["rows"]["void"] = {"accuracy": None, "collapse": None, "regions": 0}
    found = tables({0: results})
    assert f"| {ROW_TITLES['void']} | - | - |" in found["scores"]
    assert f"| {ROW_TITLES[HARMONIC_MEAN]} | - | - |" in found["scores"]
    assert "| void | - | - |" in found["gate"]
    with pytest.raises(ValueError, match="JSON"):
        _write(tmp_path / "scores.json", {"miou": float("nan")})


def test_publishing_an_unfinished_run_is_rejected(tmp_path):
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


def test_help_describes_the_command():
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


def test_opened_segmenters_are_compared_with_trained_ones(finished, capsys):
    experiment, results = finished
    run_folder = experiment.out.parent
    assert zero_shot.main([str(run_folder)]) == 0
    printed = capsys.readouterr().out.strip()
    scores = json.loads((experiment.out / zero_shot.NAME).read_text())
    assert list(scores) == [*zero_shot.REGION_WEIGHTS, *zero_shot.TRAINED.values()]
    assert all(set(zero_shot.ROWS) <= set(groups) for groups in scores.values())
    for name, title in zero_shot.TRAINED.items():
        assert scores[title]["seen"] == results["arms"][name]["scores"]["seen"]["miou"]
    assert printed == (run_folder / zero_shot.TABLE).read_text().strip() == zero_shot.table({0: scores})
    written = (experiment.out / zero_shot.NAME).stat().st_mtime_ns
    assert zero_shot.main([str(run_folder)]) == 0
    assert (experiment.out / zero_shot.NAME).stat().st_mtime_ns == written, "finished seeds are not scored again"


def test_opened_segmenter_has_the_baselines_scores_for_the_training_labels(finished):
    """With the training labels as words, the segmenter's own scores are those of the baseline."""
    experiment, results = finished
    model, processor = zero_shot.opened_model(experiment.out)
    dataset = load_from_disk(str(experiment.out / "data" / "test"))
    scores = zero_shot.score_opened(model, processor, dataset, show_progress=False)
    expected = results["arms"]["baseline"]["scores"]["seen"]["miou"]
    assert scores["segmenter"]["seen"] == pytest.approx(expected, abs=0.002)
    assert scores["regions"]["seen"] != scores["segmenter"]["seen"]


def test_missing_runs_are_one_line(tmp_path, capsys):
    assert zero_shot.main([str(tmp_path)]) == 2
    assert "has no finished seed" in capsys.readouterr().err
