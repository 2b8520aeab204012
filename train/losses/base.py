"""Interface of a training loss, and the data structures that all losses share.

A new loss is one file of this package with a subclass of `TrainingLoss`, and one section of the recipe that has the
name of the loss. `train.losses.registry` finds it; model, trainer and command need no change.

Letters: B images, Q queries, N regions of a micro-batch, D width of the image-text space, P prompts of the vocabulary,
S decoder stages.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from configuration import Recipe
from modeling_gkc.loss_gkc import LossDivisors, Matches
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation, GKCForOpenVocabSegmentationOutput
from modeling_gkc.processing_gkc import GKCProcessor

from ..teacher.caches import RegionCaches
from ..teacher.text_bank import TextBank

Batch = Mapping[str, Any]


class RegionLookup(Protocol):
    """Interface of stored values of regions, such as `TeacherEmbeddings` or probabilities of synonyms."""

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Return for each image the values (N, ...) of its segments (N,)."""


class RegionEmbedder(Protocol):
    """Interface of a teacher that embeds the regions of a batch, such as `OnlineTeacher`."""

    def embed(self, batch: Batch) -> list[Tensor]:
        """Return for each image the unit embeddings (N, D) of the segments in `segment_ids`."""


@dataclass
class Regions:
    """Annotated regions of a micro-batch, concatenated over its images, and the random draws for them.

    Attributes:
        counts: Number of regions of each image.
        classes: (N,) classes as positions in the vocabulary.
        prompts: (N,) prompt that describes each region in this step, that of the first name of its class unless a loss
            draws another.
        kept: (N,) bool, false for the regions that region dropout leaves out.
        priorities: (N,) sampling priorities on the CPU: of several regions, those with the lowest are chosen.
        teacher: (N, D) embeddings by the teacher; None until a loss looks them up. They may be zero for regions that
            no loss needs.
        prepared: Results of `draw` and `prepare` of each loss, by the name of the loss.
    """

    counts: list[int]
    classes: Tensor
    prompts: Tensor
    kept: Tensor
    priorities: Tensor
    teacher: Tensor | None = None
    prepared: dict[str, Any] = field(default_factory=dict)

    def pairs(self, matches: Matches, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matches of some regions as indices.

        Args:
            matches: Matched queries and regions of each image.
            chosen: (N,) bool mask of the regions to return.

        Returns:
            Image, query and region of each match, each (number of matches,).
        """
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


@dataclass
class TrainingOutput(ModelOutput):
    """Output of `TrainingModel`.

    Attributes:
        heads: Output of each loss's `run_head`, by the name of the loss; None if only the student was run.
        temperature: Factor of the cosine similarities of queries and prompts.
        student: Output of the student, with all stages and without losses.
    """

    heads: dict[str, Any] | None = None
    temperature: Tensor | None = None
    student: GKCForOpenVocabSegmentationOutput | None = None


@dataclass(frozen=True)
class StepDivisors:
    """Divisors of the loss sums of a micro-batch: their means over the micro-batches and processes of a step.

    The trainer averages micro-batches, and processes average their gradients; with these divisors the result is that
    of one batch of all images, however they are split.

    Attributes:
        labels: Divisors of the losses of names, synonyms and masks.
        losses: Means of `TrainingLoss.divisor_counts`, by the name of the loss.
    """

    labels: LossDivisors
    losses: Mapping[str, Tensor]


@dataclass
class LossContext:
    """Objects that losses can use, with tensors on the device of the losses.

    Attributes:
        recipe: The recipe of the run.
        device: Device of the losses.
        text_bank: Embeddings of the vocabulary's prompts. None during `setup`.
        teacher: Teacher that looks up or computes embeddings of regions; None if no loss needs one.
        student: The model that is trained.
        processor: Processor of the student.
        datasets: Training and evaluation datasets that were given to the trainer.
        sources: Further arguments of the trainer by name, see `TrainingLoss.sources`.
    """

    recipe: Recipe
    device: torch.device | str = "cpu"
    text_bank: TextBank | None = None
    teacher: RegionLookup | RegionEmbedder | None = None
    student: GKCForOpenVocabSegmentation | None = None
    processor: GKCProcessor | None = None
    datasets: Sequence[Any] = ()
    sources: Mapping[str, Any] = field(default_factory=dict)

    def teacher_embeds(self, batch: Batch, wanted: Tensor, counts: list[int]) -> Tensor:
        """Look up or compute the teacher's embeddings of some regions.

        Args:
            batch: The micro-batch.
            wanted: (N,) bool mask of the regions.
            counts: Number of regions of each image.

        Returns:
            (N, D) unit embeddings, zero for the other regions.
        """
        chosen = wanted.cpu().split(counts)
        segment_ids = [ids.cpu()[mask] for ids, mask in zip(batch["segment_ids"], chosen, strict=True)]
        if self.recipe.teacher.source == "online":
            found = self.teacher.embed({**batch, "segment_ids": segment_ids})
        else:
            found = self.teacher.lookup(batch["image_ids"], segment_ids)
        embeds = self.text_bank.embeds.new_zeros(len(wanted), self.text_bank.embeds.shape[1])
        embeds[wanted] = torch.cat(list(found)).to(embeds)
        return embeds


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Gather tensors of the same shape from all processes."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return parts


class TrainingLoss(ABC):
    """Base of all losses that use the matches of the classification and mask losses.

    A step calls the methods in this order: `draw` for each micro-batch, `prepare` and `divisor_counts` for the step,
    then for each micro-batch `run_head` within the model's forward pass and the loss itself.

    Attributes:
        name: Name of the loss, of its section of the recipe, and of its values in `Regions.prepared`,
            `TrainingOutput.heads` and `StepDivisors.losses`.
        sources: Names of further arguments of `GKCTrainer` that the loss reads from `LossContext.sources`.
        is_collective: Whether computing the loss needs all processes at once. It is then computed after all of them
            have checked that their other losses are finite, so that none waits for a process that stopped.
        needs_teacher: Whether the loss uses `LossContext.teacher`.
        setting_without_clip: Change of the recipe with which the loss needs no CLIP, for messages.

    Args:
        recipe: The recipe of the run; `settings` is the section of the loss.
    """

    name: ClassVar[str]
    sources: ClassVar[tuple[str, ...]] = ()
    is_collective: ClassVar[bool] = False
    needs_teacher: bool = False
    setting_without_clip: str = ""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.settings = getattr(recipe, self.name)

    @classmethod
    def is_enabled(cls, recipe: Recipe) -> bool:
        """Return whether a recipe uses the loss: it has the loss's section with a positive `weight`."""
        section = getattr(recipe, cls.name, None)
        return section is not None and section.weight > 0

    @property
    def head_name(self) -> str:
        """Attribute of `TrainingModel` with the head, which is part of the names of parameters in checkpoints."""
        return f"{self.name}_head"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each value of the loss in the total loss, by the value's name; other values are only logged."""
        return {f"loss_{self.name}": self.settings.weight}

    def load_sources(self, caches: RegionCaches) -> dict[str, Any]:
        """Load the further arguments of `GKCTrainer` that the loss needs.

        Args:
            caches: Caches of the recipe's dataset.

        Returns:
            Arguments by the names in `sources`.

        Raises:
            ValueError: A cache is missing; the message contains the command that writes it.
        """
        return {}

    def make_head(self, student: GKCForOpenVocabSegmentation) -> nn.Module | nn.Parameter | None:
        """Return the parameters of the loss, with initial weights that depend only on the recipe's seed, or None."""
        return None

    def head_inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of `run_head`, which pass through the model's forward pass."""
        return {}

    def run_head(
        self,
        head: nn.Module | nn.Parameter | None,
        student: GKCForOpenVocabSegmentation,
        outputs: GKCForOpenVocabSegmentationOutput,
        **inputs: Tensor,
    ) -> Any:
        """Compute the outputs of the loss's head, within the model's forward pass.

        A parameter itself must not be returned, because a sharded one is gathered only during the forward pass.

        Args:
            head: Result of `make_head`.
            student: The model that is trained.
            outputs: Output of the student with all stages.
            inputs: Result of `head_inputs`.

        Returns:
            Tensors, or dictionaries and tuples of them.
        """
        return None

    def setup(self, context: LossContext) -> None:
        """Store the context; called once before training."""
        self.context = context

    def draw(  # noqa: B027 - losses that draw nothing need not define it
        self, batch: Batch, regions: Regions, generators: Sequence[torch.Generator]
    ) -> None:
        """Make the random draws for a micro-batch.

        Args:
            batch: The micro-batch.
            regions: Regions of the micro-batch. Results are stored in `regions.prepared[self.name]` or
                `regions.prompts`.
            generators: Generator of each image, seeded by the image's own seed.
        """

    def prepare(self, step: Sequence[Regions], batches: Sequence[Batch]) -> None:  # noqa: B027 - optional too
        """Prepare the micro-batches of a step together; all processes call this together."""

    def divisor_counts(self, regions: Regions) -> Sequence[float]:
        """Return the counts of a micro-batch that the loss divides by, a fixed number of them; see `StepDivisors`."""
        return ()

    @abstractmethod
    def __call__(
        self,
        outputs: TrainingOutput,
        batch: Batch,
        regions: Regions,
        matches: Sequence[Matches],
        divisors: StepDivisors,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            outputs: Output of the model; `outputs.heads[self.name]` is what `run_head` returned.
            batch: The micro-batch.
            regions: Regions of the micro-batch, with the results of `draw` and `prepare`.
            matches: Matches of each decoder stage.
            divisors: Divisors of the step.

        Returns:
            Values by name, each (S,), or (1,) for a loss that is computed once.
        """

    def log_values(self, outputs: TrainingOutput, regions: Regions) -> dict[str, Tensor]:
        """Return further scalars to log."""
        return {}
