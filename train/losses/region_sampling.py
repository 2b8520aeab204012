"""Annotated regions of an optimizer step, and the random draws for them.

Every draw for a sample uses the sample's own seed. Draws therefore depend neither on how the images of a step are
split over processes and accumulated micro-batches, nor on whether the run was resumed.
"""

from collections.abc import Sequence

import torch

from ..teacher.text_bank import TextBank
from .base import Batch, Regions, TrainingLoss


class StepRegions:
    """Callable that returns the `Regions` of all micro-batches of a step.

    Args:
        losses: The losses of the run after `setup`, in the order in which they draw.
        text_bank: Embeddings of the vocabulary's prompts, on the device of the losses.
        region_dropout: Probability that a region is left out.
    """

    def __init__(self, losses: Sequence[TrainingLoss], text_bank: TextBank, region_dropout: float = 0.0):
        self.losses = losses
        self.text_bank = text_bank
        self.region_dropout = region_dropout

    def __call__(self, batches: Sequence[Batch], training: bool = True) -> list[Regions]:
        """Return the regions of each micro-batch of one step; all processes must call this together.

        Args:
            batches: Micro-batches of this process.
            training: Whether regions are left out by region dropout.
        """
        step = [self._draw(batch, training) for batch in batches]
        for loss in self.losses:
            loss.prepare(step, batches)
        return step

    def _draw(self, batch: Batch, training: bool) -> Regions:
        """Make all random draws for a micro-batch."""
        device = self.text_bank.embeds.device
        counts = [len(labels) for labels in batch["class_labels"]]
        classes = torch.cat(list(batch["class_labels"])).to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["draw_seeds"]]
        # In double precision, equal priorities of two regions of a step are very unlikely.
        pairs = zip(counts, generators, strict=True)
        draws = [torch.rand(2, count, generator=own, dtype=torch.float64) for count, own in pairs]
        priorities, dropout = torch.cat(draws, dim=1)
        kept = (dropout >= (self.region_dropout if training else 0.0)).to(device)
        regions = Regions(counts, classes, self.text_bank.name_prompts[classes], kept, priorities)
        for loss in self.losses:
            loss.draw(batch, regions, generators)
        return regions
