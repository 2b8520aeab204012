import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from configuration import Recipe
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from train.data import expand_masks
from train.engine.checkpoints import last_complete_checkpoint
from train.engine.logging import TrainingStopped
from train.engine.optimization import learning_rate_factor, parameter_groups
from train.engine.trainer import HEADS_NAME, GKCTrainer
from train.losses import distillation
from train.losses.criterion import point_seeds
from train.teacher.region_teacher import RegionTeacher

from .processes import forked
from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor, toy_vision_model

ROOT = Path(__file__).parent.parent
RECIPE = Recipe().replace(
    steps=8,
    batch_size=2,
    crop_size=64,
    learning_rate=3e-3,
    backbone_factor=0.3,
    max_grad_norm=1.0,
    train_num_points=64,
    distillation_embedding="query",
)
LOSSES = ["cross_entropy", "mask", "dice", "synonym"]
LOSSES += ["distillation_feature", "distillation_relation", "distillation_joint"]


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: sums split among threads differ from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(output_dir, recipe: Recipe = RECIPE, model=None, images: int = 8, callbacks=None, **overrides):
    dataset = toy_dataset(images)
    settings = {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    return GKCTrainer(
        model=toy_model(**recipe.model_settings()) if model is None else model,
        recipe=recipe,
        args=recipe.to_training_arguments(output_dir, **{**settings, **overrides}),
        train_dataset=dataset,
        vocabulary=VOCABULARY,
        processor=toy_processor(),
        teacher_embeddings=RegionTeacher(toy_vision_model()).embed_dataset(dataset, progress=False),
        eval_dataset=dataset,
        callbacks=callbacks,
    )


def a_batch(trainer: GKCTrainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train for 30 steps on six images and return the checkpoint."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = RECIPE.replace(steps=30, batch_size=3)
    overrides = {"logging_steps": 5, "save_strategy": "steps", "save_steps": 30}
    trainer = make_trainer(tmp_path_factory.mktemp("run"), recipe, images=6, **overrides)
    trainer.train()
    return trainer


def test_every_loss_is_logged_by_name_and_finite(trained):
    logs = [log for log in trained.state.log_history if "loss" in log]
    assert len(logs) == 6
    for log in logs:
        for name in LOSSES:
            for key in (f"loss_{name}", f"loss_{name}_auxiliary"):
                assert 0 <= log[key] < float("inf")
        assert log["temperature"] > 0 and log["distillation_scale"] != 1 and log["grad_norm"] > 0
        assert log["regions"] == log["matched_regions"] == log["distilled_regions"] > 3


def test_losses_fall(trained):
    logs = [log for log in trained.state.log_history if "loss" in log]
    for name in ["loss", *(f"loss_{name}" for name in LOSSES)]:
        assert logs[-1][name] < 0.95 * logs[0][name], name


def test_augmentation_differs_between_epochs(trained):
    assert trained.state.epoch == 15 and trained.train_dataset._epoch == 14


def test_saved_model_contains_no_training_heads(trained, tmp_path):
    trained.save_model(str(tmp_path))
    assert not (tmp_path / HEADS_NAME).exists()
    loaded, report = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, saved), (_, trained_value) in zip(
        loaded.state_dict().items(), trained.student.state_dict().items(), strict=True
    ):
        assert torch.equal(saved, trained_value), name
    processor = GKCProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer("disc")["input_ids"] == toy_processor().tokenizer("disc")["input_ids"]


def test_checkpoint_saves_training_heads_beside_the_model(trained):
    checkpoint = last_complete_checkpoint(trained.args.output_dir)
    heads = load_file(checkpoint / HEADS_NAME)
    assert sorted(heads) == [f"distillation_head.{name}" for name in ("projection.bias", "projection.weight", "scale")]
    assert not [key for key in load_file(checkpoint / "model.safetensors") if "distillation" in key or "head" in key]
    assert json.loads((checkpoint / "recipe.json").read_text())["distillation"]["embedding"] == "query"
    scale = heads["distillation_head.scale"]
    assert scale != 1 and torch.equal(scale, trained.model.distillation_head.scale)


def test_frozen_text_encoder_weights_do_not_change(trained):
    before = toy_model(**RECIPE.model_settings()).text_model.state_dict()
    after = trained.student.text_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trained.student.training and not trained.student.text_model.training


def test_no_training_step_runs_clip_image_encoder(tmp_path):
    trainer = make_trainer(tmp_path, RECIPE.replace(steps=1, synonym_probabilities="teacher"))

    def refuse(*args, **kwargs):
        raise AssertionError("CLIP ran in a step")

    trainer.student.text_model.forward = refuse
    trainer.student.embed_prompts = refuse
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("mode", "embedding"),
    [
        *[(mode, "shared") for mode in ("none", "average", "max", "sample")],
        *[("sample", embedding) for embedding in ("query", "projected", None)],
        ("none", None),
    ],
)
def test_every_ablation_has_finite_gradients(tmp_path, mode, embedding):
    changes = {"distillation_weight": 0.0} if embedding is None else {"distillation_embedding": embedding}
    trainer = make_trainer(tmp_path, RECIPE.replace(synonym_mode=mode, **changes))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, a_batch(trainer), return_outputs=True)
    loss.backward()
    assert ("synonyms" not in outputs.heads) == (mode == "none")
    assert ("distillation" not in outputs.heads) == (embedding is None)
    without = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("crop_size", [64, 72])
