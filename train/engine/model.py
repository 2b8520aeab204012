"""Module that is trained: the student and the heads of the losses."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation

from ..losses.base import TrainingLoss, TrainingOutput
from .optimization import freeze_stages, freeze_unused


class TrainingModel(nn.Module):
    """Module with the student and the heads of the losses, for the optimizer and for distributed wrappers.

    Only `student` is saved as a model. Frozen stages of its backbone get no gradients and stay in evaluation mode, so
    that statistics of their BatchNorm do not change.

    Args:
        student: The segmentation model that is trained and saved.
        losses: Losses of the run; each may have a head.
        frozen_stages: Number of backbone stages that are not trained; the stem is frozen with the first.
    """

    accepts_loss_kwargs = False

    def __init__(
        self, student: GKCForOpenVocabSegmentation, losses: Sequence[TrainingLoss] = (), frozen_stages: int = 0
    ):
        super().__init__()
        self.student = student
        self._losses = tuple(losses)
        for loss in losses:
            setattr(self, loss.head_name, loss.make_head(student))
        freeze_unused(student.model.backbone)
        self._frozen = freeze_stages(student.model.backbone, frozen_stages)

    def train(self, mode: bool = True) -> "TrainingModel":
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the blocks that FSDP shards as units; accelerate rejects names of blocks that do not exist."""
        student = self.student
        named = {*student._no_split_modules, *(student.model.backbone._no_split_modules or ())}
        return sorted(named & {type(module).__name__ for module in self.modules()})

    def forward(self, head_inputs: Mapping[str, Mapping[str, Tensor]] | None = None, **inputs: Any) -> TrainingOutput:
        """Run the student and the heads of the losses on the outputs of all its stages.

        Args:
            head_inputs: Result of `TrainingLoss.head_inputs` by the name of the loss; None runs only the student.
            inputs: Keyword arguments of the student.
        """
        student = self.student(**inputs, output_stages=True)
        heads = None
        if head_inputs is not None:
            heads = {}
            for loss in self._losses:
                head, inputs_of_head = getattr(self, loss.head_name), head_inputs[loss.name]
                heads[loss.name] = loss.run_head(head, self.student, student, **inputs_of_head)
        temperature = self.student.temperature.detach().clone()
        return TrainingOutput(heads=heads, temperature=temperature, student=student)
