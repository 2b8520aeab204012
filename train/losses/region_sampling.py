"""The annotated regions of an optimiser step: what is drawn for them, and which of them are distilled.

Every draw about a sample comes from the sample's own seed. A step therefore draws the same however its images are
split over processes and accumulated micro-batches, and a resumed run draws what an undisturbed one would have drawn.

Letters: B images, N regions of a micro-batch, D width of the image-text space, M most words of a class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from configuration import Recipe
from modeling_gkc.loss_gkc import Matches

from ..teacher.noun_bank import draw_nouns
from ..teacher.synonym_probabilities import synonym_probabilities, synonym_table
from ..teacher.text_bank import TextBank
from .synonyms import assign_slots, draw_synonyms

Batch = Mapping[str, Any]


class RegionLookup(Protocol):
    """Values of regions that were computed before: `TeacherEmbeddings`, or probabilities of synonyms."""

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """For each image the values (N, ...) of its segments (N,)."""


class RegionEmbedder(Protocol):
    """A teacher that looks at the regions of the batch itself: `OnlineTeacher`."""

    def embed(self, batch: Batch) -> list[Tensor]:
        """For each image the unit embeddings (N, D) of the segments named in `segment_ids`."""


@dataclass
class Regions:
    """The annotated regions of a micro-batch, side by side, and what the losses compare them with.

    Attributes:
        counts: regions of each image.
        classes: (N,) positions in the vocabulary.
        prompts: (N,) the word that each region goes by in this step.
        kept: (N,) bool, all but those that region dropout leaves out.
        lots: (N,) on the CPU, what decides which regions are distilled.
        nouns: for each image those of its caption that are grounded.
        distilled: (N,) bool, which regions distillation uses.
        teacher: (N, D) the teacher's embeddings; where a region is not distilled they may be zero. None without.
        slot_prompts, slot_labels: see `train.losses.synonyms.assign_slots`; in mode `sample`.
    """

    counts: list[int]
    classes: Tensor
    prompts: Tensor
    kept: Tensor
    lots: Tensor
    nouns: list[list[str]]
    distilled: Tensor
    teacher: Tensor | None = None
    slot_prompts: list[Tensor] | None = None
    slot_labels: list[Tensor] | None = None

    def pairs(self, matches: Matches, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matched (image, query, region), each (pairs,), of the regions for which `chosen` (N,) is true."""
        device = self.classes.device
        first = 0
        images, queries, regions = [], [], []
        for image, ((matched_queries, matched_regions), count) in enumerate(zip(matches, self.counts, strict=True)):
            images.append(torch.full_like(matched_queries, image))
            queries.append(matched_queries)
            regions.append(matched_regions + first)
            first += count
        image, query, region = (torch.cat(parts).to(device) for parts in (images, queries, regions))
        used = chosen[region]
        return image[used], query[used], region[used]

    def distilled_counts(self) -> tuple[int, int]:
        """Regions that are distilled, and pairs of those that are in one image, each also with itself."""
        per_image = [int(part.sum()) for part in self.distilled.cpu().split(self.counts)]
        return sum(per_image), sum(count**2 for count in per_image)


