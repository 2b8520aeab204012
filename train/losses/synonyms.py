"""Text diversification: classification of regions under other names of their classes.

Letters: B images, Q queries, N annotated regions of an image, K classes, P prompts (all names of all classes),
M most names of a class, S slots of an image (K of the classes, then extra ones). Logits end with the no-object column.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from configuration import Recipe
from modeling_gkc.loss_gkc import Matches, classification_loss
from modeling_gkc.modeling_gkc import (
    GKCForOpenVocabSegmentation,
    GKCForOpenVocabSegmentationOutput,
    reduce_prompt_logits,
)

from ..teacher.caches import RegionCaches
from ..teacher.region_teacher import SynonymProbabilities
from ..teacher.synonym_probabilities import BoxSynonyms, synonym_probabilities, synonym_table
from .base import Batch, LossContext, Regions, StepDivisors, TrainingLoss, TrainingOutput

CLUSTER_REDUCTIONS = {"average": "mean", "max": "max"}
SYNONYM_MODES = (*CLUSTER_REDUCTIONS, "sample")


class SynonymLoss(TrainingLoss):
    """Cross-entropy over classes that go by several names, at every decoder stage.

    With `mode=sample`, `Regions.prepared` holds the prompts in the slots of each image and the slots of its regions,
    see `assign_slots`.
    """

    name = "synonyms"
    sources = ("name_probabilities",)

    @classmethod
    def is_enabled(cls, recipe: Recipe) -> bool:
        """Whether the mode is not `none`. With a weight of zero, distillation still uses the sampled names."""
        return recipe.synonyms.mode != "none"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of `loss_synonym`."""
        return {"loss_synonym": self.settings.weight}

    @property
    def needs_teacher(self) -> bool:
        """Whether names are drawn by the teacher's embedding of the region."""
        return self.settings.mode == "sample" and self.settings.probabilities == "teacher"

    setting_without_clip = "synonyms.probabilities=uniform"

    def load_sources(self, caches: RegionCaches) -> dict[str, Any]:
        """Open the stored probabilities of each region's names, if they are drawn by them."""
        if self.settings.mode != "sample" or self.settings.probabilities != "boxes":
            return {}
        source = BoxSynonyms(caches.require_towers(self.setting_without_clip), caches.vocabulary)
        columns = max(map(len, caches.trained_vocabulary.names))
        return {"name_probabilities": caches.open(SynonymProbabilities, source, columns)}

    def setup(self, context: LossContext) -> None:
        """Take the probabilities of each region's names, if they are drawn by them.

        Raises:
            ValueError: Probabilities are needed and were not given.
        """
        super().setup(context)
        self._word_probabilities = context.sources.get("name_probabilities")
        is_boxes = self.settings.mode == "sample" and self.settings.probabilities == "boxes"
        if is_boxes and self._word_probabilities is None:
            raise ValueError(
                "The recipe needs `name_probabilities`: pass what `python -m train.cache synonyms` made, or set "
                f"{self.setting_without_clip}."
            )

    @cached_property
    def _table(self) -> Tensor:
        """(K, M) prompts of each class, see `synonym_table`."""
        return synonym_table(self.context.text_bank.class_ids)

    def head_inputs(self) -> dict[str, Tensor]:
        """All prompts of the vocabulary."""
        return {"prompt_embeds": self.context.text_bank.embeds}

    def run_head(
        self,
        head: None,
        student: GKCForOpenVocabSegmentation,
        outputs: GKCForOpenVocabSegmentationOutput,
        prompt_embeds: Tensor,
    ) -> tuple[Tensor, ...]:
        """For each stage (B, Q, P + 1) logits of all prompts and no-object."""
        return tuple(student.class_logits(stage.query_embeds, prompt_embeds) for stage in outputs.stages)

    def draw(self, batch: Batch, regions: Regions, generators: Sequence[torch.Generator]) -> None:
        """With `mode=sample`, draw a name for every region and a slot that holds it."""
        if self.settings.mode != "sample":
            return
        labels = regions.classes.split(regions.counts)
        names = self.context.text_bank.name_prompts
        prompts = [
            draw_synonyms(classes, self._table, generator, probable, self.settings.threshold)
            for classes, generator, probable in zip(
                labels, generators, self._probabilities(batch, regions), strict=True
            )
        ]
        slots = [assign_slots(classes, drawn, names) for classes, drawn in zip(labels, prompts, strict=True)]
        regions.prompts = torch.cat(prompts)
        regions.prepared[self.name] = tuple(map(list, zip(*slots, strict=True)))

    def _probabilities(self, batch: Batch, regions: Regions) -> Sequence[Tensor | None]:
        """For each image (N, M) of the names of its regions' classes; None where all names count the same."""
        if self.settings.probabilities == "boxes":
            return self._word_probabilities.lookup(batch["image_ids"], batch["segment_ids"])
        if self.settings.probabilities == "uniform":
            return [None] * len(regions.counts)
        regions.teacher = self.context.teacher_embeds(batch, torch.ones_like(regions.kept), regions.counts)
        probabilities = synonym_probabilities(
            regions.teacher,
            regions.classes,
            self._table,
            self.context.text_bank.embeds,
            self.settings.logit_scale,
        )
        return probabilities.split(regions.counts)

    def __call__(
        self,
        outputs: TrainingOutput,
        batch: Batch,
        regions: Regions,
        matches: Sequence[Matches],
        divisors: StepDivisors,
    ) -> dict[str, Tensor]:
        """`loss_synonym` of every stage."""
        mode, no_object_weight = self.settings.mode, self.recipe.matching.no_object_weight
        text_bank, divisor = self.context.text_bank, divisors.labels.class_weight
        losses = []
        for logits, of_stage in zip(outputs.heads[self.name], matches, strict=True):
            if mode == "sample":
                slots = regions.prepared[self.name]
                losses.append(sampled_synonym_loss(logits, *slots, of_stage, no_object_weight, divisor))
            else:
                targets = text_bank.class_ids, batch["class_labels"]
                settings = of_stage, no_object_weight, mode, text_bank.num_classes, divisor
                losses.append(clustered_synonym_loss(logits, *targets, *settings))
        return {"loss_synonym": torch.stack(losses)}


