"""`GKCTrainer`: transformers' Trainer with the paper's losses; a step runs no CLIP.

Letters: B images, Q queries, N regions of the batch, D width of the image-text space, P words of the vocabulary,
S decoder stages.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from configuration import Recipe
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from .checkpoints import last_complete_checkpoint
from .data import AugmentedDataset, JointTransform, SegmentationCollator
from .optimization import learning_rate_factor, parameter_groups
from .reporting import Averages
from .teacher import TeacherEmbeddings, TextBank
from .training_losses import Regions, TrainingLosses
from .training_model import TrainingModel, TrainingOutput, make_distillation_head

HEADS_NAME = "training_heads.safetensors"
RECIPE_NAME = "recipe.json"


class GKCTrainer(Trainer):
    """Trains a `GKCForOpenVocabSegmentation` by a recipe.

    Losses are averages over the micro-batch of all processes together: how a batch is split over processes does not
    change its gradient. They are not averages over accumulated micro-batches: each of these has its own divisors
    (segments, weights of the cross-entropies, distilled regions and pairs) and all count the same in the sum. With
    `gradient_accumulation_steps`, batches of unequal numbers of segments therefore come close to one large batch, but
    do not equal it. `distillation_max_regions` holds in each process and micro-batch, not for the whole step.

    Args:
        model: the student; its config must have the recipe's `loss_settings`.
        recipe: what is trained and how.
        args: from `recipe.to_training_arguments`.
        train_dataset: in the schema of `train.data`, which see for `check_dataset`.
        vocabulary: the classes that `category_id` counts.
        processor: normalises pixels, tokenises words, and is saved with the model.
        teacher_embeddings: of `train_dataset`; needed for distillation.
        text_bank: embeddings of the vocabulary's words; computed here if not given.
        eval_dataset: its losses are reported, without augmentation; its regions must be in `teacher_embeddings` too.
        callbacks: as in transformers.
    """

    def __init__(
        self,
        model: GKCForOpenVocabSegmentation,
        recipe: Recipe,
        args: TrainingArguments,
        train_dataset: Dataset,
        vocabulary: Vocabulary,
        processor: GKCProcessor,
        teacher_embeddings: TeacherEmbeddings | None = None,
        text_bank: TextBank | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        _check_agreement(model, recipe, teacher_embeddings)
        self.recipe = recipe
        transform = JointTransform(recipe.crop_size, recipe.scale_range, recipe.flip_probability)
        unchanged = JointTransform(recipe.crop_size, scale_range=(1.0, 1.0), flip_probability=0.0)
        augmented = AugmentedDataset(train_dataset, transform, recipe.seed)
        super().__init__(
            model=TrainingModel(model, make_distillation_head(model, recipe)),
            args=args,
            data_collator=SegmentationCollator(processor.image_processor, len(vocabulary.names)),
            train_dataset=augmented,
            eval_dataset=None if eval_dataset is None else AugmentedDataset(eval_dataset, unchanged, recipe.seed),
            processing_class=processor,
            callbacks=[_EpochSetter(augmented), *(callbacks or [])],
        )
        if len(train_dataset) < self.args.train_batch_size * self.args.world_size:
            raise ValueError(
                f"The dataset has {len(train_dataset)} images, fewer than one batch: make the recipe's `batch_size` "
                "smaller."
            )
        text_bank = text_bank or TextBank.from_vocabulary(vocabulary, model, processor)
        self.losses = TrainingLosses(recipe, text_bank.to(self.args.device), teacher_embeddings)
        self._averages = Averages()

    @property
    def student(self) -> GKCForOpenVocabSegmentation:
        """The model that is trained and saved."""
        return self.accelerator.unwrap_model(self.model).student

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor | tuple[Tensor, TrainingOutput]:
        """The student's own loss, synonyms and distillation at every stage, all from the same matches."""
        regions = self.losses.regions(inputs)
        outputs = self._forward(model, inputs)
        losses = self.losses(outputs, inputs, regions)
        self._check_finite(losses, inputs["image_ids"])
        if model.training:
            self._averages.add(self._log_values(losses, outputs, regions))
        loss = self.losses.total(losses)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> TrainingOutput:
        given = {name: inputs.get(name) for name in ("pixel_values", "pixel_mask", "mask_labels", "class_labels")}
        name_prompts = self.losses.text_bank.name_prompts
        try:
            return model(
                **given,
                class_embeds=self.losses.text_bank.embeds[name_prompts],
                class_ids=torch.arange(len(name_prompts), device=name_prompts.device),
                prompt_embeds=None if self.recipe.synonym_mode == "none" else self.losses.text_bank.embeds,
            )
        except ValueError as error:
            raise RuntimeError(f"{self._place(inputs['image_ids'])}: {error}") from error

    def _check_finite(self, losses: dict[str, Tensor], image_ids: list[str]) -> None:
        if torch.cat(list(losses.values())).isfinite().all():
            return
        wrong = {name: values.tolist() for name, values in losses.items() if not values.isfinite().all()}
        raise RuntimeError(
            f"{self._place(image_ids)}: not finite, by stage: {wrong}. The last checkpoint is intact; look at these "
            "images, or lower the learning rate."
        )

    def _place(self, image_ids: list[str]) -> str:
        return f"Training stopped in step {self.state.global_step + 1}, images {image_ids}"

    def _log_values(self, losses: dict[str, Tensor], outputs: TrainingOutput, regions: Regions) -> dict[str, Tensor]:
        """Scalars of a step: each loss at the last stage and, averaged, at the auxiliary ones before it."""
        values = {"temperature": self.student.temperature, "regions": torch.tensor(float(sum(regions.counts)))}
        if outputs.distillation_scale is not None:
            values["distillation_scale"] = outputs.distillation_scale
        for name, stages in losses.items():
            values[name] = stages[-1]
            values[f"{name}_auxiliary"] = stages[:-1].mean()
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss by name, averaged over the steps since the last log and over processes."""
        if "loss" in logs:
            logs |= self._averages.take()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None
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
        """Train; `resume_from_checkpoint=True` continues from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student and its processor; a checkpoint gets the training heads and the recipe beside them."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            if self.model.distillation_head is not None:
                save_file(self.model.distillation_head.state_dict(), Path(output_dir) / HEADS_NAME)
            recipe = json.dumps(asdict(self.recipe), indent=2, default=lambda config: config.to_dict())
            (Path(output_dir) / RECIPE_NAME).write_text(recipe + "\n")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            prefix = "student."
            state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        self.student.save_pretrained(
            output_dir or self.args.output_dir, state_dict=state_dict, is_main_process=self.args.should_save
        )
        if self.args.should_save:
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.student.load_state_dict(load_file(folder / "model.safetensors"))
        if self.model.distillation_head is not None:
            self.model.distillation_head.load_state_dict(load_file(folder / HEADS_NAME))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _check_agreement(model: GKCForOpenVocabSegmentation, recipe: Recipe, teacher: TeacherEmbeddings | None) -> None:
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
    needs_teacher = recipe.distillation_weight > 0 or (
        recipe.synonym_mode == "sample" and recipe.synonym_probabilities == "teacher"
    )
    if needs_teacher and teacher is None:
        raise ValueError(
            "The recipe needs `teacher_embeddings`: pass those of RegionTeacher(clip_image_model).embed_dataset(...), "
            "or set distillation_weight=0 and synonym_probabilities='uniform'."
        )


class _EpochSetter(TrainerCallback):
    """Tells the dataset which epoch it is, also in a resumed run."""

    def __init__(self, dataset: AugmentedDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