class StepRegions:
    """Makes the `Regions` of all micro-batches of a step.

    Args:
        recipe: what is drawn.
        text_bank: the vocabulary's words, on the device of the losses.
        teacher: embeds regions, or has embedded them; None where the recipe needs none.
        word_probabilities: for `synonym_probabilities="boxes"`, of the words of each region's class (N, M), in the
            order of `synonym_table`.
    """

    def __init__(
        self,
        recipe: Recipe,
        text_bank: TextBank,
        teacher: RegionLookup | RegionEmbedder | None = None,
        word_probabilities: RegionLookup | None = None,
    ):
        self.recipe = recipe
        self.text_bank = text_bank
        self.teacher = teacher
        self.word_probabilities = word_probabilities
        self._synonym_table = synonym_table(text_bank.class_ids)

    def __call__(self, batches: Sequence[Batch], training: bool = True) -> list[Regions]:
        """Regions of each micro-batch of one step; all processes must call this together.

        Of the regions of the step, over its micro-batches and all processes, those with the lowest lots are distilled,
        `distillation_max_regions` at most. Without `training` no region is dropped.
        """
        step = [self._draw(batch, training) for batch in batches]
        if self.recipe.distillation.weight > 0:
            self._choose_distilled(step)
            for regions, batch in zip(step, batches, strict=True):
                if regions.teacher is None:
                    regions.teacher = self._embeds(batch, regions.distilled, regions.counts)
        return step

    def _draw(self, batch: Batch, training: bool) -> Regions:
        device = self.text_bank.embeds.device
        counts = [len(labels) for labels in batch["class_labels"]]
        classes = torch.cat(list(batch["class_labels"])).to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["draw_seeds"]]
        # In double precision: two regions of a step hardly ever draw the same lot.
        pairs = zip(counts, generators, strict=True)
        lots, dropout = torch.cat([torch.rand(2, n, generator=own, dtype=torch.float64) for n, own in pairs], dim=1)
        kept = (dropout >= (self.recipe.data.region_dropout if training else 0.0)).to(device)
        nouns = [self._draw_nouns(nouns, own) for nouns, own in zip(batch["nouns"], generators, strict=True)]
        regions = Regions(counts, classes, self.text_bank.name_prompts[classes], kept, lots, nouns, distilled=kept)
        if self.recipe.synonyms.mode == "sample":
            self._draw_words(batch, regions, generators)
        return regions

    def _draw_nouns(self, nouns: Sequence[str], generator: torch.Generator) -> list[str]:
        if self.recipe.grounding.weight == 0:
            return []
        return draw_nouns(nouns, self.recipe.grounding.noun_dropout, self.recipe.grounding.max_nouns, generator)

    def _draw_words(self, batch: Batch, regions: Regions, generators: list[torch.Generator]) -> None:
        """Every region goes by a synonym that is probable enough for it, and has a slot that holds it."""
        labels = regions.classes.split(regions.counts)
        probabilities = self._probabilities(batch, regions)
        words = [
            draw_synonyms(classes, self._synonym_table, generator, likely, self.recipe.synonyms.threshold)
            for classes, generator, likely in zip(labels, generators, probabilities, strict=True)
        ]
        slots = [
            assign_slots(classes, prompts, self.text_bank.name_prompts)
            for classes, prompts in zip(labels, words, strict=True)
        ]
        regions.prompts = torch.cat(words)
        regions.slot_prompts, regions.slot_labels = map(list, zip(*slots, strict=True))

    def _probabilities(self, batch: Batch, regions: Regions) -> list[Tensor] | list[None]:
        """For each image (N, M) of the words of its regions' classes; None where all words count the same."""
        if self.recipe.synonyms.probabilities == "boxes":
            return self.word_probabilities.lookup(batch["image_ids"], batch["segment_ids"])
        if self.recipe.synonyms.probabilities == "uniform":
            return [None] * len(regions.counts)
        regions.teacher = self._embeds(batch, torch.ones_like(regions.kept), regions.counts)
        probabilities = synonym_probabilities(
            regions.teacher,
            regions.classes,
            self._synonym_table,
            self.text_bank.embeds,
            self.recipe.synonyms.logit_scale,
        )
        return list(probabilities.split(regions.counts))

    def _embeds(self, batch: Batch, wanted: Tensor, counts: list[int]) -> Tensor:
        """(N, D) the teacher's embeddings of the wanted (N,) regions, zeros elsewhere."""
        chosen = wanted.cpu().split(counts)
        segment_ids = [ids.cpu()[mask] for ids, mask in zip(batch["segment_ids"], chosen, strict=True)]
        if self.recipe.teacher.source == "online":
            found = self.teacher.embed({**batch, "segment_ids": segment_ids})
        else:
            found = self.teacher.lookup(batch["image_ids"], segment_ids)
        embeds = self.text_bank.embeds.new_zeros(len(wanted), self.text_bank.embeds.shape[1])
        embeds[wanted] = torch.cat(list(found)).to(embeds)
        return embeds

    def _choose_distilled(self, step: list[Regions]) -> None:
        limit = self.recipe.distillation.max_regions
        lots = [regions.lots.masked_fill(~regions.kept.cpu(), torch.inf) for regions in step]
        first_out = _lowest_over_processes(torch.cat([*lots, torch.empty(0, dtype=torch.float64)]), limit + 1)[-1]
        for regions, own in zip(step, lots, strict=True):
            regions.distilled = (own < first_out).to(regions.kept.device)


def _lowest_over_processes(values: Tensor, count: int) -> Tensor:
    """(count,) the lowest of the values (any number,) of all processes, rising, filled up with infinity."""
    lowest = torch.full((count,), torch.inf, dtype=values.dtype)
    own = values.sort().values[:count]
    lowest[: len(own)] = own
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lowest
    # NCCL moves tensors of its GPU only.
    sent = lowest.to("cuda") if torch.distributed.get_backend() == "nccl" else lowest
    received = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(received, sent)
    return torch.cat(received).cpu().sort().values[:count]
