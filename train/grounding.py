"""Grounding loss under its public name; it is defined in `train.losses.grounding`."""

from .losses.grounding import grounding_loss

__all__ = ["grounding_loss"]
