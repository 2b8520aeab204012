"""`GKCTrainer`: transformers' Trainer with the paper's losses; a step runs no CLIP.

Letters: B images, Q queries, N regions of the batch, D width of the image-text space, P words of the vocabulary,
S decoder stages.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ModelOutput

from configuration import Recipe
from modeling_gkc.loss_gkc import GKCCriterion, Matches, mean_over_processes
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation, GKCForOpenVocabSegmentationOutput
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from .data import AugmentedDataset, JointTransform, SegmentationCollator
from .distillation import DistillationHead, text_guided_distillation_loss
from .optimization import learning_rate_factor, parameter_groups
from .teacher import TeacherEmbeddings, TextBank
from .text_diversification import (
    assign_slots,
    clustered_synonym_loss,
    draw_synonyms,
    sampled_synonym_loss,
    synonym_probabilities,
    synonym_table,
)

HEADS_NAME = "training_heads.safetensors"
RECIPE_NAME = "recipe.json"
TRAINER_STATE_NAME = "trainer_state.json"  # as transformers names it


@dataclass
class TrainingOutput(ModelOutput):
    """Output of `TrainingModel`.

    Attributes:
        prompt_logits: for each stage (B, Q, P + 1) logits of all words and no-object; with text diversification.
        distillation_embeds: for each stage (B, Q, D) unit vectors; with distillation.
        distillation_scale: the learned scalar s; with distillation.
        student: the student's own output.
    """

    prompt_logits: tuple[Tensor, ...] | None = None
    distillation_embeds: tuple[Tensor, ...] | None = None
    distillation_scale: Tensor | None = None
    student: GKCForOpenVocabSegmentationOutput | None = None


class TrainingModel(nn.Module):
    """The student and the head that only training needs, in one module for optimiser, clipping and processes.

    Only `student` is ever saved as a model.
    """

    accepts_loss_kwargs = False

    def __init__(self, student: GKCForOpenVocabSegmentation, distillation_head: DistillationHead | None):
        super().__init__()
        self.student = student
        self.distillation_head = distillation_head

    def forward(self, prompt_embeds: Tensor | None = None, **inputs: Any) -> TrainingOutput:
        """Run the student and, on all of its stages, the heads; `prompt_embeds` (P, D) are all words."""
        outputs = self.student(**inputs, output_stages=True)
        prompt_logits = distillation_embeds = scale = None
        if prompt_embeds is not None:
            prompt_logits = tuple(
                self.student.class_logits(stage.query_embeds, prompt_embeds) for stage in outputs.stages
            )
        if self.distillation_head is not None:
            distillation_embeds = tuple(self.distillation_head(stage) for stage in outputs.stages)
            scale = self.distillation_head.scale
        return TrainingOutput(prompt_logits, distillation_embeds, scale, outputs)


@dataclass
class Regions:
    """The annotated regions of a batch, side by side, and what the losses compare them with.

    Attributes:
        counts: regions of each image.
        classes: (N,) positions in the vocabulary.
        prompts: (N,) the word that each region goes by in this step.
        teacher: (N, D) the teacher's embeddings, None without.
        distilled: (N,) bool, which regions distillation uses.
        slot_prompts, slot_labels: see `train.text_diversification.assign_slots`; in mode `sample`.
    """

    counts: list[int]
    classes: Tensor
    prompts: Tensor
    teacher: Tensor | None
    distilled: Tensor
    slot_prompts: list[Tensor] | None = None
    slot_labels: list[Tensor] | None = None

    def pairs(self, matches: Matches) -> tuple[Tensor, Tensor, Tensor]:
        """Matched (image, query, region), each (pairs,), of the regions that are distilled."""
        device = self.classes.device
        first = 0
        images, queries, regions = [], [], []
        for image, ((matched_queries, matched_regions), count) in enumerate(zip(matches, self.counts, strict=True)):
            images.append(torch.full_like(matched_queries, image))
            queries.append(matched_queries)
            regions.append(matched_regions + first)
            first += count
        image, query, region = (torch.cat(parts).to(device) for parts in (images, queries, regions))
        kept = self.distilled[region]
        return image[kept], query[kept], region[kept]


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
        self.teacher_embeddings = teacher_embeddings
        transform = JointTransform(recipe.crop_size, recipe.scale_range, recipe.flip_probability)
        unchanged = JointTransform(recipe.crop_size, scale_range=(1.0, 1.0), flip_probability=0.0)
        augmented = AugmentedDataset(train_dataset, transform, recipe.seed)
        super().__init__(
            model=TrainingModel(model, _distillation_head(model, recipe)),
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
        self.text_bank = text_bank.to(self.args.device)
        self._synonym_table = synonym_table(text_bank.class_ids)
        self._averages = _Averages()

    @property
    def student(self) -> GKCForOpenVocabSegmentation:
        """The model that is trained and saved."""
        return self.accelerator.unwrap_model(self.model).student

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor | tuple[Tensor, TrainingOutput]:
        """The student's own loss, synonyms and distillation at every stage, all from the same matches."""
        regions = self._regions(inputs)
        outputs = self._forward(model, inputs)
        losses = _student_losses(outputs.student)
        if outputs.prompt_logits is not None:
            losses |= self._synonym_losses(outputs, inputs, regions)
        if outputs.distillation_embeds is not None:
            losses |= self._distillation_losses(outputs, regions)
        self._check_finite(losses, inputs["image_ids"])
        if model.training:
            self._averages.add(self._log_values(losses, outputs, regions))
        loss = sum(weight * losses[name].sum() for name, weight in self._weights().items() if name in losses)
        return (loss, outputs) if return_outputs else loss

    def _regions(self, inputs: dict[str, Any]) -> Regions:
        """Look up what the losses compare the regions with, and make this step's draws."""
        # Seeded from the random state that checkpoints hold, and on the CPU: the same on every device and resumed.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        classes = torch.cat(inputs["class_labels"])
        teacher = None
        if self.teacher_embeddings is not None:
            teacher = self.teacher_embeddings.lookup(inputs["image_ids"], inputs["segment_ids"])
            teacher = torch.cat(teacher).to(classes.device)
        regions = Regions(
            counts=[len(labels) for labels in inputs["class_labels"]],
            classes=classes,
            prompts=self._draw_prompts(classes, teacher, generator),
            teacher=teacher,
            distilled=_choose(len(classes), self.recipe.distillation_max_regions, generator).to(classes.device),
        )
        if self.recipe.synonym_mode == "sample":
            words = regions.prompts.split(regions.counts)
            slots = [
                assign_slots(labels, prompts, self.text_bank.name_prompts)
                for labels, prompts in zip(inputs["class_labels"], words, strict=True)
            ]
            regions.slot_prompts, regions.slot_labels = map(list, zip(*slots, strict=True))
        return regions

    def _draw_prompts(self, classes: Tensor, teacher: Tensor | None, generator: torch.Generator) -> Tensor:
        """(N,) the word that each region goes by: its class's name, or a drawn synonym in mode `sample`."""
        if self.recipe.synonym_mode != "sample":
            return self.text_bank.name_prompts[classes]
        probabilities = None
        if self.recipe.synonym_probabilities == "teacher":
            probabilities = synonym_probabilities(
                teacher, classes, self._synonym_table, self.text_bank.embeds, self.recipe.synonym_logit_scale
            )
        return draw_synonyms(classes, self._synonym_table, generator, probabilities, self.recipe.synonym_threshold)

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> TrainingOutput:
        given = {name: inputs.get(name) for name in ("pixel_values", "pixel_mask", "mask_labels", "class_labels")}
        name_prompts = self.text_bank.name_prompts
        try:
            return model(
                **given,
                class_embeds=self.text_bank.embeds[name_prompts],
                class_ids=torch.arange(len(name_prompts), device=name_prompts.device),
                prompt_embeds=None if self.recipe.synonym_mode == "none" else self.text_bank.embeds,
            )
        except ValueError as error:
            raise RuntimeError(f"{self._place(inputs['image_ids'])}: {error}") from error

    def _synonym_losses(self, outputs: TrainingOutput, inputs: dict[str, Any], regions: Regions) -> dict[str, Tensor]:
        mode, no_object_weight = self.recipe.synonym_mode, self.recipe.no_object_weight
        losses = []
        for logits, matches in zip(outputs.prompt_logits, outputs.student.matches, strict=True):
            if mode == "sample":
                slots = regions.slot_prompts, regions.slot_labels
                losses.append(sampled_synonym_loss(logits, *slots, matches, no_object_weight))
            else:
                targets = self.text_bank.class_ids, inputs["class_labels"]
                losses.append(
                    clustered_synonym_loss(
                        logits, *targets, matches, no_object_weight, mode, self.text_bank.num_classes
                    )
                )
        return {"loss_synonym": torch.stack(losses)}

    def _distillation_losses(self, outputs: TrainingOutput, regions: Regions) -> dict[str, Tensor]:
        losses = []
        for embeds, matches in zip(outputs.distillation_embeds, outputs.student.matches, strict=True):
            image, query, region = regions.pairs(matches)
            terms = text_guided_distillation_loss(
                student=embeds[image, query].float(),
                teacher=regions.teacher[region],
                text=self.text_bank.embeds[regions.prompts[region]],
                image_index=image,
                scale=outputs.distillation_scale,
                relation=self.recipe.distillation_relation,
            )
            losses.append(torch.stack(terms))
        feature, relation, joint = torch.stack(losses, dim=1)
        return {
            "loss_distillation_feature": feature,
            "loss_distillation_relation": relation,
            "loss_distillation_joint": joint,
        }

    def _weights(self) -> dict[str, float]:
        """Weight of each loss that is learned from; the others are only logged."""
        recipe = self.recipe
        terms = {"split": ("feature", "relation")}.get(recipe.distillation_terms, (recipe.distillation_terms,))
        return {
            "loss_cross_entropy": recipe.class_weight,
            "loss_mask": recipe.mask_weight,
            "loss_dice": recipe.dice_weight,
            "loss_synonym": recipe.synonym_weight,
            **{f"loss_distillation_{term}": recipe.distillation_weight for term in terms},
        }

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


