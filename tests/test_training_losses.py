"""What is drawn for a step and for its regions, and what the options of a recipe change."""

import numpy as np
import pytest
import torch
from transformers import ConvNextConfig, ResNetConfig, SwinConfig

from configuration import Recipe
from modeling_gkc.configuration_gkc import CLIPResNetConfig
from train.data import AugmentedDataset, JointTransform, SegmentationCollator, StreamingDataset
from train.engine.model import TrainingModel
from train.engine.optimization import freeze_stages
from train.engine.trainer import GKCTrainer
from train.losses.base import Regions
from train.losses.criterion import TrainingCriterion
from train.losses.distillation import DistillationLoss
from train.losses.registry import make_losses
from train.teacher.noun_bank import NounBank, distinct_nouns, draw_nouns
from train.teacher.region_teacher import OnlineTeacher, RegionTeacher, SynonymProbabilities
from train.teacher.synonym_probabilities import synonym_table
from train.teacher.text_bank import TextBank

from .training_toys import VOCABULARY, step_regions, toy_dataset, toy_model, toy_processor, toy_vision_model

RECIPE = Recipe().replace(
    crop_size=64, steps=2, batch_size=4, train_num_points=64, max_grad_norm=1.0, learning_rate=3e-3
)
CAPTIONS = [["disc", "lawn", "Disc"], [], ["block"], ["grass"]]


@pytest.fixture(scope="module")
def dataset():
    return toy_dataset(8).add_column("nouns", [CAPTIONS[index % 4] for index in range(8)])


@pytest.fixture(scope="module")
def text_bank():
    return TextBank.from_vocabulary(VOCABULARY, toy_model(), toy_processor(), progress=False)


@pytest.fixture(scope="module")
def teacher(dataset):
    return RegionTeacher(toy_vision_model()).embed_dataset(dataset, progress=False)


@pytest.fixture(scope="module")
def rows(dataset):
    return AugmentedDataset(dataset, JointTransform(64), seed=0)


def batch_of(rows, indices, epoch: int = 0, **collator) -> dict:
    rows.set_epoch(epoch)
    return SegmentationCollator(toy_processor().image_processor, 3, **collator)([rows[index] for index in indices])


def make_trainer(folder, dataset, teacher, recipe, model=None, **sources) -> GKCTrainer:
    settings = {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    return GKCTrainer(
        toy_model(**recipe.model_settings()) if model is None else model,
        recipe,
        recipe.to_training_arguments(folder, **settings),
        dataset,
        VOCABULARY,
        toy_processor(),
        teacher,
        **sources,
    )


def test_distilled_pairs_follow_the_matches_of_selected_regions():
    none = torch.zeros(5)
    chosen = torch.tensor([True, True, True, False, True])
    regions = Regions([2, 0, 3], none.long(), none.long(), chosen, none, prepared={"distillation": chosen})
    nothing = torch.zeros(0, dtype=torch.long)
    matches = [(torch.tensor([4, 7]), torch.tensor([1, 0])), (nothing, nothing)]
    matches.append((torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1])))
    image, query, region = regions.pairs(matches, chosen)
    assert (image.tolist(), query.tolist(), region.tolist()) == ([0, 0, 2, 2], [4, 7, 1, 2], [1, 0, 4, 2])
    assert DistillationLoss(Recipe()).divisor_counts(regions) == (4, 8)


