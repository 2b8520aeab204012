"""Number of floating-point operations of a model."""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from ..data.schema import read_row
from .segmenter import Segmenter


def profile(segmenter: Segmenter, dataset: Dataset) -> dict[str, Any]:
    """Count the floating-point operations of the first image with torch's FLOP counter.

    The counter covers matrix products, convolutions and attention, and counts a multiply-add as two operations, where
    papers often count one. Text encoding (once per vocabulary) and post-processing are not included.

    Returns:
        `gigaflops`, `gigamultiplications` (half of it), `height` and `width` of the image before preprocessing in
        pixels, and `by_operator`, the number of operations of each operator.
    """
    image, _ = read_row(dataset[0])
    inputs = segmenter.prepare([image])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        segmenter.forward(inputs)
    by_operator = {str(name): count for name, count in counter.get_flop_counts().get("Global", {}).items()}
    total = counter.get_total_flops()
    return {
        "gigaflops": total / 1e9,
        "gigamultiplications": total / 2e9,
        "height": image.shape[0],
        "width": image.shape[1],
        "by_operator": by_operator,
    }
