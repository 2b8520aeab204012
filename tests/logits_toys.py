"""Small logits for tests of post-processing."""

import torch


def random_logits(queries=7, classes=5, height=9, width=12, spread=4.0) -> tuple[torch.Tensor, torch.Tensor]:
    return spread * torch.randn(queries, classes + 1), spread * torch.randn(queries, height, width)


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    """Return class logits with the given probabilities."""
    return torch.tensor(rows).log()


def mask_of(mask: list[str], inside: float = 8.0) -> torch.Tensor:
    return torch.tensor([[inside if cell == "#" else -inside for cell in row] for row in mask])
