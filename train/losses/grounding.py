"""Caption grounding: contrastive alignment of the nouns of captions with the regions of their images.

The loss is that of captions in Zareian et al., *Open-Vocabulary Object Detection Using Captions*, CVPR 2021, between
nouns and matched queries.

Letters: B images, T nouns of a caption, R regions of an image (both padded), D width of the image-text space.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_gkc.loss_gkc import Matches
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation, GKCForOpenVocabSegmentationOutput

from ..teacher.noun_bank import NounBank, distinct_nouns, draw_nouns
from .base import Batch, LossContext, Regions, StepDivisors, TrainingLoss, TrainingOutput

INITIAL_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # as in CLIP


class GroundingLoss(TrainingLoss):
    """Caption grounding of the class embeddings of the last stage, which inference compares with prompts.

    The loss compares the images of a micro-batch, of all processes, with each other. `Regions.prepared` holds the
    drawn nouns of each image. The head is the logarithm of the learned scale.
    """

    name = "grounding"
    head_name = "grounding_logit_scale"
    sources = ("noun_bank",)
    is_collective = True

    def setup(self, context: LossContext) -> None:
        """Encode the nouns of the captions unless their embeddings were given.

        Raises:
            ValueError: A dataset has no nouns.
        """
        super().setup(context)
        noun_bank = context.sources.get("noun_bank")
        if noun_bank is None:
            nouns = distinct_nouns(*context.datasets)
            noun_bank = NounBank.from_nouns(nouns, context.student, context.processor)
        self._noun_bank = noun_bank.to(context.device)

    def make_head(self, student: GKCForOpenVocabSegmentation) -> nn.Parameter:
        """Logarithm of the scale."""
        return nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def run_head(
        self,
        head: nn.Parameter,
        student: GKCForOpenVocabSegmentation,
        outputs: GKCForOpenVocabSegmentationOutput,
    ) -> Tensor:
        """The scale."""
        return head.clamp(max=math.log(LARGEST_SCALE)).exp()

    def draw(self, batch: Batch, regions: Regions, generators: Sequence[torch.Generator]) -> None:
        """Draw nouns of each image's captions."""
        limits = self.settings.noun_dropout, self.settings.max_nouns
        regions.prepared[self.name] = [
            draw_nouns(nouns, *limits, generator) for nouns, generator in zip(batch["nouns"], generators, strict=True)
        ]

    def __call__(
        self,
        outputs: TrainingOutput,
        batch: Batch,
        regions: Regions,
        matches: Sequence[Matches],
        divisors: StepDivisors,
    ) -> dict[str, Tensor]:
        """`loss_grounding` (1,)."""
        image, query, _ = regions.pairs(matches[-1], regions.kept)
        per_image = torch.bincount(image, minlength=len(regions.counts)).tolist()
        embeds = outputs.student.stages[-1].query_embeds[image, query].split(per_image)
        ones = [part.new_ones(len(part), dtype=torch.bool) for part in embeds]
        region_embeds, region_mask = (
            torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in (embeds, ones)
        )
        word_embeds, word_mask = self._noun_bank.embed(regions.prepared[self.name])
        gathered = map(gather_with_gradients, (word_embeds, region_embeds, word_mask, region_mask))
        return {"loss_grounding": grounding_loss(*gathered, outputs.heads[self.name])[None]}

    def log_values(self, outputs: TrainingOutput, regions: Regions) -> dict[str, Tensor]:
        """The scale."""
        return {"grounding_scale": outputs.heads[self.name]}