@pytest.mark.parametrize("probabilities", ["uniform", "teacher"])
def test_draws_do_not_depend_on_how_images_are_batched(rows, text_bank, teacher, probabilities):
    recipe = RECIPE.replace(
        synonym_probabilities=probabilities,
        region_dropout=0.4,
        grounding_weight=1.0,
        distillation_max_regions=7,
    )
    make = step_regions(recipe, text_bank, teacher)
    whole = make([batch_of(rows, [0, 1, 2, 3, 4])])[0]
    parts = make([batch_of(rows, [0, 1]), batch_of(rows, [2]), batch_of(rows, [3, 4])])
    assert whole.counts == [count for part in parts for count in part.counts]
    for name in ("classes", "prompts", "kept", "priorities", "teacher"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    distilled = whole.prepared["distillation"]
    assert torch.equal(distilled, torch.cat([part.prepared["distillation"] for part in parts]))
    assert whole.prepared["grounding"] == [nouns for part in parts for nouns in part.prepared["grounding"]]
    assert distilled.sum() == 7 and not (distilled & ~whole.kept).any()
    again = make([batch_of(rows, [0, 1, 2, 3, 4])])[0]
    assert torch.equal(again.prompts, whole.prompts) and torch.equal(again.priorities, whole.priorities)
    other = make([batch_of(rows, [0, 1, 2, 3, 4], epoch=1)])[0]
    assert not torch.equal(other.priorities[:2], whole.priorities[:2])


def test_sampled_words_agree_between_classification_and_distillation(rows, text_bank, teacher):
    regions = step_regions(RECIPE, text_bank, teacher)([batch_of(rows, range(8))])[0]
    held = [prompts[labels] for prompts, labels in zip(*regions.prepared["synonyms"], strict=True)]
    assert torch.equal(torch.cat(held), regions.prompts)
    assert torch.equal(text_bank.class_ids[regions.prompts], regions.classes)
    assert len(set(regions.prompts.tolist())) > 3


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (10_000, None)])
def test_the_regions_of_the_lowest_priorities_of_the_step_are_distilled(rows, text_bank, teacher, limit, expected):
    recipe = RECIPE.replace(distillation_max_regions=limit)
    step = step_regions(recipe, text_bank, teacher)([batch_of(rows, [0, 1]), batch_of(rows, [2, 3])])
    priorities = torch.cat([part.priorities for part in step])
    distilled = torch.cat([part.prepared["distillation"] for part in step])
    assert distilled.sum() == (len(priorities) if expected is None else expected)
    assert priorities[distilled].max() < priorities[~distilled].min() if expected else distilled.all()


def test_region_dropout_is_redrawn_each_epoch(rows, text_bank, teacher):
    make = step_regions(RECIPE.replace(region_dropout=0.3), text_bank, teacher)
    kept = [make([batch_of(rows, range(8), epoch)])[0] for epoch in range(12)]
    shares = torch.cat([regions.kept for regions in kept]).float()
    # The deviation of a share of so many regions is 0.03.
    assert len(shares) > 250 and abs(shares.mean() - 0.7) < 0.1
    assert all(torch.equal(regions.kept, regions.prepared["distillation"]) for regions in kept)
    assert make([batch_of(rows, range(8))], training=False)[0].kept.all()


def test_divisors_are_means_over_micro_batches(rows, text_bank, teacher):
    recipe = RECIPE.replace(distillation_max_regions=9)
    batches = [batch_of(rows, [0, 1, 2]), batch_of(rows, [3])]
    step = step_regions(recipe, text_bank, teacher)(batches)
    divisors = TrainingCriterion(recipe, toy_model().criterion, make_losses(recipe)).divisors(step)
    counts = [count for part in step for count in part.counts]
    assert divisors.labels.num_masks == sum(counts) / 2
    assert divisors.labels.class_weight == pytest.approx((sum(counts) + 0.1 * (4 * 10 - sum(counts))) / 2)
    per_image = [int(mask.sum()) for part in step for mask in part.prepared["distillation"].split(part.counts)]
    assert divisors.losses["distillation"].tolist() == [4.5, sum(count**2 for count in per_image) / 2]


def test_step_without_regions_has_zero_loss(rows, text_bank, teacher):
    batch = batch_of(rows, [0, 1])
    for name in ("class_labels", "segment_ids"):
        batch[name] = [values[:0] for values in batch[name]]
    for recipe in (RECIPE, RECIPE.replace(synonym_probabilities="teacher", grounding_weight=1.0)):
        step = step_regions(recipe, text_bank, teacher)([batch])
        assert step[0].counts == [0, 0] and step[0].teacher.shape == (0, 16)
        criterion = TrainingCriterion(recipe, toy_model().criterion, make_losses(recipe))
        assert criterion.divisors(step).labels.num_masks == 0


