"""`GKCTrainer`: transformers' Trainer with the paper's losses; with cached texts and teacher, a step runs no CLIP.

Letters: B images, Q queries, N regions of a micro-batch, D width of the image-text space, P words of the vocabulary,
S decoder stages.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from configuration import Recipe
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.weight_renaming import rename_old_checkpoint

from ..data import AugmentedDataset, JointTransform, SegmentationCollator, StreamingDataset, streaming_loader
from ..losses.base import (
    Batch,
    LossContext,
    RegionEmbedder,
    RegionLookup,
    Regions,
    StepDivisors,
    TrainingLoss,
    TrainingOutput,
)
from ..losses.criterion import TrainingCriterion
from ..losses.region_sampling import StepRegions
from ..losses.registry import loss_classes, make_losses
from ..teacher.region_teacher import TeacherEmbeddings
from ..teacher.text_bank import TextBank
from .checkpoints import crash_safe_checkpoint, is_complete, last_complete_checkpoint, verify_checkpoint
from .fsdp import full_state_dict, give_scalars_a_dimension, load_full_state_dict
from .logging import Averages, TrainingStopped, extra_log_values
from .model import TrainingModel
from .optimization import learning_rate_factor, parameter_groups

HEADS_NAME = "training_heads.safetensors"
RECIPE_NAME = "recipe.json"
_STUDENT = "student."
# Below this the loss scaling of fp16 has met gradients that no scale makes finite.
_LEAST_LOSS_SCALE = 1.0


class GKCTrainer(Trainer):
    """Trains a `GKCForOpenVocabSegmentation` by a recipe.

    Losses are averages over all images of an optimiser step: how these are split over processes and accumulated
    micro-batches changes neither loss nor gradient, nor what is drawn for an image, nor which regions are distilled.
    There is one exception: grounding compares the images of a micro-batch, of all processes, with each other, so
    accumulated micro-batches have fewer to compare. BatchNorm of the backbone must be frozen, as it is by default.

    A loss or gradient that is not finite stops all processes with `TrainingStopped`; the last checkpoint stays as it
    is.

    Args:
        model: the student; its config must have the recipe's `loss_settings`.
        recipe: what is trained and how.
        args: from `recipe.to_training_arguments`.
        train_dataset: in the schema of `train.data`, which see for `check_dataset`; or samples that are augmented
            already, such as those of `train.data.AugmentedDataset`.
        vocabulary: the classes that `category_id` counts; with a `category_split`, the base classes alone.
        processor: normalises pixels, tokenises words, and is saved with the model.
        teacher_embeddings: of the regions of `train_dataset`, for losses that need a teacher with
            `teacher.source=cached`.
        text_bank: embeddings of the vocabulary's words; computed here if not given.
        eval_dataset: its losses are reported, without augmentation; its regions must be in `teacher_embeddings` too.
        callbacks: as in transformers.
        online_teacher: embeds regions of the augmented images, for `teacher.source=online`.
        loss_sources: further arguments of losses, see `TrainingLoss.sources`: `word_probabilities` of synonyms for
            every region, for `synonyms.probabilities=boxes`; `noun_bank`, embeddings of the captions' nouns, for
            grounding, computed here if not given.
    """

    def __init__(
        self,
        model: GKCForOpenVocabSegmentation,
        recipe: Recipe,
        args: TrainingArguments,
        train_dataset: Dataset | IterableDataset | torch.utils.data.Dataset,
        vocabulary: Vocabulary,
        processor: GKCProcessor,
        teacher_embeddings: RegionLookup | None = None,
        text_bank: TextBank | None = None,
        eval_dataset: Dataset | torch.utils.data.Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        online_teacher: RegionEmbedder | None = None,
        **loss_sources: Any,
    ):
        teacher = online_teacher if recipe.teacher.source == "online" else teacher_embeddings
        losses = make_losses(recipe)
        _check_agreement(model, recipe)
        _check_sources(recipe, losses, teacher, loss_sources)
        self.recipe = recipe
        samples = _augmented(train_dataset, recipe, training=True)
        super().__init__(
            model=TrainingModel(model, losses, recipe.model.frozen_stages),
            args=args,
            data_collator=SegmentationCollator(
                processor.image_processor, len(vocabulary.names), keep_images=recipe.teacher.source == "online"
            ),
            train_dataset=samples,
            eval_dataset=None if eval_dataset is None else _augmented(eval_dataset, recipe, training=False),
            processing_class=processor,
            callbacks=[_EpochSetter(samples), *(callbacks or [])],
        )
        self._check_size(samples)
        self.losses = losses
        context = LossContext(
            recipe,
            device=self.args.device,
            teacher=teacher,
            student=model,
            processor=processor,
            datasets=[dataset for dataset in (train_dataset, eval_dataset) if dataset is not None],
            sources=loss_sources,
        )
        for loss in losses:
            loss.setup(context)
        # After the texts of the losses, which is the order of earlier versions: a word is encoded once, in the batch
        # in which it comes first, and its rounding must be the same in a resumed run.
        text_bank = text_bank or TextBank.from_vocabulary(vocabulary, model, processor)
        context.text_bank = self.text_bank = text_bank.to(self.args.device)
        self.step_regions = StepRegions(losses, self.text_bank, recipe.data.region_dropout)
        self.criterion = TrainingCriterion(recipe, model.criterion, losses)
        self._averages = Averages()
        self._image_ids: list[str] = []
        self._latest: dict[str, Tensor] = {}
        if self.is_fsdp_enabled:
            give_scalars_a_dimension(self.model)
        if recipe.run.compile:
            # In place: the keys of checkpoints stay as they are. The losses, which match on the CPU, stay outside.
            model.model.compile()

    def _check_size(self, samples: torch.utils.data.Dataset) -> None:
        if hasattr(samples, "__len__") and len(samples) < self.args.train_batch_size * self.args.world_size:
            raise ValueError(
                f"The dataset has {len(samples)} images, fewer than one batch: make the recipe's `batch_size` smaller."
            )

    @property
    def training_model(self) -> TrainingModel:
        """Student and heads, without what wraps them for several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def student(self) -> GKCForOpenVocabSegmentation:
        """The model that is trained and saved."""
        return self.training_model.student

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Batches of this process; a streamed dataset shares itself out among processes and workers."""
        if not isinstance(self.train_dataset, StreamingDataset):
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        settings = {"num_workers": workers, "pin_memory": self.args.dataloader_pin_memory}
        if workers:
            settings["persistent_workers"] = self.args.dataloader_persistent_workers
        return streaming_loader(
            self.train_dataset, self.data_collator, self._train_batch_size, self.accelerator, **settings
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], StepDivisors | None]:
        """The micro-batches of a step, each with its `regions`, and what their losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = batches[: self._least(len(batches))]
        if not batches:
            return batches, None
        self._image_ids = [image_id for batch in batches for image_id in batch["image_ids"]]
        step = self.step_regions(batches)
        batches = [{**batch, "regions": regions} for batch, regions in zip(batches, step, strict=True)]
        return batches, self.criterion.divisors(step)

    def _least(self, count: int) -> int:
        """The least count of all processes: a stream may give one of them less."""
        if self.args.world_size == 1 or not isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return count
        least = torch.tensor(count, device=self.args.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: StepDivisors | None = None,
    ) -> Tensor | tuple[Tensor, TrainingOutput]:
        """All losses at every stage, from the same matches; a batch of its own where no step was prepared."""
        regions, divisors = inputs.get("regions"), num_items_in_batch
        if regions is None:
            step = self.step_regions([inputs], training=model.training)
            regions, divisors = step[0], self.criterion.divisors(step)
        outputs, losses, matches, problem = None, {}, [], None
        try:
            outputs = self._forward(model, inputs)
            losses, matches = self.criterion(outputs, inputs, regions, divisors, model.training)
            problem = _not_finite(losses)
        except ValueError as error:
            problem = str(error)
        self._stop_together(problem, inputs["image_ids"])
        losses |= (collective := self.criterion.collective(outputs, inputs, regions, matches, divisors))
        self._stop_together(_not_finite(collective), inputs["image_ids"], everywhere=True)
        if model.training:
            self._latest = _log_values(losses, outputs, regions, matches)
            for each in self.losses:
                self._latest |= {
                    name: value.detach().reshape(()) for name, value in each.log_values(outputs, regions).items()
                }
            self._averages.add(self._latest)
        loss = self.criterion.total(losses)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: Batch) -> TrainingOutput:
        return model(
            pixel_values=inputs["pixel_values"],
            pixel_mask=inputs.get("pixel_mask"),
            class_embeds=self.text_bank.embeds[self.text_bank.name_prompts],
            head_inputs={loss.name: loss.head_inputs() for loss in self.losses},
        )

    def _stop_together(self, problem: str | None, image_ids: list[str], everywhere: bool = False) -> None:
        """Stop all processes if one has a problem, so that none waits for it; all must call this.

        Args:
            problem: of this process, if any.
            image_ids: what it was looking at.
            everywhere: the problem is known to be the same in all processes: they need not ask each other.
        """
        several = self.args.world_size > 1
        if several and not everywhere:
            found = torch.tensor(float(problem is not None), device=self.args.device)
            torch.distributed.all_reduce(found)
            anywhere = bool(found > 0)
        else:
            anywhere = problem is not None
        if not anywhere:
            return
        problems = [] if problem is None else [f"images {image_ids}: {problem}"]
        problems = gather_object(problems) if several else problems
        raise TrainingStopped(
            f"Training stopped in step {self.state.global_step + 1}, " + "; ".join(problems) + ". The last checkpoint "
            "is intact; look at these images, or lower the learning rate."
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The gradient's norm; training stops if it is not finite, which is then so in all processes."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        # With loss scaling a step that overflows is skipped, and the scale halved.
        overflows = scaler is not None and scaler.is_enabled() and scaler.get_scale() >= _LEAST_LOSS_SCALE
        if not overflows and not torch.as_tensor(norm).isfinite():
            losses = {name: round(float(value), 4) for name, value in self._latest.items() if "loss" in name}
            problem = f"the gradient's norm is {float(norm)}, of finite losses: {losses}"
            self._stop_together(problem, self._image_ids, everywhere=True)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss by name, averaged over micro-batches and processes, broken samples, and words of callbacks."""
        if "loss" in logs:
            logs |= self._averages.take() | extra_log_values(self.callback_handler.callbacks)
            if hasattr(self.train_dataset, "broken_count"):
                logs["broken_samples"] = self.train_dataset.broken_count()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys=None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; metrics are `train.evaluate`'s matter."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimiser on `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args, self.recipe), **settings)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's steps at its milestones."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: learning_rate_factor(step, num_training_steps, self.recipe),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; `resume_from_checkpoint=True` continues from the last checkpoint that was written to its end.

        Raises:
            DamagedFileError: a file of the checkpoint holds other bytes than when it was written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            if is_complete(resume_from_checkpoint):
                verify_checkpoint(resume_from_checkpoint)
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= self.args.max_steps:
                # transformers would take one step more.
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with crash_safe_checkpoint(self.args, self.state.global_step, self.state.best_model_checkpoint):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student and its processor; a checkpoint gets the training heads and the recipe beside them.

        All processes must call this: a sharded model is gathered.
        """
        folder = output_dir or self.args.output_dir
        state = full_state_dict(self.model, is_sharded=self.is_fsdp_enabled)
        if self.args.should_save:
            self._save(folder, state)
            if _internal_call:
                self._save_rest(Path(folder), state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        state = full_state_dict(self.model) if state_dict is None else state_dict
        student = {key.removeprefix(_STUDENT): value for key, value in state.items() if key.startswith(_STUDENT)}
        self.student.save_pretrained(folder, state_dict=student)
        self.processing_class.save_pretrained(folder)

    def _save_rest(self, folder: Path, state: dict[str, Tensor]) -> None:
        """What a checkpoint has beside the model: heads and recipe."""
        heads = {key: value.contiguous() for key, value in state.items() if not key.startswith(_STUDENT)}
        if heads:
            save_file(heads, folder / HEADS_NAME)
        (folder / RECIPE_NAME).write_text(json.dumps(self.recipe.to_dict(), indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        student = rename_old_checkpoint(load_file(folder / "model.safetensors"))
        state = {f"{_STUDENT}{key}": value for key, value in student.items()}
        if (folder / HEADS_NAME).exists():
            state |= load_file(folder / HEADS_NAME)
        load_full_state_dict(self.model if model is None else model, state, is_sharded=self.is_fsdp_enabled)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _log_values(
    losses: dict[str, Tensor], outputs: TrainingOutput, regions: Regions, matches: list
) -> dict[str, Tensor]:
    """Scalars of a micro-batch: each loss at the last stage and, averaged, at the auxiliary ones before it."""
    counts = {
        "regions": sum(regions.counts),
        "matched_regions": sum(len(queries) for queries, _ in matches[-1]),
    }
    values = {name: torch.tensor(float(count)) for name, count in counts.items()}
    values["temperature"] = outputs.temperature
    for name, stages in losses.items():
        values[name] = stages[-1]
        if len(stages) > 1:
            values[f"{name}_auxiliary"] = stages[:-1].mean()
    return {name: value.detach().reshape(()) for name, value in values.items()}


def _not_finite(losses: dict[str, Tensor]) -> str | None:
    """Which losses are not finite; None if all are."""
    if not losses or torch.cat(list(losses.values())).isfinite().all():
        return None
    return f"not finite, by stage: { {name: v.tolist() for name, v in losses.items() if not v.isfinite().all()} }"


def _augmented(dataset: Any, recipe: Recipe, training: bool) -> torch.utils.data.Dataset:
    """Samples of a dataset as it is stored; what is augmented already stays as it is."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    streams = isinstance(dataset, IterableDataset)
    if streams and not training:
        raise ValueError("`eval_dataset` cannot be streamed: load it with random access.")
    changes = (recipe.data.scale_range, recipe.data.flip_probability) if training else ((1.0, 1.0), 0.0)
    kind = StreamingDataset if streams or (recipe.data.streaming and training) else AugmentedDataset
    return kind(
        dataset, JointTransform(recipe.data.crop_size, *changes), recipe.run.seed, recipe.data.max_broken_samples
    )


def _check_agreement(model: GKCForOpenVocabSegmentation, recipe: Recipe) -> None:
    settings = recipe.loss_settings()
    made_with = {name: getattr(model.config, name) for name in settings}
    differing = [name for name in settings if made_with[name] != settings[name]]
    if differing:
        differences = ", ".join(f"{name} {made_with[name]} and {settings[name]}" for name in differing)
        raise ValueError(
            f"Model and recipe differ in {differences}. "
            "Make the model with GKCConfig(**recipe.model_settings(), ...), or load it with "
            "from_pretrained(path, **recipe.loss_settings())."
        )


def _check_sources(
    recipe: Recipe,
    losses: list[TrainingLoss],
    teacher: RegionLookup | RegionEmbedder | None,
    loss_sources: dict[str, Any],
) -> None:
    known = {name for each in loss_classes() for name in each.sources}
    if unknown := sorted(loss_sources.keys() - known):
        raise TypeError(f"GKCTrainer has no argument {', '.join(unknown)}; losses take {', '.join(sorted(known))}.")
    needing = [loss.setting_without_clip for loss in losses if loss.needs_teacher]
    if needing and teacher is None:
        online = recipe.teacher.source == "online"
        name = "online_teacher" if online else "teacher_embeddings"
        source = "OnlineTeacher(...)" if online else "RegionTeacher(...).embed_dataset(...)"
        raise ValueError(
            f"The recipe needs `{name}`: pass {source}, or set {' and '.join(needing)}, which needs no teacher."
        )


class _EpochSetter(TrainerCallback):
    """Tells the dataset which epoch it is, also in a resumed run."""

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


__all__ = ["HEADS_NAME", "RECIPE_NAME", "GKCTrainer", "TeacherEmbeddings"]
