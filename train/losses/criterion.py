"""The losses of a step, all from the same matches: plain names and masks, synonyms, distillation, grounding.

Letters: B images, Q queries, N regions of a micro-batch, D width of the image-text space, P words of the vocabulary,
S decoder stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from configuration import Recipe
from modeling_gkc.loss_gkc import GKCCriterion, LossDivisors, MaskParts, Matches, mean_over_processes
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentationOutput
from modeling_gkc.padding import hide_padding

from ..data import expand_masks
from ..teacher.noun_bank import NounBank
from ..teacher.text_bank import TextBank
from .distillation import text_guided_distillation_loss
from .grounding import gather_with_gradients, grounding_loss
from .region_sampling import Batch, Regions
from .synonyms import clustered_synonym_loss, sampled_synonym_loss


@dataclass
class TrainingOutput(ModelOutput):
    """Output of `TrainingModel`.

    Attributes:
        prompt_logits: for each stage (B, Q, P + 1) logits of all words and no-object; with text diversification.
        distillation_embeds: for each stage (B, Q, D) unit vectors; with distillation.
        distillation_scale: the learned scalar s; with distillation.
        grounding_scale: the learned factor of the similarities of nouns and regions; with grounding.
        temperature: factor of the cosines of queries and words.
        student: the student's own output, with all stages and without losses.
    """

    prompt_logits: tuple[Tensor, ...] | None = None
    distillation_embeds: tuple[Tensor, ...] | None = None
    distillation_scale: Tensor | None = None
    grounding_scale: Tensor | None = None
    temperature: Tensor | None = None
    student: GKCForOpenVocabSegmentationOutput | None = None


@dataclass(frozen=True)
class StepDivisors:
    """What the sums of a micro-batch are divided by: means over the micro-batches and processes of a step.

    The trainer averages micro-batches, and processes average their gradients; with these divisors, the result is that
    of one batch of all images, however they are split.

    Attributes:
        labels: of plain names, synonyms and masks.
        distillation: (2,) distilled regions, and pairs of them. Annotated regions are counted: with more segments than
            queries, those that stay unmatched count as residuals of zero.
    """

    labels: LossDivisors
    distillation: Tensor

    @classmethod
    def of(cls, step: Sequence[Regions], criterion: GKCCriterion) -> "StepDivisors":
        """Counted in all micro-batches of a step; all processes must call this together."""
        config, device = criterion.config, step[0].classes.device
        sums = torch.zeros(4, dtype=torch.float64)
        for regions in step:
            labels = LossDivisors.from_counts(regions.counts, config.num_queries, config.no_object_weight)
            sums += torch.tensor([labels.num_masks, labels.class_weight, *regions.distilled_counts()])
        means = mean_over_processes((sums / len(step)).float().to(device))
        return cls(LossDivisors(means[0], means[1]), means[2:])


class TrainingLosses:
    """Computes the losses that a recipe asks for.

    Args:
        recipe: which losses, and their weights.
        criterion: the student's.
        text_bank: embeddings of the vocabulary's words, on the device of the losses.
        noun_bank: embeddings of the captions' nouns, on the same device; needed for grounding.
    """

    def __init__(
        self, recipe: Recipe, criterion: GKCCriterion, text_bank: TextBank, noun_bank: NounBank | None = None
    ):
        self.recipe = recipe
        self.criterion = criterion
        self.text_bank = text_bank
        self.noun_bank = noun_bank

    def __call__(
        self, outputs: TrainingOutput, batch: Batch, regions: Regions, divisors: StepDivisors, training: bool = True
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Every loss of an image by itself, by name, each (S,), and the matches of each stage.

        Raises:
            ValueError: something cannot be matched; the sample's place in the batch is named.
        """
        losses, matches = self._label_losses(outputs, batch, divisors, training)
        if outputs.prompt_logits is not None:
            losses |= self._synonym_losses(outputs, batch, regions, matches, divisors)
        if outputs.distillation_embeds is not None:
            losses |= self._distillation_losses(outputs, regions, matches, divisors)
        return losses, matches

    def grounding(self, outputs: TrainingOutput, regions: Regions, matches: list[Matches]) -> dict[str, Tensor]:
        """The loss that compares the images of a micro-batch of all processes with each other; (1,), or nothing.

        Its regions are the class embeddings of the last stage's matched queries: those that words are compared with
        when the model is used. All processes must call this together.
        """
        if outputs.grounding_scale is None:
            return {}
        image, query, _ = regions.pairs(matches[-1], regions.kept)
        per_image = torch.bincount(image, minlength=len(regions.counts)).tolist()
        embeds = outputs.student.stages[-1].query_embeds[image, query].split(per_image)
        ones = [part.new_ones(len(part), dtype=torch.bool) for part in embeds]
        region_embeds, region_mask = (
            torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in (embeds, ones)
        )
        word_embeds, word_mask = self.noun_bank.embed(regions.nouns)
        gathered = map(gather_with_gradients, (word_embeds, region_embeds, word_mask, region_mask))
        return {"loss_grounding": grounding_loss(*gathered, outputs.grounding_scale)[None]}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum over losses and stages."""
        return sum(weight * losses[name].sum() for name, weight in self._weights().items() if name in losses)

    def _label_losses(
        self, outputs: TrainingOutput, batch: Batch, divisors: StepDivisors, training: bool
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Plain names and masks; as `GKCForOpenVocabSegmentation` computes them, but for the divisors."""
        stages, content_sizes = outputs.student.stages, outputs.student.content_sizes
        masks = [stage.masks_queries_logits for stage in stages]
        # The student has padded its input; in training it learns that there is nothing, in evaluation it cannot err.
        padded = [4 * side for side in masks[-1].shape[-2:]]
        if content_sizes is not None and not training:
            masks = [hide_padding(stage, content_sizes) for stage in masks]
        height, width = batch["segmentation"].shape[-2:]
        segmentation = F.pad(batch["segmentation"], (0, padded[1] - width, 0, padded[0] - height))
        values, matches = self.criterion(
            [stage.class_queries_logits for stage in stages],
            masks,
            expand_masks(segmentation.to(masks[-1].device), batch["segment_ids"]),
            batch["class_labels"],
            divisors=divisors.labels,
            point_seeds=point_seeds(batch),
            mask_parts=MaskParts.from_stages(stages, outputs.student.mask_features) if training else None,
        )
        return _by_stage(values, len(stages)), matches

    def _synonym_losses(
        self,
        outputs: TrainingOutput,
        batch: Batch,
        regions: Regions,
        all_matches: list[Matches],
        divisors: StepDivisors,
    ) -> dict[str, Tensor]:
        mode, no_object_weight = self.recipe.synonyms.mode, self.recipe.matching.no_object_weight
        divisor = divisors.labels.class_weight
        losses = []
        for logits, matches in zip(outputs.prompt_logits, all_matches, strict=True):
            if mode == "sample":
                slots = regions.slot_prompts, regions.slot_labels
                losses.append(sampled_synonym_loss(logits, *slots, matches, no_object_weight, divisor))
            else:
                targets = self.text_bank.class_ids, batch["class_labels"]
                settings = matches, no_object_weight, mode, self.text_bank.num_classes, divisor
                losses.append(clustered_synonym_loss(logits, *targets, *settings))
        return {"loss_synonym": torch.stack(losses)}

    def _distillation_losses(
        self, outputs: TrainingOutput, regions: Regions, all_matches: list[Matches], divisors: StepDivisors
    ) -> dict[str, Tensor]:
        losses = []
        for embeds, matches in zip(outputs.distillation_embeds, all_matches, strict=True):
            image, query, region = regions.pairs(matches, regions.distilled)
            terms = text_guided_distillation_loss(
                student=embeds[image, query].float(),
                teacher=regions.teacher[region],
                text=self.text_bank.embeds[regions.prompts[region]],
                image_index=image,
                scale=outputs.distillation_scale,
                relation=self.recipe.distillation.relation,
                counts=divisors.distillation,
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
        terms = {"split": ("feature", "relation")}.get(recipe.distillation.terms, (recipe.distillation.terms,))
        weights = {
            "loss_cross_entropy": recipe.matching.class_weight,
            "loss_mask": recipe.matching.mask_weight,
            "loss_dice": recipe.matching.dice_weight,
            "loss_synonym": recipe.synonyms.weight,
            "loss_grounding": recipe.grounding.weight,
            **{f"loss_distillation_{term}": recipe.distillation.weight for term in terms},
        }
        if recipe.distillation.terms == "split" and recipe.distillation.relation_weight is not None:
            weights["loss_distillation_relation"] = recipe.distillation.relation_weight
        return weights


def point_seeds(batch: Batch) -> list[int]:
    """Seed of the points at which each image's masks are compared; another stream than that of its other draws."""
    return [seed ^ 1 for seed in batch["draw_seeds"]]


def _by_stage(losses: dict[str, Tensor], num_stages: int) -> dict[str, Tensor]:
    """The criterion's losses by name, each (S,)."""
    return {
        name: torch.stack([*(losses[f"{name}_{stage}"] for stage in range(num_stages - 1)), losses[name]])
        for name in GKCCriterion.names
    }
