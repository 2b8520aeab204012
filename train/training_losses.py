"""The losses of a step, all from the same matches: plain names and masks, synonyms, distillation.

Letters: B images, Q queries, N regions of the batch, D width of the image-text space, P words of the vocabulary,
S decoder stages.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configuration import Recipe
from modeling_gkc.loss_gkc import GKCCriterion, Matches
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentationOutput

from .distillation import text_guided_distillation_loss
from .teacher import TeacherEmbeddings, TextBank
from .text_diversification import (
    assign_slots,
    clustered_synonym_loss,
    draw_synonyms,
    sampled_synonym_loss,
    synonym_probabilities,
    synonym_table,
)
from .training_model import TrainingOutput


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


class TrainingLosses:
    """Computes the losses that a recipe asks for.

    Args:
        recipe: which losses, and their weights.
        text_bank: embeddings of the vocabulary's words, on the device of the losses.
        teacher_embeddings: of the dataset's regions; needed for distillation.
    """

    def __init__(self, recipe: Recipe, text_bank: TextBank, teacher_embeddings: TeacherEmbeddings | None = None):
        self.recipe = recipe
        self.text_bank = text_bank
        self.teacher_embeddings = teacher_embeddings
        self._synonym_table = synonym_table(text_bank.class_ids)

    def __call__(self, outputs: TrainingOutput, inputs: dict[str, Any], regions: Regions) -> dict[str, Tensor]:
        """Every loss by name, each (S,)."""
        losses = _student_losses(outputs.student)
        if outputs.prompt_logits is not None:
            losses |= self._synonym_losses(outputs, inputs, regions)
        if outputs.distillation_embeds is not None:
            losses |= self._distillation_losses(outputs, regions)
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum over losses and stages."""
        return sum(weight * losses[name].sum() for name, weight in self._weights().items() if name in losses)

    def regions(self, inputs: dict[str, Any]) -> Regions:
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
