import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from configuration import Recipe, load_recipe, recipe
from modeling_gkc.configuration_gkc import GKCConfig
from train import distillation, text_diversification

RECIPES = ("coco_clip_r50", "coco_r101", "miniworld")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_configuration_and_arguments(name, tmp_path):
    recipe = load_recipe(name)
    config = GKCConfig(**recipe.model_settings())
    assert config.class_weight == recipe.class_weight
    args = recipe.to_training_arguments(tmp_path, bf16=False)
    assert args.max_steps == recipe.steps and args.per_device_train_batch_size == recipe.batch_size
    assert args.max_grad_norm == recipe.max_grad_norm and args.seed == recipe.seed
    assert not args.remove_unused_columns
    json.dumps(asdict(recipe))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_command_hardware_and_expectation(name):
    module = __import__(f"configuration.recipes.{name}", fromlist=["RECIPE"])
    for word in ("Command:", "Hardware:", "Expect:"):
        assert word in module.__doc__


def test_published_settings():
    r50, r101 = load_recipe("coco_clip_r50"), load_recipe("coco_r101")
    assert (r50.steps, r50.batch_size, r101.batch_size) == (50_000, 112, 56)
    assert (r50.learning_rate, r50.backbone_factor, r50.weight_decay, r50.max_grad_norm) == (3e-4, 0.1, 0.05, 0.01)
    assert [round(share * r50.steps) for share in r50.milestones] == [40_000, 45_000]
    assert (r50.class_weight, r101.class_weight) == (2, 10)
    assert (r50.distillation_weight, r50.synonym_weight, r50.no_object_weight) == (10, 10, 0.1)
    assert (r50.train_num_points, r50.oversample_ratio, r50.importance_sample_ratio) == (12544, 3, 0.75)
    assert r50.distillation_max_regions == 200
    for row in (r50, r101):
        assert row.precision == "bf16"
        assert (row.synonym_mode, row.synonym_probabilities) == ("sample", "teacher")
        assert (row.synonym_threshold, row.synonym_logit_scale) == (0.1, 100)
        assert (row.distillation_embedding, row.distillation_terms) == ("query", "joint")


def test_the_defaults_differ_from_the_published_settings_only_where_the_recipe_says_so():
    default, published = asdict(Recipe()), asdict(load_recipe("coco_clip_r50"))
    differing = {name for name in default if default[name] != published[name]}
    assert differing == {"vocabulary", "precision", "synonym_probabilities", "distillation_embedding"}
    assert all(f"`{name}` (published" in Recipe.__doc__ for name in differing - {"vocabulary"})


def test_a_recipe_is_changed_by_replacing_fields():
    assert load_recipe("miniworld", steps=77).steps == 77
    recipe = Recipe()
    assert replace(recipe, seed=3).seed == 3
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be positive"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive"),
        ({"distillation_weight": -1.0}, "`distillation_weight` must not be negative"),
        ({"flip_probability": 1.5}, "`flip_probability` must lie between 0 and 1"),
        ({"crop_size": 0}, "`crop_size` must be positive"),
        ({"scale_range": (1.2, 0.8)}, "`scale_range`"),
        ({"milestones": (0.9, 0.8)}, "`milestones`"),
        ({"warmup_share": 1.5}, "`warmup_share` must lie between 0 and 1"),
        ({"synonym_mode": "both"}, "none, average, max, sample"),
        ({"distillation_embedding": "prior"}, "shared, query, projected"),
        ({"distillation_terms": "all"}, "joint, split, feature, relation"),
        ({"distillation_relation": "l1"}, "cosine, euclidean"),
        ({"precision": "int8"}, "fp32, bf16, fp16"),
        ({"model": {"class_weight": 3.0}}, r"\['class_weight'\]"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_recipes_and_training_know_the_same_choices():
    assert recipe.RELATIONS == distillation.RELATIONS
    assert recipe.DISTILLATION_EMBEDDINGS == distillation.DISTILLATION_EMBEDDINGS
    assert ("none", *text_diversification.SYNONYM_MODES) == recipe.SYNONYM_MODES


def test_unknown_recipes_and_fields_are_refused():
    with pytest.raises(ValueError, match="coco_clip_r50, coco_r101, miniworld"):
        load_recipe("coco")
    with pytest.raises(ValueError, match="no field stepz"):
        load_recipe("miniworld", stepz=3)


def test_the_batch_is_divided_among_processes_and_accumulated_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = Recipe(batch_size=12)
    with pytest.raises(ValueError, match="cannot be divided among 10"):
        recipe.to_training_arguments(tmp_path, gradient_accumulation_steps=5)
    monkeypatch.delenv("WORLD_SIZE")
    args = recipe.to_training_arguments(tmp_path, gradient_accumulation_steps=3)
    assert args.per_device_train_batch_size == 4 and args.gradient_accumulation_steps == 3