class Probable:
    """Stands in for stored probabilities: of each class's words the last is probable."""

    def __init__(self, dataset, table):
        self.classes = {
            (row["image_id"], segment["id"]): segment["category_id"] for row in dataset for segment in row["segments"]
        }
        words = (table >= 0).sum(dim=1)
        self.rows = torch.nn.functional.one_hot(words - 1, table.shape[1]).float()

    def lookup(self, image_ids, segment_ids):
        return [
            self.rows[torch.tensor([self.classes[image_id, int(segment)] for segment in segments])]
            for image_id, segments in zip(image_ids, segment_ids, strict=True)
        ]


def test_words_of_boxes_are_drawn_by_their_probabilities(tmp_path, dataset, rows, text_bank, teacher):
    recipe = RECIPE.replace(synonym_probabilities="boxes")
    with pytest.raises(ValueError, match=r"name_probabilities.*train\.cache synonyms"):
        make_trainer(tmp_path, dataset, teacher, recipe)
    table = synonym_table(text_bank.class_ids)
    make = step_regions(recipe, text_bank, teacher, name_probabilities=Probable(dataset, table))
    regions = make([batch_of(rows, range(8))])[0]
    words = [text_bank.names[prompt] for prompt in regions.prompts.tolist()]
    assert set(words) == {"round", "box", "lawn"}
    assert hasattr(SynonymProbabilities, "lookup")


def test_online_teacher_sees_the_augmented_regions_that_are_distilled(rows, text_bank):
    class Counting(OnlineTeacher):
        def embed(self, batch):
            self.seen = sum(map(len, batch["segment_ids"]))
            return super().embed(batch)

    online = Counting(RegionTeacher(toy_vision_model()))
    batch = batch_of(rows, [0, 1], keep_images=True)
    recipe = RECIPE.replace(teacher="online", distillation_max_regions=3)
    regions = step_regions(recipe, text_bank, online)([batch])[0]
    assert online.seen == 3 < sum(regions.counts)
    everything = torch.cat(online.embed(batch))
    distilled = regions.prepared["distillation"]
    torch.testing.assert_close(regions.teacher[distilled], everything[distilled])
    assert not regions.teacher[~distilled].any()


def test_online_and_cached_teacher_give_the_same_loss_on_the_same_crops(tmp_path, dataset, teacher, within):
    """Without augmentation, at the size of the images; the cache holds half precision."""
    logged = []
    for kind, sources in (
        ("cached", {"teacher": teacher}),
        ("online", {"teacher": None, "online_teacher": OnlineTeacher(RegionTeacher(toy_vision_model()))}),
    ):
        recipe = RECIPE.replace(teacher=kind, scale_range=(1.0, 1.0), flip_probability=0.0)
        trainer = make_trainer(tmp_path, dataset, recipe=recipe, **sources)
        torch.manual_seed(0)
        trainer.compute_loss(trainer.model.train(), batch_from(trainer))
        logged.append({name: value for name, value in trainer._latest.items() if "distillation" in name})
    assert len(logged[0]) == 7  # three terms of the last stage and of those before it, and their scale
    error = max(abs(logged[1][name] / value - 1) for name, value in logged[0].items())
    within("distillation losses with online and cached teacher, relative", error, 1e-3)


def batch_from(trainer: GKCTrainer) -> dict:
    torch.manual_seed(0)
    return next(iter(trainer.get_train_dataloader()))


