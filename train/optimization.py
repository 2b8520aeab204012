"""Which parameters learn how fast, and when."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from configuration import Recipe

_UNDECAYED = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def parameter_groups(model: nn.Module, args: TrainingArguments, recipe: Recipe) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay.

    As in Mask2Former's published recipe (detectron2), neither normalisations nor embeddings decay, biases do; single
    parameters that are no weight of a layer (embeddings, scales, tables) count as embeddings.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                in_backbone = "student.model.backbone." in f"{module_name}."
                decays = not isinstance(module, _UNDECAYED) and name.endswith(("weight", "bias"))
                groups.setdefault((in_backbone, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate * (recipe.backbone_factor if in_backbone else 1),
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]


def learning_rate_factor(step: int, num_steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then one decay at each milestone."""
    warmup_steps = recipe.warmup_share * num_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return recipe.decay_factor ** sum(step >= share * num_steps for share in recipe.milestones)
