"""Settings of the mini-world experiment: its ablations, the training of its tiny CLIP, and its sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configuration import Recipe, load_recipe


@dataclass(frozen=True)
class CLIPTraining:
    """All that decides the weights of a tiny CLIP."""

    steps: int = 3000
    scenes: int = 8000
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 1e-3
    lean: float = 0.35  # how much the choice of a word depends on the region, see Lexicon
    other_world_share: float = 0.2  # share of a batch that gives words a second sense
    logit_scale_cap: float = 11.0
    half_size_share: float = 0.7  # share of the steps, the first ones, on pictures of half the side: 4 times cheaper
    bfloat16: bool = False  # only faster where the processor has bfloat16 units


@dataclass(frozen=True)
class Ablation:
    """One ablation of the ablation: its title and what it changes.

    Attributes:
        title: For tables.
        changes: Values of the recipe's fields by `section.field`.
        class_feature: Field of the model's configuration, None for the recipe's own.
        test_on_both: Classify by the mean of class and distillation embedding, which must be different ones.
        trained_as: The ablation whose weights are tested, where this one only tests differently.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    class_feature: str | None = None
    test_on_both: bool = False
    trained_as: str | None = None


NO_SYNONYMS, NO_DISTILLATION = {"synonyms.mode": "none"}, {"distillation.weight": 0.0}
OWN_HEAD = {"distillation.embedding": "query"}
# `both` is the method of the paper; these four are the ablation.
MAIN_ABLATIONS = {
    "baseline": Ablation("plain names only", NO_SYNONYMS | NO_DISTILLATION),
    "synonyms": Ablation("+ text diversification", NO_DISTILLATION),
    "distillation": Ablation("+ distillation", NO_SYNONYMS),
    "both": Ablation("+ both"),
}
# Further questions: one thing changed in one of the four.
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
    """All that decides the result.

    Attributes:
        out: Folder of everything that is made.
        seed: Of world, CLIP and segmenter.
        train_scenes, test_scenes: Pictures.
        clip: Training of the tiny CLIP.
        recipe: Training of the segmenter, before an ablation's changes.
        warmup_steps: Steps that all ablations share, before their own: masks alone, every region under the same word.
        ablations: Names of `ABLATIONS`.
        num_proc: Processes that draw scenes.
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
            raise ValueError(f"Unknown ablations {unknown}; choose some of {', '.join(ABLATIONS)}.")
