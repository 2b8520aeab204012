"""`GKCTrainer`: transformers' Trainer with the paper's losses.

With cached embeddings of texts and regions, a training step does not run CLIP.

Letters: B images, Q queries, N regions of a micro-batch, D width of the image-text space, P prompts of the vocabulary,
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
from modeling_gkc.atomic_files import replaced_files
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
from ..losses.registry import loss_classes, make_losses, settings_without_teacher
from ..teacher.region_teacher import TeacherEmbeddings
from ..teacher.text_bank import TextBank
from .checkpoints import crash_safe_checkpoint, is_complete, last_complete_checkpoint, verify_checkpoint
from .fsdp import full_state_dict, load_full_state_dict, reshape_scalar_parameters
from .logging import Averages, TrainingStopped, extra_log_values
from .model import TrainingModel
from .optimization import learning_rate_factor, parameter_groups

HEADS_NAME = "training_heads.safetensors"
RECIPE_NAME = "recipe.json"
_STUDENT = "student."
# If gradients overflow at a smaller loss scale of fp16, no scale makes them finite.
_LEAST_LOSS_SCALE = 1.0


class GKCTrainer(Trainer):
    """Trainer of a `GKCForOpenVocabSegmentation` according to a recipe.

    Losses are averages over all images of an optimizer step. How these are split over processes and accumulated
    micro-batches changes neither losses nor gradients nor the random draws of an image. The exception is grounding,
    which compares the images of a micro-batch of all processes with each other, so that accumulated micro-batches
    have fewer images to compare. BatchNorm layers of the backbone must be frozen, as they are by default.

    A loss or gradient that is not finite stops all processes with `TrainingStopped`. The last checkpoint stays
    intact.

    Args:
        model: Student, whose config must have the recipe's `loss_settings`.
        recipe: Recipe of the run.
        args: Training arguments, from `recipe.to_training_arguments`.
        train_dataset: Dataset in the schema that `train.data.check_dataset` checks; or augmented samples, such as
            those of `train.data.AugmentedDataset`.
        vocabulary: Classes that `category_id` refers to. With a `category_split` these are the base classes only.
        processor: Processor of the student, which is saved with it.
        teacher_embeddings: Embeddings of the regions of `train_dataset` and `eval_dataset`, for losses that need a
            teacher with `teacher.source=cached`.
        text_bank: Embeddings of the vocabulary's prompts. Computed if not given.
        eval_dataset: Dataset whose losses are reported, without augmentation.
        callbacks: Callbacks, as in transformers.
        online_teacher: Teacher that embeds regions of the augmented images, for `teacher.source=online`.
        loss_sources: Further arguments of losses, see `TrainingLoss.sources`: `name_probabilities`, the probabilities
            of the names of every region's class, for `synonyms.probabilities=boxes`; and `noun_bank`, the embeddings
            of the captions' nouns, for grounding, which are computed if not given.
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
        # Created after the texts of the losses, as in earlier versions: a name is encoded once, in the batch in which
        # it comes first, and its rounding must be the same in a resumed run.
        text_bank = text_bank or TextBank.from_vocabulary(vocabulary, model, processor)
        context.text_bank = self.text_bank = text_bank.to(self.args.device)
        self.step_regions = StepRegions(losses, self.text_bank, recipe.data.region_dropout)
        self.criterion = TrainingCriterion(recipe, model.criterion, losses)
        self._averages = Averages()
        self._image_ids: list[str] = []
        self._latest: dict[str, Tensor] = {}
        if self.is_fsdp_enabled:
            reshape_scalar_parameters(self.model)
        if recipe.run.compile:
            # Compiled in place, so that the keys of checkpoints do not change. The losses are not compiled, because
            # they match queries and regions on the CPU.
            model.model.compile()

    def _check_size(self, samples: torch.utils.data.Dataset) -> None:
        """Raise a `ValueError` if a dataset has fewer images than a batch."""
        if hasattr(samples, "__len__") and len(samples) < self.args.train_batch_size * self.args.world_size:
            raise ValueError(
                f"The dataset has {len(samples)} images, fewer than one batch: choose a smaller data.batch_size."
            )

    @property
    def training_model(self) -> TrainingModel:
        """Student and heads without wrappers for several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def student(self) -> GKCForOpenVocabSegmentation:
        """Model that is trained and saved."""
        return self.training_model.student

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return the data loader of this process; a streamed dataset is divided among processes and workers."""
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
        """Return the micro-batches of a step, each with its `regions`, and the divisors of their losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = batches[: self._common_count(len(batches))]
        if not batches:
            return batches, None
        self._image_ids = [image_id for batch in batches for image_id in batch["image_ids"]]
        step = self.step_regions(batches)
        batches = [{**batch, "regions": regions} for batch, regions in zip(batches, step, strict=True)]
        return batches, self.criterion.divisors(step)

    def _common_count(self, count: int) -> int:
        """Return the smallest count of all processes, because a streamed dataset may end earlier in one of them."""
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
        """Compute all losses at every stage from the same matches; an evaluation batch forms a step by itself."""
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
            values = _log_values(losses, outputs, regions, matches)
            for each in self.losses:
                values |= each.log_values(outputs, regions)
            self._latest = {name: value.detach().reshape(()) for name, value in values.items()}
            self._averages.add(self._latest)
        loss = self.criterion.total(losses)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: Batch) -> TrainingOutput:
        """Run the student and the heads of the losses on a batch."""
        return model(
            pixel_values=inputs["pixel_values"],
            pixel_mask=inputs.get("pixel_mask"),
            class_embeds=self.text_bank.embeds[self.text_bank.name_prompts],
            head_inputs={loss.name: loss.head_inputs() for loss in self.losses},
        )

    def _stop_together(self, problem: str | None, image_ids: list[str], everywhere: bool = False) -> None:
        """Raise `TrainingStopped` in all processes if one has a problem; all processes must call this together.

        Args:
            problem: Problem of this process, or None.
            image_ids: Images of this process.
            everywhere: Whether the problem is known to be the same in all processes, which then need not
                communicate.
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
        """Return the norm of the gradients, which is the same in all processes; stop training if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        # Loss scaling skips a step that overflows and halves the scale.
        overflows = scaler is not None and scaler.is_enabled() and scaler.get_scale() >= _LEAST_LOSS_SCALE
        if not overflows and not torch.as_tensor(norm).isfinite():
            losses = {name: round(float(value), 4) for name, value in self._latest.items() if "loss" in name}
            problem = f"the norm of the gradients is {float(norm)}, with finite losses: {losses}"
            self._stop_together(problem, self._image_ids, everywhere=True)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of all losses over micro-batches and processes, broken samples, and values of callbacks."""
        if "loss" in logs:
            logs |= self._averages.take() | extra_log_values(self.callback_handler.callbacks)
            if hasattr(self.train_dataset, "broken_count"):
                logs["broken_samples"] = self.train_dataset.broken_count()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys=None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch without predictions; `python -m train.evaluate` computes metrics."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args, self.recipe), **settings)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the learning rate schedule of the recipe."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: learning_rate_factor(step, num_training_steps, self.recipe),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, *, verify: bool = True, **kwargs):
        """Train from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the last complete one.
            verify: Whether to compare a complete checkpoint's files with their checksums, by reading all of them.
            kwargs: Further arguments of `Trainer.train`.

        Raises:
            DamagedFileError: The content of a file of the checkpoint has changed since it was written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            if verify and is_complete(resume_from_checkpoint):
                verify_checkpoint(resume_from_checkpoint)
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= self.args.max_steps:
                # transformers would take another step.
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with crash_safe_checkpoint(self.args, self.state.global_step, self.state.best_model_checkpoint):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student and its processor, and in a checkpoint also the heads of the losses and the recipe.

        All processes must call this together, because a sharded model is gathered.

        Args:
            output_dir: Folder to write to; None uses the output folder of the run.
            _internal_call: Whether the Trainer writes a checkpoint.
        """
        folder = output_dir or self.args.output_dir
        state = full_state_dict(self.model, is_sharded=self.is_fsdp_enabled)
        if self.args.should_save:
            self._save(folder, state)
            if _internal_call:
                heads = {key: value.contiguous() for key, value in state.items() if not key.startswith(_STUDENT)}
                if heads:
                    save_file(heads, Path(folder) / HEADS_NAME)
                (Path(folder) / RECIPE_NAME).write_text(json.dumps(self.recipe.to_dict(), indent=2) + "\n")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        state = full_state_dict(self.model) if state_dict is None else state_dict
        student = {key.removeprefix(_STUDENT): value for key, value in state.items() if key.startswith(_STUDENT)}
        with replaced_files(folder) as unfinished:
            self.student.save_pretrained(unfinished, state_dict=student)
            self.processing_class.save_pretrained(unfinished)

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
    """Return values to log, of one element each: each loss at the last stage, and its mean over the earlier stages."""
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
    return values


