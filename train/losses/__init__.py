"""Losses of the paper: text diversification, text-guided distillation, grounding, and the criterion that sums them."""
