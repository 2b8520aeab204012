"""A new loss is one file and one section of the recipe, and checkpoints keep the names of earlier versions."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configuration import Recipe
from modeling_gkc.weight_renaming import CHECKPOINT_RENAMINGS, rename_weight
from train import losses as losses_package
from train.engine.checkpoints import MANIFEST_NAME
from train.engine.command import parse
from train.engine.optimization import parameter_groups
from train.engine.run import check_folder
from train.engine.trainer import HEADS_NAME, RECIPE_NAME, GKCTrainer
from train.losses.registry import loss_classes, make_losses
from train.teacher.region_teacher import RegionTeacher

from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor, toy_vision_model

GOLDEN = Path(__file__).parent / "golden" / "training_checkpoint_names.json"
# The file of the loss, as it would stand in train/losses.
LOSS = '''
"""A loss with everything that a loss can have: a head, draws, divisors and values of its own in the log."""

import torch
from torch import nn

from .base import TrainingLoss


class ScoreLoss(TrainingLoss):
    """Squared distance of a linear map of the class embedding to a number that is drawn for the region."""

    name = "score"

    def make_head(self, student):
        torch.manual_seed(self.recipe.run.seed)
        return nn.Linear(student.config.projection_dim, 1)

    def run_head(self, head, student, outputs):
        return tuple(head(stage.query_embeds)[..., 0] for stage in outputs.stages)

    def draw(self, batch, regions, generators):
        draws = [torch.rand(n, generator=own) for n, own in zip(regions.counts, generators, strict=True)]
        regions.prepared[self.name] = torch.cat(draws) * self.settings.largest

    def divisor_counts(self, regions):
        return [sum(regions.counts)]

    def __call__(self, outputs, batch, regions, matches, divisors):
        values = []
        for scores, of_stage in zip(outputs.heads[self.name], matches, strict=True):
            image, query, region = regions.pairs(of_stage, regions.kept)
            distances = scores[image, query] - regions.prepared[self.name][region]
            values.append(distances.square().sum() / divisors.losses[self.name][0])
        return {"loss_score": torch.stack(values)}

    def log_values(self, outputs, regions):
        return {"largest_target": regions.prepared[self.name].max()}
'''
# A recipe file with a section for it.
RECIPE = """
from dataclasses import dataclass, field

from configuration import Recipe
from configuration.sections import Section


@dataclass(frozen=True, kw_only=True)
class ScoreSection(Section):
    weight: float = 1.0
    largest: float = 1.0

    def check(self):
        self.require_numbers(("weight", "largest"))


@dataclass(frozen=True, kw_only=True)
class ScoreRecipe(Recipe):
    score: ScoreSection = field(default_factory=ScoreSection)


RECIPE = ScoreRecipe().replace(
    steps=4, batch_size=4, crop_size=64, train_num_points=64, max_grad_norm=1.0, learning_rate=3e-3
)
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(folder: Path, recipe: Recipe, **sizes) -> GKCTrainer:
    nouns = [["disc", "lawn"], [], ["block"], ["grass"]]
    dataset = toy_dataset(8).add_column("nouns", [nouns[index % 4] for index in range(8)])
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    return GKCTrainer(
        toy_model(**recipe.model_settings(), **sizes),
        recipe,
        recipe.to_training_arguments(folder, **settings),
        dataset,
        VOCABULARY,
        toy_processor(),
        RegionTeacher(toy_vision_model()).embed_dataset(dataset, progress=False),
    )


@pytest.fixture
def score_recipe(tmp_path, monkeypatch) -> str:
    """Write a loss module in another folder of the package, and return the path of a recipe that uses it."""
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "score.py").write_text(LOSS)
    monkeypatch.setattr(losses_package, "__path__", [*losses_package.__path__, str(tmp_path / "losses")])
    (tmp_path / "recipe.py").write_text(RECIPE)
    yield str(tmp_path / "recipe.py")
    sys.modules.pop("train.losses.score", None)


