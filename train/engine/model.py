"""What is trained: the student and the heads that only training needs, in one module.

Letters: B images, Q queries, D width of the image-text space, P words of the vocabulary, S decoder stages.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from configuration import Recipe
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation

from ..losses.criterion import TrainingOutput
from ..losses.distillation import DistillationHead
from .optimization import freeze_stages, freeze_unused

GROUNDING_SCALE = 1 / 0.07  # at the start, as CLIP's


class TrainingModel(nn.Module):
    """The student and the heads that only training needs, in one module for optimiser, clipping and processes.

    Only `student` is ever saved as a model. Frozen stages of its backbone get no gradients, and stay in evaluation
    mode: statistics of their BatchNorm do not move.

    Args:
        student: the model.
        distillation_head: None without distillation.
        grounding: whether there is grounding, which has a scale.
        frozen_stages: stages of the student's backbone, the stem counted with the first, that are not trained.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        student: GKCForOpenVocabSegmentation,
        distillation_head: DistillationHead | None,
        grounding: bool = False,
        frozen_stages: int = 0,
    ):
        super().__init__()
        self.student = student
        self.distillation_head = distillation_head
        scale = nn.Parameter(torch.tensor(math.log(GROUNDING_SCALE))) if grounding else None
        self.register_parameter("grounding_logit_scale", scale)
        freeze_unused(student.model.backbone)
        self._frozen = freeze_stages(student.model.backbone, frozen_stages)

    def train(self, mode: bool = True) -> "TrainingModel":
        """Sets training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def _no_split_modules(self) -> list[str]:
        """Blocks that are sharded each as a whole; accelerate reads them here and refuses any that are not there."""
        student = self.student
        named = {*student._no_split_modules, *(student.model.backbone._no_split_modules or ())}
        return sorted(named & {type(module).__name__ for module in self.modules()})

    def forward(self, prompt_embeds: Tensor | None = None, **inputs: Any) -> TrainingOutput:
        """Run the student and, on all of its stages, the heads; `prompt_embeds` (P, D) are all words."""
        student = self.student(**inputs, output_stages=True)
        outputs = TrainingOutput(temperature=self.student.temperature.detach().clone(), student=student)
        if prompt_embeds is not None:
            outputs.prompt_logits = tuple(
                self.student.class_logits(stage.query_embeds, prompt_embeds) for stage in student.stages
            )
        if self.distillation_head is not None:
            outputs.distillation_embeds = self.distillation_head(student.stages)
            # Parameters themselves must not leave the module: sharded ones are whole only while it runs.
            outputs.distillation_scale = self.distillation_head.scale * 1
        if self.grounding_logit_scale is not None:
            outputs.grounding_scale = self.grounding_logit_scale.clamp(max=math.log(100)).exp()
        return outputs


def make_training_model(student: GKCForOpenVocabSegmentation, recipe: Recipe) -> TrainingModel:
    """The student with the heads that a recipe needs; their initial weights depend on the recipe's seed alone."""
    return TrainingModel(
        student, _make_distillation_head(student, recipe), recipe.grounding.weight > 0, recipe.model.frozen_stages
    )


def _make_distillation_head(student: GKCForOpenVocabSegmentation, recipe: Recipe) -> DistillationHead | None:
    if recipe.distillation.weight == 0:
        return None
    config = student.config
    stages = config.decoder_layers + 1 if recipe.distillation.heads == "per_stage" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        head = DistillationHead(
            recipe.distillation.embedding, config.hidden_size, config.projection_dim, num_stages=stages
        )
    # A parameter that no loss reaches would stop distributed training.
    head.scale.requires_grad_(recipe.distillation.terms != "feature")
    return head
