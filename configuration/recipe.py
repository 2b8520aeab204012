"""`Recipe`: everything that decides a training run, validated when it is made."""

import importlib
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

SYNONYM_MODES = ("none", "average", "max", "sample")
SYNONYM_PROBABILITIES = ("uniform", "teacher", "boxes")
TEACHERS = ("cached", "online")
CATEGORY_SPLITS = ("all", "ignore", "delete")
DISTILLATION_EMBEDDINGS = ("shared", "query", "projected")
DISTILLATION_TERMS = ("joint", "split", "feature", "relation")
DISTILLATION_HEADS = ("common", "per_stage")
RELATIONS = ("cosine", "euclidean")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    The defaults are the settings of the paper's R-50 row but for six, which its recipe `coco_clip_r50` sets:
    `precision` (published: mixed), `synonym_probabilities` (published: those of CLIP for the region's box),
    `distillation_embedding` (published: `query`), `distillation_max_regions` (published: 200 on each of 8 GPUs),
    `region_dropout` (published: 0.5) and `grounding_weight` (published: 10).

    Attributes:
        vocabulary: Name of the training vocabulary, or None where the caller gives one.
        model: Fields of `GKCConfig` that differ from its defaults, the losses' ones below excepted.
        steps: Optimiser steps.
        batch_size: Images per step over all processes and accumulated batches.
        crop_size, scale_range, flip_probability: Augmentation, see `train.data.JointTransform`.
        learning_rate: Of AdamW, at the start.
        backbone_factor: Learning rate of the backbone over that of the rest.
        weight_decay: Of all parameters but those of normalisations and embeddings.
        max_grad_norm: Gradients are clipped to this norm.
        milestones: Shares of the steps after which the learning rate is multiplied by `decay_factor`.
        decay_factor: See `milestones`.
        warmup_share: Share of the steps over which the learning rate grows linearly from zero.
        precision: `fp32`, or mixed `bf16` or `fp16`.
        accumulation: Micro-batches that a process accumulates before each optimiser step.
        frozen_stages: Stages of the backbone, the stem counted with the first, that are not trained.
        compile: Compile the student with `torch.compile`.
        dataset: Folder that `save_to_disk`, `train.data.prepare` or `train.data.from_folder` wrote, or a dataset's
            name on the Hub.
        train_split, eval_split: Its splits; None evaluates nothing.
        category_split: All classes (`all`); or only those that the vocabulary does not mark as novel, the regions of
            the others void (`ignore`), or images with such regions left out (`delete`).
        streaming: Read the dataset in its order, without random access.
        max_broken_samples: Samples that cannot be read are logged and skipped up to this number; one more stops.
        num_workers: Processes that read and augment, for each training process.
        clip: Folder or Hub name of the CLIP that gives backbone, text tower and teacher, as `gkc convert` writes it.
        backbone: Folder or Hub name of another backbone's pretrained weights, such as those of an ImageNet ResNet; its
            `backbone_config` may stand in `model`. None takes CLIP's image tower.
        init_from: Folder or Hub name of a GKC checkpoint to start from instead.
        save_every, evaluate_every, log_every: Steps between checkpoints, evaluations and log lines.
        seed: Of weights, data order, augmentation and draws.
        class_weight, mask_weight, dice_weight: Weights of plain names and masks, in the loss and in the matching.
        no_object_weight: Weight of the no-object class in the cross-entropies.
        train_num_points, oversample_ratio, importance_sample_ratio: Point sampling of the mask losses.
        synonym_mode: Text diversification: `none`, `average`, `max` or `sample`.
        synonym_weight: Its weight.
        synonym_probabilities: Words that `sample` may draw: all (`uniform`), or those that CLIP finds probable for
            the region: by the teacher's embedding of the region alone (`teacher`), or by the region's box with its
            surroundings, as published (`boxes`, made by `train.cache synonyms`).
        synonym_threshold: What a probability must exceed.
        synonym_logit_scale: Temperature of those probabilities: that of the teacher, 100 for OpenAI's CLIP.
        distillation_weight: Weight of text-guided distillation; zero leaves it out.
        distillation_embedding: What is distilled: the class embedding itself (`shared`), or a map of the query's
            feature (`query`, as published) or of the class embedding (`projected`) that only training has.
        distillation_terms: All residuals averaged together (`joint`), the two terms added (`split`), or one alone.
        distillation_relation: `cosine` or `euclidean`.
        distillation_relation_weight: Weight of the relation term in `split`, where `distillation_weight` is that of
            the feature term; None for the same.
        distillation_max_regions: Regions of one step, over all processes and accumulated batches, that are distilled
            at most; which ones is drawn. Published: 200 on each of 8 GPUs.
        distillation_heads: One map for all decoder stages (`common`) or one each (`per_stage`); `shared` has none.
        teacher: Where the teacher's embeddings of regions come from: made once (`cached`, `train.cache teacher`), or
            computed in every step from the augmented crops (`online`).
        region_dropout: Share of the annotated regions that distillation and grounding leave out, drawn anew each time
            an image is seen.
        grounding_weight: Weight of caption grounding, on the class embeddings of the last stage; zero leaves it out.
        grounding_noun_dropout: Share of a caption's nouns that are left out.
        grounding_max_nouns: Nouns of a caption at most.
    """

    vocabulary: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    steps: int = 50_000
    batch_size: int = 112
    crop_size: int | None = 512
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip_probability: float = 0.5

    learning_rate: float = 3e-4
    backbone_factor: float = 0.1
    weight_decay: float = 0.05
    max_grad_norm: float = 0.01
    milestones: tuple[float, ...] = (0.8, 0.9)
    decay_factor: float = 0.1
    warmup_share: float = 0.0
    precision: str = "fp32"
    accumulation: int = 1
    frozen_stages: int = 0
    compile: bool = False
    seed: int = 0

    dataset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    category_split: str = "all"
    streaming: bool = False
    max_broken_samples: int = 100
    num_workers: int = 4
    clip: str | None = None
    backbone: str | None = None
    init_from: str | None = None
    save_every: int = 1000
    evaluate_every: int = 5000
    log_every: int = 50

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    train_num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    synonym_mode: str = "sample"
    synonym_weight: float = 10.0
    synonym_probabilities: str = "uniform"
    synonym_threshold: float = 0.1
    synonym_logit_scale: float = 100.0
    distillation_weight: float = 10.0
    distillation_embedding: str = "shared"
    distillation_terms: str = "joint"
    distillation_relation: str = "cosine"
    distillation_relation_weight: float | None = None
    distillation_max_regions: int = 200
    distillation_heads: str = "common"
    teacher: str = "cached"
    region_dropout: float = 0.0
    grounding_weight: float = 0.0
    grounding_noun_dropout: float = 0.25
    grounding_max_nouns: int = 5

    def __post_init__(self):
        self._check_numbers()
        self._check_choices()
        low, high = self.scale_range
        _require(0 < low <= high, f"`scale_range` must be two rising positive factors, got {self.scale_range}.")
        _require(
            list(self.milestones) == sorted(self.milestones) and all(0 < share < 1 for share in self.milestones),
            f"`milestones` must be rising shares of the steps between 0 and 1, got {self.milestones}.",
        )
        _require(
            self.distillation_heads == "common" or self.distillation_embedding != "shared",
            "`distillation_heads` = 'per_stage' needs a map, which `distillation_embedding` = 'shared' has not.",
        )
        clash = sorted(self.model.keys() & _MODEL_FIELDS)
        _require(not clash, f"`model` must not hold {clash}: set the recipe's own fields of these names.")

    def _check_numbers(self):
        positive = ("steps", "batch_size", "learning_rate", "max_grad_norm", "decay_factor", "train_num_points")
        every = ("save_every", "evaluate_every", "log_every")
        counts = ("distillation_max_regions", "accumulation", "grounding_max_nouns", *every)
        for name in (*positive, "synonym_logit_scale", *counts):
            _require(getattr(self, name) > 0, f"`{name}` must be positive, got {getattr(self, name)}.")
        _require(self.crop_size is None or self.crop_size > 0, f"`crop_size` must be positive, got {self.crop_size}.")
        weights = ("class_weight", "mask_weight", "dice_weight", "no_object_weight", "synonym_weight")
        counts = ("seed", "frozen_stages", "max_broken_samples", "num_workers")
        for name in (*weights, "distillation_weight", "grounding_weight", "weight_decay", "backbone_factor", *counts):
            _require(getattr(self, name) >= 0, f"`{name}` must not be negative, got {getattr(self, name)}.")
        shares = ("flip_probability", "warmup_share", "synonym_threshold", "importance_sample_ratio")
        for name in (*shares, "region_dropout", "grounding_noun_dropout"):
            _require(0 <= getattr(self, name) <= 1, f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")

    def _check_choices(self):
        choices = {
            "precision": PRECISIONS,
            "synonym_mode": SYNONYM_MODES,
            "synonym_probabilities": SYNONYM_PROBABILITIES,
            "distillation_embedding": DISTILLATION_EMBEDDINGS,
            "distillation_terms": DISTILLATION_TERMS,
            "distillation_relation": RELATIONS,
            "distillation_heads": DISTILLATION_HEADS,
            "teacher": TEACHERS,
            "category_split": CATEGORY_SPLITS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")

    def model_settings(self) -> dict[str, Any]:
        """Fields of the `GKCConfig` that this recipe trains: `GKCConfig(**recipe.model_settings(), ...)`."""
        return {**self.model, **self.loss_settings()}

    def loss_settings(self) -> dict[str, Any]:
        """Those of `model_settings` that belong to the losses."""
        return {name: getattr(self, name) for name in sorted(_MODEL_FIELDS)}

    def to_training_arguments(self, output_dir: str | os.PathLike, **overrides: Any) -> "TrainingArguments":
        """Arguments for `GKCTrainer`.

        The batch is shared by processes and accumulated micro-batches, which changes no gradient, see `GKCTrainer`.

        Args:
            output_dir: Where checkpoints go.
            overrides: Any further `TrainingArguments`, such as `save_steps`.

        Raises:
            ValueError: the batch cannot be divided among processes and accumulated batches.
        """
        accumulation = overrides.get("gradient_accumulation_steps", self.accumulation)
        parts = int(os.environ.get("WORLD_SIZE", "1")) * accumulation
        _require(
            self.batch_size % parts == 0,
            f"`batch_size` = {self.batch_size} cannot be divided among {parts} processes times accumulated batches; "
            "change one of them.",
        )
        import torch
        from transformers import TrainingArguments

        settings = {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size // parts,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
            "seed": self.seed,
            "data_seed": self.seed,
            "remove_unused_columns": False,
            "dataloader_drop_last": True,
            "ddp_find_unused_parameters": False,
            "logging_nan_inf_filter": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "report_to": "none",
        }
        return TrainingArguments(output_dir=os.fspath(output_dir), **{**settings, **overrides})


_MODEL_FIELDS = {
    "class_weight",
    "mask_weight",
    "dice_weight",
    "no_object_weight",
    "train_num_points",
    "oversample_ratio",
    "importance_sample_ratio",
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def load_recipe(name: str, **changes: Any) -> Recipe:
    """The recipe of `configuration/recipes/<name>.py`, with some fields changed.

    Raises:
        ValueError: there is no such recipe, or a change cannot be.
    """
    from . import recipes

    known = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))
    _require(name in known, f"There is no recipe {name!r}; there are {', '.join(known)}.")
    recipe: Recipe = importlib.import_module(f"{recipes.__name__}.{name}").RECIPE
    fields = recipe.__dataclass_fields__
    unknown = sorted(changes.keys() - fields.keys())
    _require(not unknown, f"A recipe has no field {', '.join(unknown)}; it has {', '.join(fields)}.")
    return replace(recipe, **changes)