def test_nouns_are_dropped_limited_and_unique():
    nouns = ["a", "b", "a", "c", "d", "e", "f", "g"]
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_nouns(nouns, 0.25, 5, generator) for _ in range(400)]
    assert all(len(set(chosen)) == len(chosen) <= 5 and set(chosen) <= set(nouns) for chosen in drawn)
    shares = [np.mean([noun in chosen for chosen in drawn]) for noun in "abcdefg"]
    # Of 7 nouns 5.25 stay on average, of which 5 are taken at most: 4.74 on average. Deviation 0.024.
    assert all(abs(share - 4.74 / 7) < 0.1 for share in shares)
    assert draw_nouns(nouns, 1.0, 5, generator) == [] == draw_nouns([], 0.25, 5, generator)
    assert sorted(draw_nouns(nouns[:4], 0.0, 5, generator)) == ["a", "b", "c"]


def test_noun_bank_encodes_each_noun_once(dataset):
    model, processor = toy_model(), toy_processor()
    assert distinct_nouns(dataset, None) == ["Disc", "block", "disc", "grass", "lawn"]
    bank = NounBank.from_nouns(distinct_nouns(dataset), model, processor)
    assert bank.nouns == ("block", "disc", "grass", "lawn") and bank.embeds.shape == (4, 16)
    embeds, mask = bank.embed(CAPTIONS[:3])
    assert mask.tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert torch.equal(embeds[0, 0], embeds[0, 2]) and not embeds[1].any()
    torch.testing.assert_close(embeds[2, 0].norm(), torch.tensor(1.0))
    assert bank.embed([[], []])[0].shape == (2, 0, 16)
    with pytest.raises(KeyError, match="moon"):
        bank.embed([["disc", "moon"]])
    other = NounBank.from_nouns(["disc"], toy_model(seed=1), processor)
    assert not torch.allclose(other.embeds[0], bank.embeds[1])


def test_grounding_trains_and_needs_nouns(tmp_path, dataset, teacher):
    recipe = RECIPE.replace(grounding_weight=10.0)
    with pytest.raises(ValueError, match="column `nouns`"):
        make_trainer(tmp_path, toy_dataset(8), teacher, recipe)
    trainer = make_trainer(tmp_path, dataset, teacher, recipe)
    trainer.train()
    logs = trainer.state.log_history[:2]
    assert all(0 < log["loss_grounding"] < 10 for log in logs) and "loss_grounding_auxiliary" not in logs[0]
    assert logs[0]["grounding_scale"] == pytest.approx(1 / 0.07) and logs[1]["grounding_scale"] != 1 / 0.07


def test_grounding_reaches_class_embeddings_of_the_last_stage_only(tmp_path, dataset, teacher):
    recipe = RECIPE.replace(grounding_weight=10.0, distillation_weight=0.0)
    trainer = make_trainer(tmp_path, dataset, None, recipe)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    regions = trainer.step_regions([batch])[0]
    outputs = trainer._forward(trainer.model, batch)
    divisors = trainer.criterion.divisors([regions])
    _, matches = trainer.criterion(outputs, batch, regions, divisors)
    for stage in outputs.student.stages:
        stage.query_embeds.retain_grad()
    losses = trainer.criterion.collective(outputs, batch, regions, matches, divisors)
    losses["loss_grounding"].sum().backward()
    gradients = [stage.query_embeds.grad for stage in outputs.student.stages]
    assert gradients[:-1] == [None] * 3 and gradients[-1].any()
    # An image without nouns takes no part.
    silent = [number for number, nouns in enumerate(regions.prepared["grounding"]) if not nouns]
    assert silent and not gradients[-1][silent].any()


