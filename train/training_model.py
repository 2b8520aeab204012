"""What is trained: the student and the heads that only training needs, in one module.

Letters: B images, Q queries, D width of the image-text space, P words of the vocabulary, S decoder stages.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from configuration import Recipe
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation, GKCForOpenVocabSegmentationOutput

from .distillation import DistillationHead


@dataclass
class TrainingOutput(ModelOutput):
    """Output of `TrainingModel`.

    Attributes:
        prompt_logits: for each stage (B, Q, P + 1) logits of all words and no-object; with text diversification.
        distillation_embeds: for each stage (B, Q, D) unit vectors; with distillation.
        distillation_scale: the learned scalar s; with distillation.
        student: the student's own output.
    """

    prompt_logits: tuple[Tensor, ...] | None = None
    distillation_embeds: tuple[Tensor, ...] | None = None
    distillation_scale: Tensor | None = None
    student: GKCForOpenVocabSegmentationOutput | None = None


class TrainingModel(nn.Module):
    """The student and the head that only training needs, in one module for optimiser, clipping and processes.

    Only `student` is ever saved as a model.
    """

    accepts_loss_kwargs = False

    def __init__(self, student: GKCForOpenVocabSegmentation, distillation_head: DistillationHead | None):
        super().__init__()
        self.student = student
        self.distillation_head = distillation_head

    def forward(self, prompt_embeds: Tensor | None = None, **inputs: Any) -> TrainingOutput:
        """Run the student and, on all of its stages, the heads; `prompt_embeds` (P, D) are all words."""
        outputs = self.student(**inputs, output_stages=True)
        prompt_logits = distillation_embeds = scale = None
        if prompt_embeds is not None:
            prompt_logits = tuple(
                self.student.class_logits(stage.query_embeds, prompt_embeds) for stage in outputs.stages
            )
        if self.distillation_head is not None:
            distillation_embeds = tuple(self.distillation_head(stage) for stage in outputs.stages)
            scale = self.distillation_head.scale
        return TrainingOutput(prompt_logits, distillation_embeds, scale, outputs)


def make_distillation_head(model: GKCForOpenVocabSegmentation, recipe: Recipe) -> DistillationHead | None:
    """The head that the recipe's distillation needs; its initial weights depend on the recipe's seed alone."""
    if recipe.distillation_weight == 0:
        return None
    sizes = model.config.hidden_size, model.config.projection_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = DistillationHead(recipe.distillation_embedding, *sizes)
    # A parameter that no loss reaches would stop distributed training.
    head.scale.requires_grad_(recipe.distillation_terms != "feature")
    return head