def test_loss_without_text_losses_equals_the_model_loss(tmp_path, within, training, crop_size):
    """Also where the model has to pad its input."""
    recipe = RECIPE.replace(synonym_mode="none", distillation_weight=0.0, crop_size=crop_size)
    trainer = make_trainer(tmp_path, recipe)
    trainer.model.train(training)
    batch = a_batch(trainer)
    texts = trainer.text_bank
    loss = trainer.compute_loss(trainer.model, batch)
    # The public model draws the points of masks from torch's generator.
    seeded = partial(trainer.student.criterion, point_seeds=point_seeds(batch))
    trainer.student.criterion = mock.Mock(side_effect=seeded, total=trainer.student.criterion.total)
    public = trainer.student(
        batch["pixel_values"],
        batch["pixel_mask"],
        class_embeds=texts.embeds[texts.name_prompts],
        mask_labels=expand_masks(batch["segmentation"], batch["segment_ids"]),
        class_labels=batch["class_labels"],
    )
    within("loss of the trainer against that of model(**batch)", (loss - public.loss).abs() / loss, 1e-6)


@pytest.mark.parametrize(
    ("terms", "relation_weight"),
    [("joint", None), ("split", None), ("split", 2.0), ("feature", None), ("relation", None)],
)
def test_the_loss_is_the_weighted_sum_over_stages(tmp_path, terms, relation_weight):
    changes = {"distillation_weight": 7.0, "distillation_relation_weight": relation_weight, "synonym_weight": 3.0}
    recipe = RECIPE.replace(distillation_terms=terms, **changes)
    trainer = make_trainer(tmp_path, recipe)
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, a_batch(trainer), return_outputs=True)
    log = trainer._averages.take()
    auxiliary = len(outputs.student.stages) - 1
    total = {name: log[f"loss_{name}"] + auxiliary * log[f"loss_{name}_auxiliary"] for name in LOSSES}
    weights = {
        "cross_entropy": recipe.matching.class_weight,
        "mask": recipe.matching.mask_weight,
        "dice": recipe.matching.dice_weight,
    }
    weights |= {"synonym": 3.0}
    weights |= {f"distillation_{term}": 7.0 for term in {"split": ("feature", "relation")}.get(terms, (terms,))}
    if relation_weight:
        weights["distillation_relation"] = relation_weight
    expected = sum(weight * total[name] for name, weight in weights.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (trainer.model.distillation_head.scale.grad is None) == (terms == "feature")


def test_a_batch_without_regions_trains(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    batch = a_batch(trainer)
    for key in ("class_labels", "segment_ids"):
        batch[key] = [values[:0] for values in batch[key]]
    loss, _ = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    head = trainer.model.distillation_head
    assert loss.isfinite() and head.scale.grad == 0 and not head.projection.weight.grad.any()


def test_evaluation_reports_the_loss(tmp_path):
    metrics = make_trainer(tmp_path).evaluate()
    assert 0 < metrics["eval_loss"] < float("inf")


def test_gradient_accumulation_and_mixed_precision(tmp_path, monkeypatch):
    recipe = RECIPE.replace(steps=2, batch_size=4, precision="bf16")
    trainer = make_trainer(tmp_path, recipe, gradient_accumulation_steps=2)
    micro_batches, layer_dtypes, logits_dtypes = [], set(), set()
    original = trainer.compute_loss

    def counted(model, inputs, *args, **kwargs):
        micro_batches.append((trainer.state.global_step, len(inputs["image_ids"])))
        return original(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", counted)
    # Hooks sit below the wrapper of accelerate, which turns every output of the whole model into fp32.
    layer = trainer.student.model.mask_decoder.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: layer_dtypes.add(output.dtype))
    trainer.student.register_forward_hook(
        lambda module, inputs, output: logits_dtypes.add(output.class_queries_logits.dtype)
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert micro_batches == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert layer_dtypes == {torch.bfloat16} and logits_dtypes == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.student.parameters())


class StopAt(TrainerCallback):
    """Ends the process, or the training, before a checkpoint of this step could be written."""

    def __init__(self, step: int, kill: bool = False):
        self.step, self.kill = step, kill

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / HEADS_NAME)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Eight steps, four an epoch, checkpoints after 3, 6 and 8."""
    torch.set_num_threads(1)
    trainer = make_trainer(tmp_path_factory.mktemp("undisturbed"), **SAVING)
    trainer.train()
    return Path(trainer.args.output_dir)


SAVING = {"save_strategy": "steps", "save_steps": 3}


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    weights, expected = (checkpoint_weights(path / "checkpoint-8") for path in (folder, undisturbed))
    assert weights.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert different == []
    states = [path / "checkpoint-8" for path in (folder, undisturbed)]
    # Optimiser, schedule, and the random states of Python, numpy and torch; those of numpy are no tensors.
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_equal(*[torch.load(path / file, weights_only=False) for path in states])
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"][-1] for path in states]
    assert logs[0] == logs[1] and logs[0]["step"] == 8 and logs[0]["loss"] > 0


def assert_equal(first, second) -> None:
    """Whether nested states are equal bit for bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed):
    killed = forked(lambda: make_trainer(tmp_path, callbacks=[StopAt(5, kill=True)], **SAVING).train())
    assert killed == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    torch.manual_seed(99)
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("save_steps", "stop", "workers"), [(4, 5, 0), (3, 7, 1)], ids=["between epochs", "workers"])
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, undisturbed, save_steps, stop, workers):
    overrides = {**SAVING, "save_steps": save_steps, "dataloader_num_workers": workers}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[StopAt(stop)], **overrides).train()
    make_trainer(tmp_path, **overrides).train(resume_from_checkpoint=True)
    assert_same_run(tmp_path, undisturbed)


