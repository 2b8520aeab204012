"""Text-guided distillation loss under its public name; it is defined in `train.losses.distillation`."""

from .losses.distillation import text_guided_distillation_loss

__all__ = ["text_guided_distillation_loss"]