def grounding_loss(
    word_embeds: Tensor, region_embeds: Tensor, word_mask: Tensor, region_mask: Tensor, scale: Tensor | float
) -> Tensor:
    """Contrast of the captions and images of a batch.

    With cosines of the nouns of caption c and the regions of image i, times the scale:

    * each noun attends to the regions by softmax; the mean over nouns of what it finds says how near i is to c;
    * each region attends to the nouns likewise, and the mean over regions is taken;
    * for both, the captions choose among the images and the images among the captions by softmax: four
      cross-entropies, which are averaged.

    Images without a noun or without a region take no part; without any image that does, the loss is an exact zero that
    still back-propagates. It compares all images it is given: over several processes pass what
    `gather_with_gradients` returns. Over accumulated micro-batches it is the mean of their losses, each with fewer
    images to choose from, and not the loss of one large batch.

    Args:
        word_embeds: (B, T, D), of any length.
        region_embeds: (B, R, D), of any length.
        word_mask: (B, T) bool, which of them are nouns and no padding.
        region_mask: (B, R) bool.
        scale: scalar, the inverse temperature.
    """
    taking_part = word_mask.any(dim=1) & region_mask.any(dim=1)
    word_mask, region_mask = word_mask[taking_part], region_mask[taking_part]
    with torch.autocast(word_embeds.device.type, enabled=False):
        words = _unit_vectors(word_embeds[taking_part], word_mask)
        regions = _unit_vectors(region_embeds[taking_part], region_mask)
        if len(words) == 0:
            return words.sum() + regions.sum() + 0 * scale
        own = torch.arange(len(words), device=words.device)
        nearness = _nearness(scale * torch.einsum("ctd,ird->citr", words, regions), word_mask, region_mask)
        losses = [F.cross_entropy(logits, own) for each in nearness for logits in (each, each.T)]
    return torch.stack(losses).mean()


def _unit_vectors(embeds: Tensor, mask: Tensor) -> Tensor:
    """Embeddings of length one in at least fp32, zero in padding, whatever is there."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return F.normalize(embeds.masked_fill(~mask[..., None], 0), dim=-1)


def _nearness(similarities: Tensor, word_mask: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(captions, images) means over nouns and over regions of what they attend to, from (captions, images, T, R)."""
    compared = word_mask[:, None, :, None] & region_mask[None, :, None, :]
    # The least number, not minus infinity: rows of padding alone would give NaN in the gradient.
    scores = similarities.masked_fill(~compared, torch.finfo(similarities.dtype).min)
    found = similarities * compared
    by_words = (scores.softmax(dim=3) * found).sum(dim=(2, 3)) / word_mask.sum(dim=1)[:, None]
    by_regions = (scores.softmax(dim=2) * found).sum(dim=(2, 3)) / region_mask.sum(dim=1)[None]
    return by_words, by_regions


def gather_with_gradients(tensor: Tensor) -> Tensor:
    """Tensors of all processes one after the other along the first axis; itself where there is one process.

    The first axis and all others may differ in length: each of the others is padded with zeros (False) to the longest.
    All processes must call this the same number of times, also those that have nothing to give.

    Gradients flow to the own process's part, multiplied by the number of processes. When all of them compute the same
    loss from what was gathered, the mean of their gradients (as `DistributedDataParallel` takes it) is then the
    gradient of that one loss; also for parameters that enter it without being gathered, such as its scale, whose
    gradient is whole in every process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    if torch.distributed.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """`gather_with_gradients` over at least two processes."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        shapes = torch.stack(_all_gather(torch.tensor(tensor.shape, device=tensor.device))).tolist()
        rank, longest = torch.distributed.get_rank(), [max(lengths) for lengths in zip(*shapes, strict=True)]
        counts = [shape[0] for shape in shapes]
        ctx.shape, ctx.start, ctx.processes = tensor.shape, sum(counts[:rank]), len(counts)
        # Gloo has no bool.
        sent = tensor.new_zeros(longest, dtype=torch.uint8 if tensor.dtype == torch.bool else None)
        sent[tuple(map(slice, tensor.shape))] = tensor
        received = _all_gather(sent)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)]).to(tensor.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        own = gradient[ctx.start : ctx.start + ctx.shape[0]]
        return ctx.processes * own[tuple(map(slice, ctx.shape))]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """Tensors of one shape, of all processes."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return parts
