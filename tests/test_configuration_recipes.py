import inspect
import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from configuration import Recipe, load_recipe, recipe_names, sections
from configuration.sections import OptimizerSection, SynonymsSection
from modeling_gkc.configuration_gkc import GKCConfig
from train.engine.command import _attribute_descriptions
from train.losses import distillation, synonyms

COCO_RECIPES = ("coco_clip_r50", "coco_r101", "coco_clip_r50_opentrans", "coco_convnext_b")
RECIPES = (*COCO_RECIPES, "custom", "distil", "miniworld")
GOLDEN = Path(__file__).parent / "golden"
ACCELERATE = Path(__file__).parent.parent / "configuration" / "accelerate"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_configuration_and_arguments(name, tmp_path):
    recipe = load_recipe(name)
    config = GKCConfig(**recipe.model_settings())
    assert config.class_weight == recipe.matching.class_weight
    args = recipe.to_training_arguments(tmp_path, bf16=False)
    assert args.max_steps == recipe.optimizer.steps and args.per_device_train_batch_size == recipe.data.batch_size
    assert args.max_grad_norm == recipe.optimizer.max_grad_norm and args.seed == recipe.run.seed
    assert not args.remove_unused_columns
    json.dumps(recipe.to_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_command_hardware_and_expectation(name):
    module = __import__(f"configuration.recipes.{name}", fromlist=["RECIPE"])
    for word in ("Command:", "Hardware:", "Expect:"):
        assert word in module.__doc__
    assert len(module.__doc__.splitlines()[0]) <= 110, "one line of `python -m train --help`"
    assert ("Not run here" in module.__doc__) == name.startswith("coco")


def test_every_recipe_is_tested():
    assert sorted(RECIPES) == sorted(recipe_names())


def test_published_settings():
    r50, r101 = load_recipe("coco_clip_r50"), load_recipe("coco_r101")
    optimizer = r50.optimizer
    assert (optimizer.steps, r50.data.batch_size, r101.data.batch_size) == (50_000, 112, 56)
    assert (optimizer.learning_rate, optimizer.backbone_factor) == (3e-4, 0.1)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.05, 0.01)
    assert [round(share * optimizer.steps) for share in optimizer.milestones] == [40_000, 45_000]
    assert (r50.matching.class_weight, r101.matching.class_weight) == (2, 10)
    for row in (r50, r101):
        assert (row.distillation.weight, row.synonyms.weight, row.grounding.weight) == (10, 10, 10)
        assert (row.matching.no_object_weight, row.data.region_dropout) == (0.1, 0.5)
        assert row.distillation.max_regions == 8 * 200
        assert (row.matching.train_num_points, row.matching.oversample_ratio) == (12544, 3)
        assert row.matching.importance_sample_ratio == 0.75
        assert (row.data.crop_size, row.data.scale_range, row.optimizer.precision) == (512, (0.8, 1.2), "bf16")
        assert (row.synonyms.mode, row.synonyms.probabilities) == ("sample", "boxes")
        assert (row.synonyms.threshold, row.synonyms.logit_scale) == (0.1, 100)
        assert (row.distillation.embedding, row.distillation.terms) == ("query", "joint")


def test_settings_of_the_reproduction():
    recipe = load_recipe("coco_clip_r50_opentrans")
    assert (recipe.optimizer.steps, recipe.data.batch_size, recipe.optimizer.learning_rate) == (50_000, 28, 1.5e-4)
    assert (recipe.matching.class_weight, recipe.distillation.weight, recipe.grounding.weight) == (2, 2, 2)


@pytest.mark.parametrize("name", COCO_RECIPES)
@pytest.mark.parametrize("split", ["ignore", "delete"])
def test_base_and_novel_classes_are_a_field(name, split):
    assert load_recipe(name, category_split=split).data.category_split == split