def _not_finite(losses: dict[str, Tensor]) -> str | None:
    """Return a message that names the losses that are not finite, or None if all are finite."""
    if not losses or torch.cat(list(losses.values())).isfinite().all():
        return None
    return f"not finite, by stage: { {name: v.tolist() for name, v in losses.items() if not v.isfinite().all()} }"


def _augmented(dataset: Any, recipe: Recipe, training: bool) -> torch.utils.data.Dataset:
    """Return augmented samples of a stored dataset; return a dataset of augmented samples unchanged."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    streams = isinstance(dataset, IterableDataset)
    if streams and not training:
        raise ValueError("`eval_dataset` cannot be streamed: load it with `streaming=False`.")
    changes = (recipe.data.scale_range, recipe.data.flip_probability) if training else ((1.0, 1.0), 0.0)
    kind = StreamingDataset if streams or (recipe.data.streaming and training) else AugmentedDataset
    return kind(
        dataset, JointTransform(recipe.data.crop_size, *changes), recipe.run.seed, recipe.data.max_broken_samples
    )


def _check_agreement(model: GKCForOpenVocabSegmentation, recipe: Recipe) -> None:
    """Raise a `ValueError` if the loss settings of model and recipe differ."""
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
    """Raise an error if an argument of a loss is unknown or a teacher is missing."""
    known = {name for each in loss_classes() for name in each.sources}
    if unknown := sorted(loss_sources.keys() - known):
        raise TypeError(f"GKCTrainer has no argument {', '.join(unknown)}; losses take {', '.join(sorted(known))}.")
    without_teacher = settings_without_teacher(losses)
    if without_teacher and teacher is None:
        online = recipe.teacher.source == "online"
        name = "online_teacher" if online else "teacher_embeddings"
        source = "OnlineTeacher(...)" if online else "RegionTeacher(...).embed_dataset(...)"
        raise ValueError(
            f"The recipe needs `{name}`: pass {source}, or set {without_teacher}, which needs no teacher."
        )


class _EpochSetter(TrainerCallback):
    """Callback that sets the epoch of the dataset, also in a resumed run."""

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


__all__ = ["HEADS_NAME", "RECIPE_NAME", "GKCTrainer", "TeacherEmbeddings"]
