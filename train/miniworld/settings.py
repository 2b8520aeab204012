"""Settings of the mini-world experiment: its ablations, the training of its tiny CLIP and its dataset sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configuration import Recipe, load_recipe


@dataclass(frozen=True)
class CLIPTraining:
    """Training settings of a tiny CLIP; `SETTING_HELP` describes them."""

    steps: int = 3000
    scenes: int = 8000
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 1e-3
    lean: float = 0.35
    other_world_share: float = 0.2
    logit_scale_cap: float = 11.0
    half_size_share: float = 0.7
    bfloat16: bool = False


SETTING_HELP = {
    "steps": "number of training steps",
    "scenes": "number of scenes to crop training regions from",
    "seed": "random seed",
    "batch_size": "number of images in a batch",
    "learning_rate": "maximum learning rate",
    "lean": "dependence of the words in captions on the region, see lexicon.Lexicon",
    "other_world_share": "fraction of distractor images in a batch, which give words a second sense",
    "logit_scale_cap": "maximum of the learned logit scale",
    "half_size_share": "fraction of the steps, at the start, with images of half the side, at a quarter of the cost",
    "bfloat16": "train in bfloat16, which is faster only on processors with bfloat16 units",
}


@dataclass(frozen=True)
class Ablation:
    """One ablation of the method, as changes to the recipe.

    Attributes:
        title: Title in tables.
        changes: New values of recipe fields by `section.field`.
        class_feature: Value of the model configuration's `class_feature`. None keeps the recipe's value.
        test_on_both: Whether to classify by the mean of class and distillation embeddings in the test.
        trained_as: Name of the ablation whose weights are tested, if this one differs in the test only.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    class_feature: str | None = None
    test_on_both: bool = False
    trained_as: str | None = None


NO_SYNONYMS, NO_DISTILLATION = {"synonyms.mode": "none"}, {"distillation.weight": 0.0}
OWN_HEAD = {"distillation.embedding": "query"}
# The ablations of the paper's table; `both` is the paper's method.
MAIN_ABLATIONS = {
    "baseline": Ablation("plain names only", NO_SYNONYMS | NO_DISTILLATION),
    "synonyms": Ablation("+ text diversification", NO_DISTILLATION),
    "distillation": Ablation("+ distillation", NO_SYNONYMS),
    "both": Ablation("+ both"),
}
# Variants that change one setting of a main ablation.
VARIANTS = {
    "synonyms-unfiltered": Ablation(
        "synonyms, drawn from all words", NO_DISTILLATION | {"synonyms.probabilities": "uniform"}
    ),
    "synonyms-average": Ablation(
        "synonyms, average of the words' logits", NO_DISTILLATION | {"synonyms.mode": "average"}
    ),
    "synonyms-max": Ablation("synonyms, maximum of the words' logits", NO_DISTILLATION | {"synonyms.mode": "max"}),
    "distillation-own-head": Ablation("distillation by a head of its own", NO_SYNONYMS | OWN_HEAD),
    "distillation-own-head-both": Ablation(
        "the same, tested on both embeddings",
        NO_SYNONYMS | OWN_HEAD,
        test_on_both=True,
        trained_as="distillation-own-head",
    ),
    "both-own-head": Ablation("both, distillation by a head of its own", OWN_HEAD),
    "both-own-head-both": Ablation(
        "the same, tested on both embeddings", OWN_HEAD, test_on_both=True, trained_as="both-own-head"
    ),
    "both-long": Ablation("both, three times the steps", {"optimizer.steps": 1200}),
    "both-query": Ablation("both, classes read from the query alone", class_feature="query"),
    "baseline-query": Ablation(
        "plain names only, classes read from the query alone", NO_SYNONYMS | NO_DISTILLATION, class_feature="query"
    ),
}
ABLATIONS = MAIN_ABLATIONS | VARIANTS


@dataclass(frozen=True)
class Experiment:
    """Settings of the experiment with one seed.

    Attributes:
        out: Output folder.
        seed: Random seed of scenes, CLIP and segmenter.
        train_scenes: Number of training images of the segmenter.
        test_scenes: Number of test images.
        clip: Training settings of the tiny CLIP.
        recipe: Training recipe of the segmenter, before the changes of an ablation.
        warmup_steps: Number of mask-only training steps with a single class, which all ablations start from.
        ablations: Names of the ablations to run, keys of `ABLATIONS`.
        num_proc: Number of processes that draw scenes.
    """

    out: Path
    seed: int = 0
    train_scenes: int = 6000
    test_scenes: int = 500
    clip: CLIPTraining = field(default_factory=CLIPTraining)
    recipe: Recipe = field(default_factory=lambda: load_recipe("miniworld"))
    warmup_steps: int = 350
    ablations: tuple[str, ...] = ("both",)
    num_proc: int = 1

    def __post_init__(self):
        unknown = sorted(set(self.ablations) - ABLATIONS.keys())
        if unknown or not self.ablations:
            raise ValueError(f"Unknown ablations {unknown}: choose from {', '.join(ABLATIONS)}.")
