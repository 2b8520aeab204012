"""Caption grounding: contrastive alignment of the nouns of captions with the regions of their images.

The loss is the grounding loss of Zareian et al., *Open-Vocabulary Object Detection Using Captions*, CVPR 2021, between
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
from .base import Batch, LossContext, Regions, StepDivisors, TrainingLoss, TrainingOutput, all_gather

INITIAL_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # as in CLIP


class GroundingLoss(TrainingLoss):
    """Caption grounding of the class embeddings of the last stage, which are compared with prompts at inference.

    The loss compares the images of a micro-batch, of all processes, with each other. `Regions.prepared` contains
    the drawn nouns of each image. The head is the logarithm of the learned scale.
    """

    name = "grounding"
    head_name = "grounding_logit_scale"
    sources = ("noun_bank",)
    is_collective = True

    def setup(self, context: LossContext) -> None:
        """Encode the nouns of the captions unless their embeddings were given.

        Raises:
            ValueError: A dataset has no column `nouns`.
        """
        super().setup(context)
        noun_bank = context.sources.get("noun_bank")
        if noun_bank is None:
            nouns = distinct_nouns(*context.datasets)
            noun_bank = NounBank.from_nouns(nouns, context.student, context.processor)
        self._noun_bank = noun_bank.to(context.device)

    def make_head(self, student: GKCForOpenVocabSegmentation) -> nn.Parameter:
        """Return the initial logarithm of the scale."""
        return nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def run_head(
        self,
        head: nn.Parameter,
        student: GKCForOpenVocabSegmentation,
        outputs: GKCForOpenVocabSegmentationOutput,
    ) -> Tensor:
        """Return the scale, limited to `LARGEST_SCALE`."""
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
        """Compute `loss_grounding` (1,) at the last stage."""
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
        """Return the scale."""
        return {"grounding_scale": outputs.heads[self.name]}


def grounding_loss(
    word_embeds: Tensor, region_embeds: Tensor, word_mask: Tensor, region_mask: Tensor, scale: Tensor | float
) -> Tensor:
    """Compute the contrastive loss between the captions and images of a batch.

    The similarity of caption c and image i is computed from the scaled cosines of their nouns and regions in two ways:
    each noun attends to the regions by softmax, and the attended similarities are averaged over nouns; or each region
    attends to the nouns, and they are averaged over regions. For both similarities there is a cross-entropy of
    captions over images and one of images over captions. The loss is the mean of the four.

    Images without nouns or without regions are left out. If all are left out, the loss is an exact zero with gradients
    of zero. All given images are compared: with several processes, pass the results of `gather_with_gradients`. With
    accumulated micro-batches, the result is the mean of the losses of micro-batches, which have fewer images to
    compare, and not the loss of one large batch.

    Args:
        word_embeds: (B, T, D) embeddings of nouns, which are normalized here.
        region_embeds: (B, R, D) embeddings of regions, which are normalized here.
        word_mask: (B, T) bool mask, true for nouns and false for padding.
        region_mask: (B, R) bool mask, true for regions and false for padding.
        scale: Inverse temperature.

    Returns:
        The loss, a scalar.
    """
    taking_part = word_mask.any(dim=1) & region_mask.any(dim=1)
    word_mask, region_mask = word_mask[taking_part], region_mask[taking_part]
    with torch.autocast(word_embeds.device.type, enabled=False):
        words = _unit_vectors(word_embeds[taking_part], word_mask)
        regions = _unit_vectors(region_embeds[taking_part], region_mask)
        if len(words) == 0:
            return words.sum() + regions.sum() + 0 * scale
        own = torch.arange(len(words), device=words.device)
        attended = _attended_similarities(
            scale * torch.einsum("ctd,ird->citr", words, regions), word_mask, region_mask
        )
        losses = [F.cross_entropy(logits, own) for each in attended for logits in (each, each.T)]
    return torch.stack(losses).mean()


def _unit_vectors(embeds: Tensor, mask: Tensor) -> Tensor:
    """Normalize embeddings in at least fp32, and set padding to zero."""
    embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    return F.normalize(embeds.masked_fill(~mask[..., None], 0), dim=-1)


def _attended_similarities(similarities: Tensor, word_mask: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Average attended similarities (captions, images, T, R) over nouns and over regions, to (captions, images)."""
    compared = word_mask[:, None, :, None] & region_mask[None, :, None, :]
    # The lowest finite number instead of minus infinity, because rows with only padding would have NaN gradients.
    scores = similarities.masked_fill(~compared, torch.finfo(similarities.dtype).min)
    masked = similarities * compared
    by_words = (scores.softmax(dim=3) * masked).sum(dim=(2, 3)) / word_mask.sum(dim=1)[:, None]
    by_regions = (scores.softmax(dim=2) * masked).sum(dim=(2, 3)) / region_mask.sum(dim=1)[None]
    return by_words, by_regions


def gather_with_gradients(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along the first axis, with gradients for the own process's tensor.

    All axes may differ in length between processes. All but the first are padded with zeros (False) to the longest.
    All processes must call this the same number of times, also with empty tensors.

    The gradient of the own tensor is multiplied by the number of processes. If all processes compute the same loss
    from the gathered tensors, the mean of their gradients, as `DistributedDataParallel` computes it, is then the
    gradient of that loss, also for parameters that enter the loss without being gathered, such as its scale.

    Args:
        tensor: Tensor of this process.

    Returns:
        The concatenated tensor; with one process, the tensor itself.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    if torch.distributed.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """Autograd function of `gather_with_gradients` for at least two processes."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        shapes = torch.stack(all_gather(torch.tensor(tensor.shape, device=tensor.device))).tolist()
        rank, longest = torch.distributed.get_rank(), [max(lengths) for lengths in zip(*shapes, strict=True)]
        counts = [shape[0] for shape in shapes]
        ctx.shape, ctx.start, ctx.processes = tensor.shape, sum(counts[:rank]), len(counts)
        # Gloo does not support bool.
        sent = tensor.new_zeros(longest, dtype=torch.uint8 if tensor.dtype == torch.bool else None)
        sent[tuple(map(slice, tensor.shape))] = tensor
        received = all_gather(sent)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)]).to(tensor.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        own = gradient[ctx.start : ctx.start + ctx.shape[0]]
        return ctx.processes * own[tuple(map(slice, ctx.shape))]