def test_a_new_loss_is_one_file_and_one_section(score_recipe, tmp_path):
    recipe = parse([score_recipe, "score.weight=3", "largest=0.5"]).recipe
    assert [loss.name for loss in make_losses(recipe)] == ["distillation", "score", "synonyms"]
    assert "score" not in [loss.name for loss in make_losses(recipe.replace({"score.weight": 0.0}))]
    with pytest.raises(ValueError, match=r"`score\.weight` must not be negative"):
        parse([score_recipe, "score.weight=-1"])
    trainer = make_trainer(tmp_path / "run", recipe, decoder_layers=1, encoder_layers=1)
    before = trainer.training_model.score_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.training_model.score_head.weight, before)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all(0 < log["loss_score"] < 10 and 0 < log["largest_target"] <= 0.5 for log in logs)
    assert "loss_score_auxiliary" in logs[0]
    heads = load_file(tmp_path / "run" / "checkpoint-2" / HEADS_NAME)
    assert {"score_head.weight", "score_head.bias", "distillation_head.scale"} <= heads.keys()
    resumed = make_trainer(tmp_path / "run", recipe, decoder_layers=1, encoder_layers=1)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed.train(resume_from_checkpoint=True)
    expected = trainer.training_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.training_model.state_dict().items())


def test_losses_of_the_paper_are_registered_by_their_files():
    assert [each.name for each in loss_classes()] == ["distillation", "grounding", "synonyms"]
    off = {"distillation.weight": 0.0, "synonyms.mode": "none"}
    assert make_losses(Recipe().replace(off)) == []
    assert [loss.name for loss in make_losses(Recipe().replace({**off, "grounding.weight": 1.0}))] == ["grounding"]


def test_trainer_code_names_no_loss():
    """Neither the trainer nor the model, criterion and region sampling; a section of the recipe is named nowhere."""
    root = Path(losses_package.__file__).parent.parent
    files = ("engine/trainer.py", "engine/model.py", "losses/criterion.py", "losses/region_sampling.py")
    for file in files:
        text = (root / file).read_text()
        for each in loss_classes():
            assert f".{each.name}" not in text and f'"{each.name}"' not in text, f"{file} names {each.name}"


def test_arguments_that_no_loss_takes_are_refused(tmp_path):
    recipe = Recipe().replace(distillation_weight=0.0)
    model, args = toy_model(**recipe.model_settings()), recipe.to_training_arguments(tmp_path)
    with pytest.raises(TypeError, match="no argument noun_banc; losses take name_probabilities, noun_bank"):
        GKCTrainer(model, recipe, args, [], VOCABULARY, toy_processor(), noun_banc=None)


def renamed(name: str) -> str:
    """Return today's name of a parameter of the training model, whose student's classifier was renamed."""
    prefix, _, rest = name.partition("student.")
    new = rename_weight(rest, CHECKPOINT_RENAMINGS) if rest else None
    return f"{prefix}student.{new}" if new else name


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """With the names of heads, the order of parameters in the optimizer, and the flat recipe that it had."""
    old = json.loads(GOLDEN.read_text())
    recipe = Recipe.from_dict(old["recipe"])
    undisturbed = make_trainer(tmp_path / "run", recipe)
    names = {id(parameter): name for name, parameter in undisturbed.model.named_parameters()}
    groups = parameter_groups(undisturbed.model, undisturbed.args, recipe)
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert found == [[renamed(name) for name in group] for group in old["parameter_groups"]]
    undisturbed.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert load_file(checkpoint / HEADS_NAME).keys() == {*old["heads"]}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (checkpoint / RECIPE_NAME).write_text(json.dumps(old["recipe"]))
    manifest = checkpoint / MANIFEST_NAME
    manifest.unlink()
    # The first form of manifest, of sizes alone.
    manifest.write_text(json.dumps({"files": {path.name: path.stat().st_size for path in checkpoint.iterdir()}}))
    with pytest.raises(ValueError, match=r"was trained with distillation\.heads per_stage and now common"):
        check_folder(tmp_path / "run", recipe.replace(distillation_heads="common"), resume=True)
    assert check_folder(tmp_path / "run", recipe, resume=True) == checkpoint
    resumed = make_trainer(tmp_path / "run", recipe)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = undisturbed.training_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.training_model.state_dict().items())