def clustered_synonym_loss(
    prompt_logits: Tensor,
    class_ids: Tensor,
    class_labels: list[Tensor],
    matches: Matches,
    no_object_weight: float,
    mode: str,
    num_classes: int | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over the per-class mean (`average`) or maximum (`max`) of the logits of a class's words.

    Args:
        prompt_logits: (B, Q, P + 1).
        class_ids: (P,) class of each prompt.
        class_labels: per image (N,) classes of the regions.
        matches: per image the matched queries and regions.
        no_object_weight: weight of the no-object class.
        mode: `average` or `max`.
        num_classes: K, if it is known: a training step then need not count and check `class_ids` at every stage.
        divisor: see `modeling_gkc.loss_gkc.classification_loss`.
    """
    if mode not in CLUSTER_REDUCTIONS:
        raise ValueError(f"`mode` must be one of {', '.join(CLUSTER_REDUCTIONS)}, got {mode!r}.")
    logits = reduce_prompt_logits(prompt_logits, class_ids, CLUSTER_REDUCTIONS[mode], num_classes)
    return classification_loss(logits, class_labels, matches, no_object_weight, divisor)


def sampled_synonym_loss(
    prompt_logits: Tensor,
    slot_prompts: list[Tensor],
    slot_labels: list[Tensor],
    matches: Matches,
    no_object_weight: float,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over each image's own slots.

    Args:
        prompt_logits: (B, Q, P + 1).
        slot_prompts: per image (S,) the prompt in each slot, from `assign_slots`.
        slot_labels: per image (N,) the slot of each region.
        matches: per image the matched queries and regions.
        no_object_weight: weight of the no-object class.
        divisor: see `modeling_gkc.loss_gkc.classification_loss`.
    """
    logits = gather_slot_logits(prompt_logits, slot_prompts)
    return classification_loss(logits, slot_labels, matches, no_object_weight, divisor)


def gather_slot_logits(prompt_logits: Tensor, slot_prompts: list[Tensor]) -> Tensor:
    """(B, Q, P + 1) -> (B, Q, S + 1); slots that only other images have can never be chosen."""
    slots = torch.nn.utils.rnn.pad_sequence(slot_prompts, batch_first=True, padding_value=-1)  # (B, S)
    slots = slots.to(prompt_logits.device)[:, None].expand(-1, prompt_logits.shape[1], -1)
    logits = prompt_logits.gather(2, slots.clamp(min=0))
    logits = logits.masked_fill(slots < 0, torch.finfo(logits.dtype).min)
    return torch.cat([logits, prompt_logits[..., -1:]], dim=-1)


def draw_synonyms(
    class_labels: Tensor,
    table: Tensor,
    generator: torch.Generator,
    probabilities: Tensor | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """Draw one word for each region, uniformly among those that are probable enough for this region.

    Args:
        class_labels: (N,) classes of the regions.
        table: (K, M) prompts of each class, -1 where it has fewer, from `synonym_table`.
        generator: source of all randomness; on the CPU.
        probabilities: (N, M) probability of each word of the region's class for the region; all words count as
            probable without it. Where none exceeds the threshold the most probable word is taken.
        threshold: what a probability must exceed.

    Returns:
        (N,) the drawn prompts.
    """
    words = table.cpu()[class_labels.cpu()]  # (N, M)
    eligible = words >= 0
    if probabilities is not None:
        probabilities = probabilities.cpu().masked_fill(~eligible, -1)
        best = torch.zeros_like(eligible).scatter(1, probabilities.argmax(dim=1, keepdim=True), True)
        probable = eligible & (probabilities > threshold)
        eligible = torch.where(probable.any(dim=1, keepdim=True), probable, best)
    # The highest of independent uniform numbers is a uniform draw, and works without rows too.
    priorities = torch.rand(words.shape, generator=generator).masked_fill(~eligible, -1)
    return words.gather(1, priorities.argmax(dim=1, keepdim=True)).flatten().to(class_labels.device)


def assign_slots(class_labels: Tensor, prompts: Tensor, name_prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Give the regions of one image slots that hold their words.

    Every class starts with one slot that holds its name. The first region of a class puts its word there; a later
    region with another word takes a new slot, one with a word that its class already holds shares that slot.

    Args:
        class_labels: (N,) classes of the regions.
        prompts: (N,) their words.
        name_prompts: (K,) prompt of each class's name.

    Returns:
        (S,) the prompt in each slot, S >= K, and (N,) the slot of each region.
    """
    slots: list[int] = name_prompts.tolist()
    slot_of: dict[tuple[int, int], int] = {}
    renamed: set[int] = set()
    labels = []
    for label, prompt in zip(class_labels.tolist(), prompts.tolist(), strict=True):
        if (label, prompt) not in slot_of and label not in renamed:
            slot_of[label, prompt], slots[label] = label, prompt
            renamed.add(label)
        elif (label, prompt) not in slot_of:
            slot_of[label, prompt] = len(slots)
            slots.append(prompt)
        labels.append(slot_of[label, prompt])
    return torch.tensor(slots), torch.tensor(labels, dtype=torch.int64)