def test_defaults_differ_from_published_settings_only_where_documented():
    default, published = Recipe(), load_recipe("coco_clip_r50")
    differing = {name for name in Recipe.field_names() if default.get(name) != published.get(name)}
    differing -= {"optimizer.precision"}
    places = {"data.vocabulary", "data.dataset", "model.clip", "data.eval_split"}
    method = {"synonyms.probabilities", "distillation.embedding", "distillation.max_regions"}
    assert differing == places | method | {"grounding.weight", "data.region_dropout"}
    documented = (differing - places) | {"optimizer.precision"}
    assert all(f"`{name}` (published" in Recipe.__doc__ for name in documented)


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("1gpu", DistributedType.NO, 1, 1),
        ("8gpu", DistributedType.MULTI_GPU, 8, 1),
        ("2nodes", DistributedType.MULTI_GPU, 16, 2),
        ("fsdp", DistributedType.FSDP, 8, 1),
    ],
)
def test_accelerate_reads_our_configurations(name, kind, processes, machines):
    """As `accelerate launch --config_file` reads them; an unknown key is an error there."""
    path = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.distributed_type == kind
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision == "no", "the recipe decides"
    assert not config.use_cpu and f"configuration/accelerate/{name}.yaml" in path.read_text()
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "train", "coco_clip_r50"])
    launched, *_ = _validate_launch_command(arguments)
    assert launched.num_processes == processes and launched.num_machines == machines
    assert launched.multi_gpu == (kind == DistributedType.MULTI_GPU) and launched.use_fsdp == (name == "fsdp")


def test_every_accelerate_configuration_is_tested():
    assert sorted(path.stem for path in ACCELERATE.iterdir()) == ["1gpu", "2nodes", "8gpu", "fsdp"]


def test_the_fsdp_configuration_makes_a_plugin(monkeypatch):
    """With the values as `accelerate launch` hands them to the processes, in the environment."""
    settings = load_config_from_file(str(ACCELERATE / "fsdp.yaml")).fsdp_config
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    for key, value in settings.items():
        monkeypatch.setenv(names.get(key, key.upper()), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == ["ConvNextStage"]


@pytest.mark.parametrize(("name", "processes"), [("1gpu", 1), ("8gpu", 8), ("2nodes", 16)])
def test_published_batches_can_be_divided_among_the_configured_processes(name, processes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = load_recipe("coco_clip_r50", accumulation=8 if name == "1gpu" else 1)
    args = recipe.to_training_arguments(tmp_path, bf16=False)
    assert args.per_device_train_batch_size * processes * args.gradient_accumulation_steps == 112


def test_a_recipe_is_changed_by_replacing_fields():
    assert load_recipe("miniworld", steps=77).optimizer.steps == 77
    assert load_recipe("miniworld", {"optimizer.steps": 77}) == load_recipe("miniworld", steps=77)
    recipe = Recipe()
    assert recipe.replace(seed=3).run.seed == 3
    with pytest.raises(FrozenInstanceError):
        recipe.run.seed = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`optimizer.steps` must be positive"),
        ({"learning_rate": -1.0}, "`optimizer.learning_rate` must be positive"),
        ({"learning_rate": float("inf")}, "`optimizer.learning_rate` must be positive"),
        ({"distillation_weight": -1.0}, "`distillation.weight` must not be negative"),
        ({"flip_probability": 1.5}, "`data.flip_probability` must lie between 0 and 1"),
        ({"crop_size": 0}, "`data.crop_size` must be positive"),
        ({"scale_range": (1.2, 0.8)}, "`data.scale_range`"),
        ({"milestones": (0.9, 0.8)}, "`optimizer.milestones`"),
        ({"warmup_share": 1.5}, "`optimizer.warmup_share` must lie between 0 and 1"),
        ({"synonym_mode": "both"}, "none, average, max, sample"),
        ({"distillation_embedding": "prior"}, "shared, query, projected"),
        ({"distillation_terms": "all"}, "joint, split, feature, relation"),
        ({"distillation_relation": "l1"}, "cosine, euclidean"),
        ({"precision": "int8"}, "fp32, bf16, fp16"),
        ({"model.config": {"class_weight": 3.0}}, r"\['class_weight'\]"),
    ],
)
def test_invalid_recipes_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe().replace(changes)


