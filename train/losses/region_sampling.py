"""The annotated regions of an optimizer step, and what is drawn for them.

Every draw about a sample comes from the sample's own seed. A step therefore draws the same however its images are
split over processes and accumulated micro-batches, and a resumed run draws what an undisturbed one would have drawn.
"""

from collections.abc import Sequence

import torch

from ..teacher.text_bank import TextBank
from .base import Batch, Regions, TrainingLoss


class StepRegions:
    """Makes the `Regions` of all micro-batches of a step.

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
        """Regions of each micro-batch of one step; all processes must call this together.

        Without `training` no region is left out.
        """
        step = [self._draw(batch, training) for batch in batches]
        for loss in self.losses:
            loss.prepare(step, batches)
        return step

    def _draw(self, batch: Batch, training: bool) -> Regions:
        device = self.text_bank.embeds.device
        counts = [len(labels) for labels in batch["class_labels"]]
        classes = torch.cat(list(batch["class_labels"])).to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["draw_seeds"]]
        # In double precision two regions of a step hardly ever draw the same priority.
        pairs = zip(counts, generators, strict=True)
        draws = [torch.rand(2, count, generator=own, dtype=torch.float64) for count, own in pairs]
        priorities, dropout = torch.cat(draws, dim=1)
        kept = (dropout >= (self.region_dropout if training else 0.0)).to(device)
        regions = Regions(counts, classes, self.text_bank.name_prompts[classes], kept, priorities)
        for loss in self.losses:
            loss.draw(batch, regions, generators)
        return regions
