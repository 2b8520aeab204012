"""Text diversification: classification of regions under other names of their classes.

Letters: B images, Q queries, N annotated regions of an image, K classes, P prompts (one for each name of each class),
M most names of a class, S slots of an image (one for each class, then extra ones). The last column of logits is
no-object.
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


class SynonymLoss(TrainingLoss):
    """Cross-entropy over classes with several names, at every decoder stage.

    With `mode=sample`, `Regions.prepared` contains the prompts of each image's slots and the slots of its regions, see
    `assign_slots`.
    """

    name = "synonyms"
    sources = ("name_probabilities",)

    @classmethod
    def is_enabled(cls, recipe: Recipe) -> bool:
        """Return whether the mode is not `none`; distillation uses sampled names even if the weight is zero."""
        return recipe.synonyms.mode != "none"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of `loss_synonym`."""
        return {"loss_synonym": self.settings.weight}

    @property
    def needs_teacher(self) -> bool:
        """Return whether names are drawn with probabilities from the teacher's embedding of the region."""
        return self.settings.mode == "sample" and self.settings.probabilities == "teacher"

    setting_without_clip = "synonyms.probabilities=uniform"

    def load_sources(self, caches: RegionCaches) -> dict[str, Any]:
        """Open the cached probabilities of names if the recipe uses them."""
        if self.settings.mode != "sample" or self.settings.probabilities != "boxes":
            return {}
        source = BoxSynonyms(caches.require_towers(self.setting_without_clip), caches.vocabulary)
        columns = max(map(len, caches.trained_vocabulary.names))
        return {"name_probabilities": caches.open(SynonymProbabilities, source, columns)}

    def setup(self, context: LossContext) -> None:
        """Store the context and the cached probabilities of names.

        Raises:
            ValueError: The recipe uses the probabilities, but they were not given.
        """
        super().setup(context)
        self._word_probabilities = context.sources.get("name_probabilities")
        is_boxes = self.settings.mode == "sample" and self.settings.probabilities == "boxes"
        if is_boxes and self._word_probabilities is None:
            raise ValueError(
                "The recipe needs `name_probabilities`: pass the cache of `python -m train.cache synonyms`, or set "
                f"{self.setting_without_clip}."
            )

    @cached_property
    def _table(self) -> Tensor:
        """Prompts of each class (K, M), see `synonym_table`."""
        return synonym_table(self.context.text_bank.class_ids)

    def head_inputs(self) -> dict[str, Tensor]:
        """Return the embeddings of all prompts of the vocabulary."""
        return {"prompt_embeds": self.context.text_bank.embeds}

    def run_head(
        self,
        head: None,
        student: GKCForOpenVocabSegmentation,
        outputs: GKCForOpenVocabSegmentationOutput,
        prompt_embeds: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the logits (B, Q, P + 1) of all prompts and no-object for each stage."""
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
        """Return for each image the probabilities (N, M) of the names of its regions' classes; None if uniform."""
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
        """Compute `loss_synonym` (S,) for every stage."""
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
    """Compute the cross-entropy over the mean (`average`) or maximum (`max`) of the logits of each class's prompts.

    Args:
        prompt_logits: (B, Q, P + 1) logits of prompts and no-object.
        class_ids: (P,) class of each prompt.
        class_labels: For each image the classes (N,) of its regions.
        matches: Matched queries and regions of each image.
        no_object_weight: Weight of the no-object class.
        mode: Reduction, `average` or `max`.
        num_classes: Number K of classes. If it is given, `class_ids` are neither counted nor checked.
        divisor: Divisor of the sum, see `modeling_gkc.loss_gkc.classification_loss`.
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
    """Compute the cross-entropy over the slots of each image.

    Args:
        prompt_logits: (B, Q, P + 1) logits of prompts and no-object.
        slot_prompts: For each image the prompt (S,) of each slot, from `assign_slots`.
        slot_labels: For each image the slot (N,) of each region.
        matches: Matched queries and regions of each image.
        no_object_weight: Weight of the no-object class.
        divisor: Divisor of the sum, see `modeling_gkc.loss_gkc.classification_loss`.
    """
    logits = gather_slot_logits(prompt_logits, slot_prompts)
    return classification_loss(logits, slot_labels, matches, no_object_weight, divisor)


def gather_slot_logits(prompt_logits: Tensor, slot_prompts: list[Tensor]) -> Tensor:
    """Gather the logits of each image's slots.

    Args:
        prompt_logits: (B, Q, P + 1) logits of prompts and no-object.
        slot_prompts: For each image the prompt (number of its slots,) of each slot.

    Returns:
        (B, Q, S + 1) logits of slots and no-object, where S is the largest number of slots. Missing slots of an image
        have the lowest finite logit.
    """
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
    """Draw one name for each region, uniformly among the names whose probability exceeds a threshold.

    Args:
        class_labels: (N,) classes of the regions.
        table: (K, M) prompts of each class, padded with -1, from `synonym_table`.
        generator: Source of randomness on the CPU.
        probabilities: (N, M) probability of each name of the region's class. Without it, all names may be drawn. If
            none exceeds the threshold, the most probable name is used.
        threshold: Probability that a name must exceed.

    Returns:
        (N,) prompts of the drawn names.
    """
    prompts = table.cpu()[class_labels.cpu()]  # (N, M)
    eligible = prompts >= 0
    if probabilities is not None:
        probabilities = probabilities.cpu().masked_fill(~eligible, -1)
        best = torch.zeros_like(eligible).scatter(1, probabilities.argmax(dim=1, keepdim=True), True)
        probable = eligible & (probabilities > threshold)
        eligible = torch.where(probable.any(dim=1, keepdim=True), probable, best)
    # The position of the highest of independent uniform numbers is a uniform draw, also for tensors without rows.
    priorities = torch.rand(prompts.shape, generator=generator).masked_fill(~eligible, -1)
    return prompts.gather(1, priorities.argmax(dim=1, keepdim=True)).flatten().to(class_labels.device)


def assign_slots(class_labels: Tensor, prompts: Tensor, name_prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Assign the regions of one image to slots, each of which has the prompt of one name.

    Every class has one slot, at first with the prompt of its first name. The first region of a class replaces it with
    its own prompt. A later region of the class shares the slot that has its prompt, or gets a new slot.

    Args:
        class_labels: (N,) classes of the regions.
        prompts: (N,) prompts of the regions.
        name_prompts: (K,) prompt of each class's first name.

    Returns:
        (S,) prompt of each slot, with S >= K, and (N,) slot of each region.
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