def test_resuming_a_finished_run_takes_no_step(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "checkpoint-8", tmp_path / "checkpoint-8")
    trainer = make_trainer(tmp_path, **SAVING)
    assert trainer.train(resume_from_checkpoint=True).global_step == trainer.state.global_step == 8
    expected = load_file(undisturbed / "checkpoint-8" / "model.safetensors")
    weights = trainer.student.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_incomplete_checkpoints_are_skipped(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copytree(undisturbed / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"best')
    (tmp_path / "checkpoint-8").mkdir()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-3"
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_complete_checkpoint(tmp_path)


def test_weights_and_optimizer_of_an_earlier_version_are_loaded(tmp_path, undisturbed):
    """Earlier versions stored weights under other names, and the optimizer identifies parameters by their position."""
    shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    scalars = ("no_object_embedding", "logit_scale")
    old = {name.replace("classifier.", "class_embedder."): weight for name, weight in weights.items()}
    old = {re.sub(rf"class_embedder\.({'|'.join(scalars)})$", r"\1", name): weight for name, weight in old.items()}
    assert {*scalars} < {*old} and not old.keys() & {name for name in weights if "classifier" in name}
    save_file(old, tmp_path / "checkpoint-3" / "model.safetensors", {"format": "pt"})
    trainer = make_trainer(tmp_path)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    for name, weight in trainer.student.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [group["params"] for group in parameter_groups(trainer.model, trainer.args, RECIPE)]
    first = [names[id(parameter)] for parameter in groups[0]]
    assert first[:2] == [f"student.classifier.{name}" for name in scalars]
    decayed = [names[id(parameter)] for parameter in groups[-1]]
    assert "student.model" in decayed[0] and decayed.index("student.classifier.dense.weight") > 1


def test_incompatible_checkpoint_raises_and_names_its_keys(tmp_path, undisturbed):
    recipe = RECIPE.replace(distillation_embedding="shared")
    with pytest.raises(RuntimeError, match=r"projection\.weight"):
        make_trainer(tmp_path, recipe).train(resume_from_checkpoint=str(undisturbed / "checkpoint-3"))


def test_a_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **{**SAVING, "save_steps": 2})
    original = distillation.text_guided_distillation_loss

    def broken(*args, **kwargs):
        terms = original(*args, **kwargs)
        return tuple(term * float("nan") for term in terms) if trainer.state.global_step == 2 else terms

    monkeypatch.setattr(distillation, "text_guided_distillation_loss", broken)
    with pytest.raises(RuntimeError, match=r"step 3, images \['toy-\d', 'toy-\d'\].*loss_distillation_feature"):
        trainer.train()
    intact = checkpoint_weights(last_complete_checkpoint(tmp_path))
    assert all(values.isfinite().all() for values in intact.values())
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"


def test_labels_or_outputs_that_cannot_be_matched_name_step_and_images(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = a_batch(trainer)
    batch["pixel_values"][:] = float("nan")
    with pytest.raises(RuntimeError, match=r"step 1, images \['toy-\d', 'toy-\d'\]: Non-finite"):
        trainer.compute_loss(trainer.model, batch)


class LossScaling:
    """Stands in for the scaler of fp16."""

    def __init__(self, scale: float):
        self.scale = scale

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.scale


def test_a_gradient_that_is_not_finite_stops_training_unless_its_scale_can_be_lowered(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.compute_loss(trainer.model.train(), a_batch(trainer))
    message = r"step 1.*norm of the gradients is (inf|nan), with finite losses: .*'loss_mask'"
    for norm in (float("inf"), torch.tensor(float("nan"))):
        with pytest.raises(TrainingStopped, match=message):
            trainer._get_grad_norm(trainer.model, norm)
    trainer.accelerator.scaler = LossScaling(2.0)
    assert trainer._get_grad_norm(trainer.model, float("inf")) == float("inf")
    trainer.accelerator.scaler = LossScaling(0.5)
    with pytest.raises(TrainingStopped, match="norm of the gradients is inf"):
        trainer._get_grad_norm(trainer.model, float("inf"))


def test_model_and_recipe_must_agree(tmp_path):
    with pytest.raises(ValueError, match="train_num_points 32 and 64"):
        make_trainer(tmp_path, model=toy_model(train_num_points=32))


@pytest.mark.parametrize("changes", [{}, {"distillation_weight": 0.0, "synonym_probabilities": "teacher"}])
def test_missing_teacher_embeddings_raise_an_error(tmp_path, changes):
    recipe = RECIPE.replace(**changes)
    with pytest.raises(ValueError, match="needs `teacher_embeddings`"):
        GKCTrainer(
            toy_model(**recipe.model_settings()),
            recipe,
            recipe.to_training_arguments(tmp_path),
            toy_dataset(2),
            VOCABULARY,
            toy_processor(),
        )


def test_a_dataset_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 images, fewer than one batch"):
        make_trainer(tmp_path, RECIPE.replace(batch_size=4), images=2)


def test_parameter_groups(tmp_path):
    trainer = make_trainer(tmp_path)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = {}
    for group in parameter_groups(trainer.model, trainer.args, RECIPE):
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert name not in groups
            groups[name] = (group["lr"], group["weight_decay"])
    assert all("text_model" in name for name in names.values())
    fast, slow = RECIPE.optimizer.learning_rate, RECIPE.optimizer.learning_rate * RECIPE.optimizer.backbone_factor
    expected = {
        "student.model.backbone.encoder.stem.layers.0.convolution.weight": (slow, 0.05),
        "student.model.backbone.encoder.stem.layers.0.normalization.weight": (slow, 0.0),
        "student.model.mask_decoder.layers.0.self_attn.q_proj.weight": (fast, 0.05),
        "student.model.mask_decoder.layers.0.self_attn.q_proj.bias": (fast, 0.05),
        "student.model.mask_decoder.layers.0.final_layer_norm.weight": (fast, 0.0),
        "student.model.mask_decoder.query_features.weight": (fast, 0.0),
        "student.model.pixel_decoder.level_embedding": (fast, 0.0),
        "student.classifier.no_object_embedding": (fast, 0.0),
        "student.classifier.logit_scale": (fast, 0.0),
        "distillation_head.scale": (fast, 0.0),
        "distillation_head.projection.weight": (fast, 0.05),
    }
    assert {name: groups[name] for name in expected} == expected


def test_learning_rate_schedule():
    recipe = Recipe().replace(steps=100, milestones=(0.8, 0.9), warmup_share=0.04)
    factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1]) and factors[79] == 1
    assert factors[80:90] == [0.1] * 10 and factors[90:] == pytest.approx([0.01] * 10)