BACKBONES = {
    "CLIP ResNet": CLIPResNetConfig(width=8, depths=[1, 1, 1, 1], num_attention_heads=4, image_size=64),
    "ResNet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic"),
    "ConvNeXt": ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
    "Swin": SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64),
}
for config in BACKBONES.values():
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_stages_have_no_gradient_and_constant_statistics(name):
    student = toy_model(backbone_config=BACKBONES[name], freeze_backbone_batch_norm=False)
    model = TrainingModel(student, frozen_stages=2).train()
    backbone = student.model.backbone
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    outputs = model(pixel_values=torch.randn(2, 3, 64, 64), class_embeds=torch.randn(3, 16))
    sum(stage.masks_queries_logits.sum() for stage in outputs.student.stages).backward()
    moved = {key for key, value in backbone.state_dict().items() if not torch.equal(before[key], value)}
    reached = {key for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    is_frozen = {key: key.removeprefix("swin.").startswith(FROZEN) for key in before}
    # Distributed training needs that every parameter that learns is reached.
    assert reached == {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert not any(is_frozen[key] for key in reached) and len(reached) > 10
    assert sum(is_frozen.values()) > 6 and any("stages.2" in key or "layers.2" in key for key in reached)
    # Those of ResNets have statistics, which move in the stages that are trained.
    assert bool(moved) == ("ResNet" in name) and not any(is_frozen[key] for key in moved)


FROZEN = ("encoder.stem", "embedder", "embeddings", *(f"encoder.{n}" for n in ("stages.0", "stages.1")))
FROZEN += ("encoder.layers.0", "encoder.layers.1")


def test_frozen_parameters_are_not_in_the_optimizer(tmp_path, dataset, teacher):
    recipe = RECIPE.replace(frozen_stages=1)
    trainer = make_trainer(tmp_path, dataset, teacher, recipe)
    before = {key: value.clone() for key, value in trainer.student.model.backbone.state_dict().items()}
    trainer.train()
    after = trainer.student.model.backbone.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    frozen = {key for key in before if key.startswith(("encoder.stem", "encoder.stages.0"))}
    assert frozen <= same and not any("weight" in key for key in same - frozen)


def test_freezing_missing_stages_raises():
    with pytest.raises(ValueError, match=r"`model\.frozen_stages` = 5, but the backbone has 4"):
        freeze_stages(toy_model().model.backbone, 5)
    with pytest.raises(ValueError, match="Linear cannot be found"):
        freeze_stages(torch.nn.Linear(2, 2), 1)
    assert freeze_stages(torch.nn.Linear(2, 2), 0) == []


@pytest.mark.parametrize("embedding", ["query", "projected"])
def test_every_stage_may_have_its_own_heads(tmp_path, dataset, teacher, embedding):
    recipe = RECIPE.replace(distillation_heads="per_stage", distillation_embedding=embedding)
    trainer = make_trainer(tmp_path, dataset, teacher, recipe)
    trainer.compute_loss(trainer.model.train(), batch_from(trainer)).backward()
    projections = trainer.model.distillation_head.projections
    assert len(projections) == 4 and all(projection.weight.grad.any() for projection in projections)
    with pytest.raises(ValueError, match="needs a linear map"):
        recipe.replace(distillation_embedding="shared")


def test_compiled_training_matches_eager_training(tmp_path, dataset, teacher, within, monkeypatch):
    """Traced, with whatever breaks the graph, but without the code generation of each piece, which takes minutes."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="eager"))
    weights, losses = [], []
    for compiled in (False, True):
        recipe = RECIPE.replace(compile=compiled, frozen_stages=1, steps=1)
        model = toy_model(encoder_layers=1, decoder_layers=1, **recipe.model_settings())
        trainer = make_trainer(tmp_path, dataset, teacher, recipe, model)
        assert (trainer.student.model._compiled_call_impl is not None) == compiled
        torch.manual_seed(0)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        weights.append(trainer.training_model.state_dict())
    assert list(weights[0]) == list(weights[1])
    within("loss compiled against eager, relative", abs(losses[0] / losses[1] - 1), 1e-5)


def test_a_streamed_dataset_trains(tmp_path, dataset, teacher):
    trainer = make_trainer(tmp_path, dataset, teacher, RECIPE.replace(streaming=True))
    trainer.train()
    assert trainer.state.global_step == 2 and isinstance(trainer.train_dataset, StreamingDataset)
    with pytest.raises(ValueError, match="`eval_dataset` cannot be streamed"):
        make_trainer(tmp_path, dataset, teacher, RECIPE, eval_dataset=dataset.to_iterable_dataset())