def _student_losses(outputs: GKCForOpenVocabSegmentationOutput) -> dict[str, Tensor]:
    """The student's losses by name, each (S,)."""
    auxiliary = range(len(outputs.stages) - 1)
    return {
        name: torch.stack([*(outputs.loss_dict[f"{name}_{stage}"] for stage in auxiliary), outputs.loss_dict[name]])
        for name in GKCCriterion.names
    }


def _choose(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """(count,) bool, at most `limit` of them true, at random."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=generator)[:limit]] = True
    return chosen


def last_complete_checkpoint(output_dir: str | Path) -> Path:
    """The checkpoint of most steps whose writing was not interrupted.

    Raises:
        ValueError: there is none.
    """
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    checkpoints = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix(prefix)), reverse=True):
        try:
            # The Trainer writes this file last.
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return path
    raise ValueError(f"There is no complete checkpoint in {output_dir}; train without `resume_from_checkpoint`.")


def _distillation_head(model: GKCForOpenVocabSegmentation, recipe: Recipe) -> DistillationHead | None:
    if recipe.distillation_weight == 0:
        return None
    sizes = model.config.hidden_size, model.config.projection_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = DistillationHead(recipe.distillation_embedding, *sizes)
    # A parameter that no loss reaches would stop distributed training.
    head.scale.requires_grad_(recipe.distillation_terms != "feature")
    return head


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


class _Averages:
    """Running means of named scalars, kept on the device until they are taken."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call and over processes."""
        if not self.sums:
            return {}
        device = next(iter(self.sums.values())).device
        means = mean_over_processes(torch.stack([value.to(device) for value in self.sums.values()]) / self.count)
        averages = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.count = {}, 0
        return averages