def test_sections_validate_themselves():
    with pytest.raises(ValueError, match=r"`optimizer.steps` must be positive, got 0"):
        OptimizerSection(steps=0)
    with pytest.raises(ValueError, match=r"`synonyms.mode` must be one of none, average, max, sample, got 'both'"):
        SynonymsSection(mode="both")


def test_recipes_and_training_know_the_same_choices():
    assert sections.RELATIONS == distillation.RELATIONS
    assert sections.DISTILLATION_EMBEDDINGS == distillation.DISTILLATION_EMBEDDINGS
    assert ("none", *synonyms.CLUSTER_REDUCTIONS, "sample") == sections.SYNONYM_MODES


def test_unknown_recipes_and_fields_are_rejected():
    with pytest.raises(ValueError, match=r"coco_clip_r50, .*coco_r101, custom, distil, miniworld"):
        load_recipe("coco")
    with pytest.raises(ValueError, match=r"There is no recipe 'own_folder'; did you mean custom\?"):
        load_recipe("own_folder")
    with pytest.raises(ValueError, match=r"no field 'stepz'; did you mean optimizer.steps"):
        load_recipe("miniworld", stepz=3)


def test_names_of_fields():
    """`section.field`, a field that one section alone has, and every name from before recipes had sections."""
    for name in Recipe.field_names():
        assert Recipe.full_name(name) == name
    assert Recipe.full_name("batch_size") == "data.batch_size" and Recipe.full_name("mode") == "synonyms.mode"
    assert Recipe.full_name("teacher") == "teacher.source" and Recipe.full_name("model") == "model.config"
    assert Recipe.full_name("distillation_weight") == "distillation.weight"
    with pytest.raises(ValueError, match=r"Several sections .* 'weight': give synonyms.weight or distillation.weight"):
        Recipe.full_name("weight")
    with pytest.raises(ValueError, match=r"did you mean synonyms.threshold"):
        Recipe.full_name("synonym_treshold")
    old = json.loads((GOLDEN / "recipe_without_sections.json").read_text())
    newer = ["data.ignore_void", "model.text_from"]
    assert sorted([*map(Recipe.full_name, old), *newer]) == sorted(Recipe.field_names())


def test_a_stored_recipe_is_read_in_both_forms():
    """With sections, and flat, as runs wrote it before recipes had sections."""
    recipe = load_recipe("coco_clip_r50")
    assert Recipe.from_dict(json.loads((GOLDEN / "recipe_without_sections.json").read_text())) == recipe
    for name in RECIPES:
        assert Recipe.from_dict(json.loads(json.dumps(load_recipe(name).to_dict()))) == load_recipe(name)
    with pytest.raises(ValueError, match="no field 'moon'"):
        Recipe.from_dict({"moon": 1})


def test_every_field_is_described_in_sentences():
    for each in fields(Recipe):
        section = type(getattr(Recipe(), each.name))
        described = dict(_attribute_descriptions(inspect.getdoc(section)))
        assert [*described] == [field.name for field in fields(section)]
        for name, text in described.items():
            assert text[0].isupper() and text.endswith("."), f"{each.name}.{name}"


def test_the_batch_is_divided_among_processes_and_accumulated_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = Recipe().replace(batch_size=12)
    with pytest.raises(ValueError, match="cannot be divided among 10"):
        recipe.to_training_arguments(tmp_path, gradient_accumulation_steps=5)
    monkeypatch.delenv("WORLD_SIZE")
    args = recipe.to_training_arguments(tmp_path, gradient_accumulation_steps=3)
    assert args.per_device_train_batch_size == 4 and args.gradient_accumulation_steps == 3
