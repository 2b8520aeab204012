"""The sections of a `Recipe`: each is a dataclass that validates itself when it is made."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

CategorySplit = Literal["all", "ignore", "delete"]
Precision = Literal["fp32", "bf16", "fp16"]
TeacherSource = Literal["cached", "online", "labels"]
SynonymMode = Literal["none", "average", "max", "sample"]
SynonymProbabilities = Literal["uniform", "teacher", "boxes"]
DistillationEmbedding = Literal["shared", "query", "projected"]
DistillationTerms = Literal["joint", "split", "feature", "relation"]
DistillationHeads = Literal["common", "per_stage"]
Relation = Literal["cosine", "euclidean"]

SYNONYM_MODES = get_args(SynonymMode)
DISTILLATION_EMBEDDINGS = get_args(DistillationEmbedding)
RELATIONS = get_args(Relation)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks that every field of a `Literal` type holds one of its choices."""

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            if get_origin(each.type) is Literal:
                choices = get_args(each.type)
                self.require(
                    value in choices, f"{self.label(each.name)} must be one of {', '.join(choices)}, got {value!r}."
                )
        self.check()

    def check(self) -> None:
        """Check the values of this section; subclasses extend it.

        Raises:
            ValueError: A value is impossible; the message names the field as it is given on the command line.
        """

    @classmethod
    def label(cls, name: str) -> str:
        """Return the name of a field for messages, such as `optimizer.steps` in backquotes."""
        return f"`{cls.__name__.removesuffix('Section').lower()}.{name}`"

    @staticmethod
    def require(condition: bool, message: str) -> None:
        """Raise a `ValueError` with the message unless the condition holds."""
        if not condition:
            raise ValueError(message)

    def require_numbers(
        self, names: Iterable[str], low: float = 0, high: float = math.inf, low_is_allowed: bool = True
    ) -> None:
        """Check that fields are finite numbers within bounds; fields that are None are skipped.

        Args:
            names: Names of the fields.
            low: Lower bound.
            high: Upper bound.
            low_is_allowed: Whether a value may equal the lower bound.

        Raises:
            ValueError: A value is no number or out of bounds; the message names the field.
        """
        wanted = f"must lie between {low} and {high}" if high < math.inf else "must not be negative"
        for name in names:
            value = getattr(self, name)
            if value is not None:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                self.require(is_number, f"{self.label(name)} must be a number, got {value!r}.")
                above = value >= low if low_is_allowed else value > low
                text = wanted if low_is_allowed else "must be positive"
                self.require(
                    math.isfinite(value) and above and value <= high, f"{self.label(name)} {text}, got {value}."
                )


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    """The dataset, how it is read, and how its images are augmented.

    Attributes:
        dataset: Training dataset: a folder that `train.data.prepare`, `train.data.from_folder` or `save_to_disk`
            wrote, or the name of a dataset on the Hub.
        vocabulary: Training vocabulary: the name of a packaged one (`gkc vocab list`), a vocabulary file, or `dataset`
            for the vocabulary.json in the dataset's folder. The value `none` means the same as `dataset`.
        train_split: Split of the dataset to train on.
        eval_split: Split of the dataset to evaluate on during training. The value `none` turns evaluation off.
        category_split: Classes to train on: `all`; or only the classes that the vocabulary does not mark as novel,
            where regions of novel classes become void (`ignore`) or images that contain them are left out (`delete`).
        streaming: Read the dataset sequentially instead of by random access.
        max_broken_samples: Number of unreadable samples that are logged and skipped before training stops.
        num_workers: Number of data loading processes of each training process.
        batch_size: Number of images in an optimizer step, summed over all processes and accumulated micro-batches.
        crop_size: Side of the square training crops in pixels. The value `none` keeps images at their own size.
        scale_range: Smallest and largest scale factor of the random resizing before cropping.
        flip_probability: Probability of a horizontal flip.
        ignore_void: Leave void pixels out of the matching and of the mask losses. Otherwise they count as outside of
            every segment, as published.
        region_dropout: Probability that distillation and grounding leave an annotated region out of a step. It is
            drawn again each time an image is seen.
    """

    dataset: str | None = None
    vocabulary: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    category_split: CategorySplit = "all"
    streaming: bool = False
    max_broken_samples: int = 100
    num_workers: int = 4
    batch_size: int = 112
    crop_size: int | None = 512
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip_probability: float = 0.5
    ignore_void: bool = False
    region_dropout: float = 0.0

    def check(self) -> None:
        """Check counts, probabilities and the scale range."""
        self.require_numbers(("batch_size", "crop_size"), low_is_allowed=False)
        self.require_numbers(("max_broken_samples", "num_workers"))
        self.require_numbers(("flip_probability", "region_dropout"), high=1)
        low, high = self.scale_range
        self.require(
            0 < low <= high < math.inf,
            f"{self.label('scale_range')} must be two positive factors in ascending order, got {self.scale_range}.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    """The weights that training starts from, and the architecture where they leave it open.

    Attributes:
        init_from: GKC checkpoint to start from: a folder or a name on the Hub. It settles the architecture, so
            `backbone` and `config` must not be given with it.
        clip: CLIP that provides the text encoder, the distillation teacher and, unless `backbone` is given, the
            backbone: a folder that `gkc convert clip-resnet` wrote, or the folder or Hub name of a transformers
            CLIPModel.
        text_from: Checkpoint whose text encoder, tokenizer and prompt templates a new model gets, instead of those of
            `clip`; it needs `backbone`, or a backbone in `config`.
        backbone: Pretrained backbone to use instead of CLIP's image encoder: a folder or a name on the Hub, such as
            that of an ImageNet ResNet.
        frozen_stages: Number of backbone stages that are not trained. The stem is frozen with the first stage.
        config: Fields of `GKCConfig` that differ from its defaults, such as `model.config.num_queries=50`. The fields
            of section `matching` are set there.
    """

    init_from: str | None = None
    clip: str | None = None
    text_from: str | None = None
    backbone: str | None = None
    frozen_stages: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check that no field of section `matching` is set in `config`."""
        self.require_numbers(("frozen_stages",))
        clash = sorted(self.config.keys() & {each.name for each in fields(MatchingSection)})
        self.require(
            not clash,
            f"{self.label('config')} must not contain {clash}: set them in the section `matching` of the recipe.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(Section):
    """Length of the training, AdamW and its learning rate schedule.

    Attributes:
        steps: Number of optimizer steps.
        learning_rate: Learning rate of AdamW before any decay.
        backbone_factor: Factor of the learning rate for the parameters of the backbone.
        weight_decay: Weight decay of all parameters except those of normalization layers and embeddings.
        max_grad_norm: Norm to which gradients are clipped.
        milestones: Fractions of the training after which the learning rate is multiplied by `decay_factor`.
        decay_factor: Factor of the learning rate at each milestone.
        warmup_share: Fraction of the training in which the learning rate grows linearly from zero.
        precision: Number format of the forward pass: `fp32`, or mixed precision with `bf16` or `fp16`.
        accumulation: Number of micro-batches that each process accumulates in an optimizer step.
    """

    steps: int = 50_000
    learning_rate: float = 3e-4
    backbone_factor: float = 0.1
    weight_decay: float = 0.05
    max_grad_norm: float = 0.01
    milestones: tuple[float, ...] = (0.8, 0.9)
    decay_factor: float = 0.1
    warmup_share: float = 0.0
    precision: Precision = "fp32"
    accumulation: int = 1

    def check(self) -> None:
        """Check counts, rates and milestones."""
        positive = ("steps", "learning_rate", "max_grad_norm", "decay_factor", "accumulation")
        self.require_numbers(positive, low_is_allowed=False)
        self.require_numbers(("backbone_factor", "weight_decay"))
        self.require_numbers(("warmup_share",), high=1)
        self.require(
            list(self.milestones) == sorted(self.milestones) and all(0 < share < 1 for share in self.milestones),
            f"{self.label('milestones')} must be fractions between 0 and 1 in ascending order, got {self.milestones}.",
        )


@dataclass(frozen=True, kw_only=True)
class RunSection(Section):
    """The random seed, compilation, and how often a run saves, evaluates and logs.

    Attributes:
        seed: Seed of new weights, of the order of the data, and of every random draw.
        compile: Compile the student with `torch.compile`.
        save_every: Number of steps between checkpoints.
        evaluate_every: Number of steps between evaluations.
        log_every: Number of steps between log lines.
    """

    seed: int = 0
    compile: bool = False
    save_every: int = 1000
    evaluate_every: int = 5000
    log_every: int = 50

    def check(self) -> None:
        """Check seed and intervals."""
        self.require_numbers(("seed",))
        self.require_numbers(("save_every", "evaluate_every", "log_every"), low_is_allowed=False)


@dataclass(frozen=True, kw_only=True)
class MatchingSection(Section):
    """Matching of queries with annotated regions, and the classification and mask losses; as in `GKCConfig`.

    Attributes:
        class_weight: Weight of the cross-entropy over classes, in the loss and in the matching cost.
        mask_weight: Weight of the binary cross-entropy of masks, in the loss and in the matching cost.
        dice_weight: Weight of the dice loss of masks, in the loss and in the matching cost.
        no_object_weight: Weight of the no-object class in every cross-entropy over classes.
        train_num_points: Number of points at which masks are compared.
        oversample_ratio: Ratio of candidate points to points in the importance sampling of the mask losses.
        importance_sample_ratio: Fraction of the points that are chosen among the candidates by uncertainty.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    train_num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    def check(self) -> None:
        """Check weights and point sampling."""
        self.require_numbers(("train_num_points",), low_is_allowed=False)
        self.require_numbers(("class_weight", "mask_weight", "dice_weight", "no_object_weight"))
        self.require_numbers(("importance_sample_ratio",), high=1)


@dataclass(frozen=True, kw_only=True)
class TeacherSection(Section):
    """The frozen teacher that embeds annotated regions: a CLIP image encoder, or the model that labeled the images.

    Attributes:
        source: Where embeddings of regions come from: `cached` reads those that `python -m train.cache teacher` wrote,
            `online` computes them in every step from the augmented images, and `labels` reads those that
            `python -m train distil` stored with its labels, which needs no CLIP.
    """

    source: TeacherSource = "cached"


@dataclass(frozen=True, kw_only=True)
class SynonymsSection(Section):
    """Text diversification: classification of regions under other names of their class.

    Attributes:
        mode: How the synonyms of a class are used: `average` or `max` reduces their logits to one logit per class,
            `sample` draws one synonym for each region, and `none` turns text diversification off.
        weight: Weight of the loss.
        probabilities: Synonyms that `sample` draws from: all of the class (`uniform`), or those that CLIP finds
            probable for the region, judged by the teacher's embedding of the masked region (`teacher`) or by the
            region's box with its surroundings (`boxes`, as published; needs `python -m train.cache synonyms`).
        threshold: Probability above which a synonym may be drawn.
        logit_scale: Factor of the cosine similarities in the probabilities of `teacher`; 100 for OpenAI's CLIP.
    """

    mode: SynonymMode = "sample"
    weight: float = 10.0
    probabilities: SynonymProbabilities = "uniform"
    threshold: float = 0.1
    logit_scale: float = 100.0

    def check(self) -> None:
        """Check weight, threshold and scale."""
        self.require_numbers(("weight",))
        self.require_numbers(("threshold",), high=1)
        self.require_numbers(("logit_scale",), low_is_allowed=False)


@dataclass(frozen=True, kw_only=True)
class DistillationSection(Section):
    """Text-guided distillation: matched queries learn the teacher's embeddings of their regions.

    Attributes:
        weight: Weight of the loss. Zero turns distillation off.
        embedding: Embedding that is distilled: the class embedding itself (`shared`), or a linear map that only
            training has, of the query feature (`query`, as published) or of the class embedding (`projected`).
        terms: How the feature term and the relation term are combined: all residuals averaged together (`joint`), the
            two means added (`split`), or one term alone (`feature` or `relation`).
        relation: Measure that the relation term compares: `cosine` similarity or `euclidean` distance.
        relation_weight: Weight of the relation term with `terms=split`, where `weight` is that of the feature term.
            The value `none` means the same as `weight`.
        max_regions: Largest number of regions that are distilled in a step, over all processes and accumulated
            micro-batches. They are chosen at random. Published: 200 on each of 8 GPUs.
        heads: Linear maps of `query` and `projected`: one for all decoder stages (`common`) or one for each
            (`per_stage`).
    """

    weight: float = 10.0
    embedding: DistillationEmbedding = "shared"
    terms: DistillationTerms = "joint"
    relation: Relation = "cosine"
    relation_weight: float | None = None
    max_regions: int = 200
    heads: DistillationHeads = "common"

    def check(self) -> None:
        """Check weights, the limit of regions, and that `per_stage` has a map to repeat."""
        self.require_numbers(("weight",))
        self.require_numbers(("max_regions",), low_is_allowed=False)
        self.require(
            self.heads == "common" or self.embedding != "shared",
            f"{self.label('heads')} = 'per_stage' needs a linear map, and {self.label('embedding')} = 'shared' has "
            "none: choose another embedding.",
        )


@dataclass(frozen=True, kw_only=True)
class GroundingSection(Section):
    """Caption grounding: contrastive alignment of matched queries with the nouns of captions.

    Attributes:
        weight: Weight of the loss. Zero turns grounding off.
        noun_dropout: Probability that a noun of a caption is left out.
        max_nouns: Largest number of nouns of a caption that are used.
    """

    weight: float = 0.0
    noun_dropout: float = 0.25
    max_nouns: int = 5

    def check(self) -> None:
        """Check weight, probability and limit."""
        self.require_numbers(("weight",))
        self.require_numbers(("noun_dropout",), high=1)
        self.require_numbers(("max_nouns",), low_is_allowed=False)
