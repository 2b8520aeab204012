"""What a run tells: averages of its losses."""

import torch
from torch import Tensor

from modeling_gkc.loss_gkc import mean_over_processes


class Averages:
    """Running means of named scalars, kept on the device until they are taken."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call and over processes."""
        if not self.sums:
            return {}
        device = next(iter(self.sums.values())).device
        means = mean_over_processes(torch.stack([value.to(device) for value in self.sums.values()]) / self.count)
        averages = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.count = {}, 0
        return averages
