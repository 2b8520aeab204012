"""Text-guided distillation: matched queries learn the embeddings of their regions by a frozen CLIP image encoder.

Letters: N matched regions of a batch, D width of CLIP's image-text space, B images, Q queries, C hidden, S decoder
stages.
"""

from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from configuration.sections import DISTILLATION_EMBEDDINGS, RELATIONS
from modeling_gkc.loss_gkc import Matches, mean_over_processes
from modeling_gkc.modeling_gkc import (
    GKCForOpenVocabSegmentation,
    GKCForOpenVocabSegmentationOutput,
    GKCStageOutput,
)

from .base import Batch, Regions, StepDivisors, TrainingLoss, TrainingOutput, all_gather


class DistillationLoss(TrainingLoss):
    """Text-guided distillation of matched regions, at every decoder stage.

    `Regions.prepared` is a (N,) bool mask of the distilled regions. These are at most the `max_regions` regions with
    the lowest priorities among all micro-batches and processes of a step.

    The divisors are the number of distilled regions and of their pairs. They count annotated regions, so that regions
    that no query is matched with, as an image has more regions than queries, count as residuals of zero.
    """

    name = "distillation"
    needs_teacher = True
    setting_without_clip = "distillation.weight=0"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in the total loss."""
        terms = {"split": ("feature", "relation")}.get(self.settings.terms, (self.settings.terms,))
        weights = {f"loss_distillation_{term}": self.settings.weight for term in terms}
        if self.settings.terms == "split" and self.settings.relation_weight is not None:
            weights["loss_distillation_relation"] = self.settings.relation_weight
        return weights

    def make_head(self, student: GKCForOpenVocabSegmentation) -> "DistillationHead":
        """Return the scale and the linear maps of the recipe, with initial weights from its seed."""
        config = student.config
        stages = config.decoder_layers + 1 if self.settings.heads == "per_stage" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.run.seed)
            head = DistillationHead(self.settings.embedding, config.hidden_size, config.projection_dim, stages)
        # Parameters without gradients stop distributed training.
        head.scale.requires_grad_(self.settings.terms != "feature")
        return head

    def run_head(
        self,
        head: "DistillationHead",
        student: GKCForOpenVocabSegmentation,
        outputs: GKCForOpenVocabSegmentationOutput,
    ) -> dict[str, tuple[Tensor, ...] | Tensor]:
        """Return the unit embeddings `embeds` (B, Q, D) of each stage, and the learned `scale`."""
        return {"embeds": head(outputs.stages), "scale": head.scale * 1}

    def prepare(self, step: Sequence[Regions], batches: Sequence[Batch]) -> None:
        """Choose the regions that are distilled, and look up their embeddings by the teacher."""
        limit = self.settings.max_regions
        priorities = [regions.priorities.masked_fill(~regions.kept.cpu(), torch.inf) for regions in step]
        first_out = _lowest_over_processes(torch.cat([*priorities, torch.empty(0, dtype=torch.float64)]), limit + 1)[
            -1
        ]
        for regions, batch, own in zip(step, batches, priorities, strict=True):
            distilled = (own < first_out).to(regions.kept.device)
            regions.prepared[self.name] = distilled
            if regions.teacher is None:
                regions.teacher = self.context.teacher_embeds(batch, distilled, regions.counts)

    def divisor_counts(self, regions: Regions) -> tuple[int, int]:
        """Return the number of distilled regions and of their pairs within an image, including each with itself."""
        per_image = [int(part.sum()) for part in regions.prepared[self.name].cpu().split(regions.counts)]
        return sum(per_image), sum(count**2 for count in per_image)

    def __call__(
        self,
        outputs: TrainingOutput,
        batch: Batch,
        regions: Regions,
        matches: Sequence[Matches],
        divisors: StepDivisors,
    ) -> dict[str, Tensor]:
        """Compute the three terms (S,) for every stage."""
        head = outputs.heads[self.name]
        losses = []
        for embeds, of_stage in zip(head["embeds"], matches, strict=True):
            image, query, region = regions.pairs(of_stage, regions.prepared[self.name])
            terms = text_guided_distillation_loss(
                student=embeds[image, query].float(),
                teacher=regions.teacher[region],
                text=self.context.text_bank.embeds[regions.prompts[region]],
                image_index=image,
                scale=head["scale"],
                relation=self.settings.relation,
                counts=divisors.losses[self.name],
            )
            losses.append(torch.stack(terms))
        names = (f"loss_distillation_{term}" for term in ("feature", "relation", "joint"))
        return dict(zip(names, torch.stack(losses, dim=1), strict=True))

    def log_values(self, outputs: TrainingOutput, regions: Regions) -> dict[str, Tensor]:
        """Return the number of distilled regions and the scale."""
        return {
            "distilled_regions": regions.prepared[self.name].sum().float(),
            "distillation_scale": outputs.heads[self.name]["scale"],
        }


def _lowest_over_processes(values: Tensor, count: int) -> Tensor:
    """Return the lowest `count` values (number,) of all processes in ascending order, padded with infinity."""
    lowest = torch.full((count,), torch.inf, dtype=values.dtype)
    own = values.sort().values[:count]
    lowest[: len(own)] = own
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lowest
    # NCCL supports only tensors on a GPU.
    sent = lowest.to("cuda") if torch.distributed.get_backend() == "nccl" else lowest
    return torch.cat(all_gather(sent)).cpu().sort().values[:count]


def text_guided_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    text: Tensor,
    image_index: Tensor,
    scale: Tensor | float,
    relation: str = "cosine",
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the distance to the teacher's embeddings, and that of relations between regions to those between names.

    With v, c, t the rows of `student`, `teacher`, `text`, and s the scale:

    * feature term: mean over regions i of ||v_i - c_i||^2;
    * relation term, `cosine`: mean over the pairs i, j of one image of (<v_i, c_j> - s^2 <t_i, t_j>)^2;
      `euclidean`: of (||v_i - c_j|| - |s| ||t_i - t_j||)^2. Both compare the pair with its names scaled by s. A region
      is also paired with itself, and the pairs of all images are averaged together;
    * joint term: all residuals of both terms averaged together.

    Without regions all three are exact zeros with gradients of zero. Over several processes the averages are those of
    the whole batch: the mean of the processes' gradients is its gradient.

    Args:
        student: (N, D) unit embeddings of the matched queries.
        teacher: (N, D) unit embeddings of the regions by the teacher.
        text: (N, D) unit embeddings of the regions' prompts.
        image_index: (N,) index of the image of each region.
        scale: Learned scalar s.
        relation: `cosine` as in the released code, or `euclidean` as in the paper.
        counts: (2,) number of regions and of pairs by which the sums are divided. By default, the numbers of given
            regions and pairs, averaged over processes.

    Returns:
        The feature term, the relation term and the joint term.
    """
    if relation not in RELATIONS:
        raise ValueError(f"`relation` must be one of {', '.join(RELATIONS)}, got {relation!r}.")
    feature_residuals = (student - teacher).square().sum(dim=-1)
    same_image = image_index[:, None] == image_index[None, :]
    if relation == "cosine":
        differences = student @ teacher.T - scale**2 * (text @ text.T)
    else:
        differences = _distances(student, teacher) - abs(scale) * _distances(text, text)
    relation_residuals = differences.square()[same_image]
    feature_sum, relation_sum = feature_residuals.sum(), relation_residuals.sum()
    if counts is None:
        counts = mean_over_processes(student.new_tensor([len(feature_residuals), len(relation_residuals)]))
    regions, pairs = counts.to(student).clamp(min=torch.finfo(student.dtype).tiny)
    return feature_sum / regions, relation_sum / pairs, (feature_sum + relation_sum) / (regions + pairs)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the (N, M) Euclidean distances of the rows of two matrices."""
    # Computing distances by a matrix product would round small distances to zero.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


class DistillationHead(nn.Module):
    """Head of the distillation loss: the scale s, and linear maps from queries to distilled embeddings.

    Args:
        embedding: Embedding that is distilled: the class embedding itself (`shared`), a linear map of the query
            feature (`query`, as published), or a linear map of the class embedding (`projected`).
        hidden_size: Width C of the query features.
        projection_dim: Width D of the embeddings.
        num_stages: Number S of decoder stages for one map per stage; None for one map in common.
    """

    def __init__(self, embedding: str, hidden_size: int, projection_dim: int, num_stages: int | None = None):
        super().__init__()
        if embedding not in DISTILLATION_EMBEDDINGS:
            raise ValueError(
                f"`distillation.embedding` must be one of {', '.join(DISTILLATION_EMBEDDINGS)}, got {embedding!r}."
            )
        self.embedding = embedding
        self.scale = nn.Parameter(torch.ones(()))
        if embedding == "shared":
            return
        width = hidden_size if embedding == "query" else projection_dim
        if num_stages is None:
            self.projection = nn.Linear(width, projection_dim)
        else:
            self.projections = nn.ModuleList(nn.Linear(width, projection_dim) for _ in range(num_stages))

    def forward(self, stages: Sequence[GKCStageOutput]) -> tuple[Tensor, ...]:
        """Return the L2-normalized distillation embeddings (B, Q, D) of each decoder stage."""
        if self.embedding == "shared":
            return tuple(stage.query_embeds for stage in stages)
        common = getattr(self, "projection", None)
        projections = self.projections if common is None else [common] * len(stages)
        source = "query_features" if self.embedding == "query" else "query_embeds"
        return tuple(
            F.normalize(projection(stage[source]), dim=-1)
            for projection, stage in zip(projections, stages, strict=True)
        )
