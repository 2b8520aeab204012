"""Registry of losses: all subclasses of `TrainingLoss` in the modules of this package."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence

from configuration import Recipe

from .base import TrainingLoss


def loss_classes() -> list[type[TrainingLoss]]:
    """Return all classes of losses, sorted by name."""
    package = sys.modules[__package__]
    modules = [
        importlib.import_module(f"{__package__}.{module.name}") for module in pkgutil.iter_modules(package.__path__)
    ]
    found = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, TrainingLoss) and each.__module__ == module.__name__
    ]
    return sorted((each for each in found if each is not TrainingLoss), key=lambda each: each.name)


def settings_without_teacher(losses: Sequence[TrainingLoss]) -> str:
    """Return the recipe fields by which a run with these losses needs no teacher, empty if it needs none."""
    return " and ".join(loss.setting_without_clip for loss in losses if loss.needs_teacher)


def make_losses(recipe: Recipe) -> list[TrainingLoss]:
    """Return the losses that a recipe uses, sorted by name."""
    return [each(recipe) for each in loss_classes() if each.is_enabled(recipe)]
