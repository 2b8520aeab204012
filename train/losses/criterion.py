"""Training criterion: the classification and mask losses, whose matches all other losses use.

Letters: B images, S decoder stages.
"""

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from configuration import Recipe
from modeling_gkc.loss_gkc import GKCCriterion, LossDivisors, MaskParts, Matches, mean_over_processes
from modeling_gkc.padding import hide_padding

from ..data import expand_masks
from ..data.schema import VOID
from .base import Batch, Regions, StepDivisors, TrainingLoss, TrainingOutput


class TrainingCriterion:
    """Criterion that computes all losses of a recipe.

    Args:
        recipe: Recipe with the weights of the classification and mask losses.
        criterion: Criterion of the student.
        losses: Further losses.
    """

    def __init__(self, recipe: Recipe, criterion: GKCCriterion, losses: Sequence[TrainingLoss]):
        self.criterion = criterion
        # Sorted from the last name to the first, as in earlier versions: a sum of floats depends on the order, and a
        # resumed run must compute the same sum.
        self.losses = [*reversed(losses)]
        self.ignore_void = recipe.data.ignore_void
        matching = recipe.matching
        weights = (matching.class_weight, matching.mask_weight, matching.dice_weight)
        self.weights = dict(zip(GKCCriterion.names, weights, strict=True))
        for loss in self.losses:
            self.weights |= loss.weights

    def divisors(self, step: Sequence[Regions]) -> StepDivisors:
        """Return the divisors of a step, counted in its micro-batches; all processes must call this together."""
        config, device = self.criterion.config, step[0].classes.device
        sums = torch.zeros(1, dtype=torch.float64)
        for regions in step:
            labels = LossDivisors.from_counts(regions.counts, config.num_queries, config.no_object_weight)
            counts = [loss.divisor_counts(regions) for loss in self.losses]
            sums = sums + torch.tensor([labels.num_masks, labels.class_weight, *chain.from_iterable(counts)])
        means = mean_over_processes((sums / len(step)).float().to(device))
        (num_masks, class_weight), *of_losses = means.split([2, *map(len, counts)])
        names = [loss.name for loss in self.losses]
        return StepDivisors(LossDivisors(num_masks, class_weight), dict(zip(names, of_losses, strict=True)))

    def __call__(
        self, outputs: TrainingOutput, batch: Batch, regions: Regions, divisors: StepDivisors, training: bool = True
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Compute all losses but the collective ones.

        Returns:
            Values by name, each (S,), and the matches of each stage.

        Raises:
            ValueError: A sample cannot be matched; the message names its position in the batch.
        """
        losses, matches = self._label_losses(outputs, batch, divisors, training)
        for loss in self.losses:
            if not loss.is_collective:
                losses |= loss(outputs, batch, regions, matches, divisors)
        return losses, matches

    def collective(
        self,
        outputs: TrainingOutput,
        batch: Batch,
        regions: Regions,
        matches: list[Matches],
        divisors: StepDivisors,
    ) -> dict[str, Tensor]:
        """Compute the losses that need all processes at once; all processes must call this together."""
        losses = {}
        for loss in self.losses:
            if loss.is_collective:
                losses |= loss(outputs, batch, regions, matches, divisors)
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum over losses and stages."""
        return sum(weight * losses[name].sum() for name, weight in self.weights.items())

    def _label_losses(
        self, outputs: TrainingOutput, batch: Batch, divisors: StepDivisors, training: bool
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """Compute classification and mask losses as `GKCForOpenVocabSegmentation` does, with the step's divisors."""
        stages, content_sizes = outputs.student.stages, outputs.student.content_sizes
        masks = [stage.masks_queries_logits for stage in stages]
        # The student pads its input. Training counts padding as empty, evaluation ignores it.
        padded = [4 * side for side in masks[-1].shape[-2:]]
        if content_sizes is not None and not training:
            masks = [hide_padding(stage, content_sizes) for stage in masks]
        height, width = batch["segmentation"].shape[-2:]
        segmentation = F.pad(batch["segmentation"], (0, padded[1] - width, 0, padded[0] - height))
        void = None
        if self.ignore_void:
            inside = F.pad(batch["pixel_mask"].bool(), (0, padded[1] - width, 0, padded[0] - height))
            void = inside & (segmentation == VOID).to(inside.device)
        values, matches = self.criterion(
            [stage.class_queries_logits for stage in stages],
            masks,
            expand_masks(segmentation.to(masks[-1].device), batch["segment_ids"]),
            batch["class_labels"],
            divisors=divisors.labels,
            point_seeds=point_seeds(batch),
            mask_parts=MaskParts.from_stages(stages, outputs.student.mask_features) if training else None,
            void=void,
        )
        before_last = range(len(stages) - 1)
        by_name = {
            name: torch.stack([*(values[f"{name}_{stage}"] for stage in before_last), values[name]])
            for name in GKCCriterion.names
        }
        return by_name, matches


def point_seeds(batch: Batch) -> list[int]:
    """Return the seed of the points at which each image's masks are compared, distinct from its other draws."""
    return [seed ^ 1 for seed in batch["draw_seeds"]]
