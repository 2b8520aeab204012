"""Frozen parameters, parameter groups and learning rate schedule."""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from configuration import Recipe

_UNDECAYED = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def freeze_stages(backbone: nn.Module, count: int) -> list[nn.Module]:
    """Freeze the stem and the first `count` stages of a backbone.

    The normalization layers of a backbone's output feature maps belong to no stage and are trained.

    Args:
        backbone: `CLIPResNetBackbone`, or a backbone of transformers with a stem and a list of stages, such as those
            of ResNet, ConvNeXt and Swin.
        count: Number of stages to freeze. Zero freezes neither stages nor stem.

    Returns:
        The frozen modules.

    Raises:
        ValueError: The backbone has fewer stages, or its stages cannot be found.
    """
    if count == 0:
        return []
    stem, stages = _stem_and_stages(backbone)
    if count > len(stages):
        raise ValueError(f"`model.frozen_stages` = {count}, but the backbone has {len(stages)} stages; choose fewer.")
    frozen = [stem, *stages[:count]]
    for module in frozen:
        module.requires_grad_(False).eval()
    return frozen


def freeze_unused(backbone: nn.Module) -> None:
    """Freeze the final normalization layer of a backbone that normalizes each feature map separately, such as Swin.

    The layer does not contribute to any loss, and parameters without gradients stop distributed training.
    """
    unused = getattr(getattr(backbone, "base_model", backbone), "layernorm", None)
    if unused is not None and hasattr(backbone, "hidden_states_norms"):
        unused.requires_grad_(False)


def _stem_and_stages(backbone: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Return the stem and the stages of a backbone; raise a `ValueError` if they cannot be found."""
    # Some backbones of transformers wrap a model.
    model = getattr(backbone, "base_model", backbone)
    encoder = getattr(model, "encoder", None)
    stages = getattr(encoder, "stages", None) or getattr(encoder, "layers", None)
    stems = (getattr(encoder, "stem", None), *(getattr(model, name, None) for name in ("embedder", "embeddings")))
    stem = next((stem for stem in stems if stem is not None), None)
    if stem is None or stages is None:
        raise ValueError(
            f"The stages of {type(backbone).__name__} cannot be found: set model.frozen_stages=0, or freeze its "
            "parameters before training."
        )
    return stem, stages


# A saved optimizer knows parameters by position, and the classifier's own once were the student's.
_FIRST_MODULES = ("", "_fsdp_wrapped_module", "student", "student.classifier")


def parameter_groups(model: nn.Module, args: TrainingArguments, recipe: Recipe) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model by learning rate and weight decay.

    As in Mask2Former's published recipe (detectron2), normalization layers and embeddings have no weight decay, and
    biases have. Parameters that are not the weight or bias of a layer (embeddings, scales, tables) count as
    embeddings.

    Args:
        model: The `TrainingModel`, possibly wrapped for FSDP.
        args: Learning rate and weight decay.
        recipe: Recipe with the learning rate factor of the backbone.

    Returns:
        Parameter groups for an optimizer.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    # FSDP1 inserts the names of its wrappers.
    modules = [(name.replace("_fsdp_wrapped_module.", ""), module) for name, module in model.named_modules()]
    for module_name, module in sorted(modules, key=lambda named: named[0] not in _FIRST_MODULES):
        in_backbone = "student.model.backbone." in f"{module_name}."
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays = not isinstance(module, _UNDECAYED) and name.endswith(("weight", "bias"))
                groups.setdefault((in_backbone, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate * (recipe.optimizer.backbone_factor if in_backbone else 1),
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]


def learning_rate_factor(step: int, num_steps: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate: linear warm-up, then one decay at each milestone.

    Args:
        step: Number of completed optimizer steps.
        num_steps: Number of optimizer steps of the training.
        recipe: Recipe with the schedule.
    """
    warmup_steps = recipe.optimizer.warmup_share * num_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return recipe.optimizer.decay_factor ** sum(step >= share * num_steps for share in recipe.optimizer.milestones)
