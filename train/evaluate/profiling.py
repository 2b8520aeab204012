"""How much a model computes for one image."""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from ..data.schema import read_row
from .segmenter import Segmenter


def profile(segmenter: Segmenter, dataset: Dataset) -> dict[str, Any]:
    """
    Floating-point operations of the first image, by torch's counter.

    It counts a multiplication and an addition as two, where papers often count one, and only those of matrix products,
    convolutions and attention. Encoding the words, once per vocabulary, and the post-processing are left out.

    Returns:
        `gigaflops`, `gigamultiplications` (half of it), `height` and `width` of the image as the data have it, and
        `by_operator`.
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
