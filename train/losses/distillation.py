"""Text-guided distillation: the student's matched queries learn what a frozen CLIP image encoder sees in the regions.

Letters: N matched regions of a batch, D width of CLIP's image-text space, B images, Q queries, C hidden, S decoder
stages.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configuration.sections import DISTILLATION_EMBEDDINGS, RELATIONS
from modeling_gkc.loss_gkc import mean_over_processes
from modeling_gkc.modeling_gkc import GKCStageOutput


def text_guided_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    text: Tensor,
    image_index: Tensor,
    scale: Tensor | float,
    relation: str = "cosine",
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to the teacher's embeddings, and of the student-teacher relations to those of the regions' names.

    With v, c, t the rows of `student`, `teacher`, `text`, and s the scale:

    * feature term: mean over regions i of ||v_i - c_i||^2;
    * relation term, `cosine`: mean over the pairs i, j of one image of (<v_i, c_j> - s^2 <t_i, t_j>)^2;
      `euclidean`: of (||v_i - c_j|| - |s| ||t_i - t_j||)^2. Both compare the pair with its names scaled by s. A region
      is also paired with itself, and the pairs of all images are averaged together;
    * joint term: all residuals of both terms averaged together.

    Without regions all three are exact zeros that still back-propagate. Over several processes the averages are those
    of the whole batch, in the sense that the processes' gradients average to its gradient.

    Args:
        student, teacher, text: (N, D) unit vectors.
        image_index: (N,) which image a region belongs to.
        scale: the learned scalar s.
        relation: `cosine` as in the released code or `euclidean` as in the paper.
        counts: (2,) regions and pairs that the sums are divided by; by default those that are there, averaged over
            processes.

    Returns:
        The feature term, the relation term and the joint term.
    """
    if relation not in RELATIONS:
        raise ValueError(f"`relation` must be one of {', '.join(RELATIONS)}, got {relation!r}.")
    feature_residuals = (student - teacher).square().sum(dim=-1)
    same_image = image_index[:, None] == image_index[None, :]
    relation_residuals = _relation_residuals(student, teacher, text, scale, relation)[same_image]
    feature_sum, relation_sum = feature_residuals.sum(), relation_residuals.sum()
    if counts is None:
        counts = mean_over_processes(student.new_tensor([len(feature_residuals), len(relation_residuals)]))
    regions, pairs = counts.to(student).clamp(min=torch.finfo(student.dtype).tiny)
    return feature_sum / regions, relation_sum / pairs, (feature_sum + relation_sum) / (regions + pairs)


def _relation_residuals(
    student: Tensor, teacher: Tensor, text: Tensor, scale: Tensor | float, relation: str
) -> Tensor:
    """Squared residuals (N, N) of all pairs."""
    if relation == "cosine":
        return (student @ teacher.T - scale**2 * (text @ text.T)).square()
    return (_distances(student, teacher) - abs(scale) * _distances(text, text)).square()


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # The matrix-product form loses the small distances to rounding.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


class DistillationHead(nn.Module):
    """What only distillation trains: the scale s, and the map from the student's query to the distilled embedding.

    Args:
        embedding: `shared` distils the class embedding itself; `query` a linear map of the query feature (as
            published); `projected` a linear map of the class embedding.
        hidden_size: C, width of the query features.
        projection_dim: D.
        num_stages: S for a map of its own for every decoder stage; None for one map.
    """

    def __init__(self, embedding: str, hidden_size: int, projection_dim: int, num_stages: int | None = None):
        super().__init__()
        if embedding not in DISTILLATION_EMBEDDINGS:
            raise ValueError(
                f"`distillation_embedding` must be one of {', '.join(DISTILLATION_EMBEDDINGS)}, got {embedding!r}."
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
        """For each decoder stage distillation embeddings (B, Q, D), L2-normalised."""
        if self.embedding == "shared":
            return tuple(stage.query_embeds for stage in stages)
        common = getattr(self, "projection", None)
        projections = self.projections if common is None else [common] * len(stages)
        source = "query_features" if self.embedding == "query" else "query_embeds"
        return tuple(
            F.normalize(projection(stage[source]), dim=-1)
            for projection, stage in zip(projections, stages, strict=True)
        )
