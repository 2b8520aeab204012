"""Training data: the dataset schema and its check, joint transforms, and the collator."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collator import SegmentationCollator, expand_masks
    from .samples import AugmentedDataset
    from .schema import check_dataset, dataset_features, decode_ids, encode_ids, read_row
    from .splits import novel_positions, split_categories
    from .streaming import StreamingDataset, streaming_loader
    from .transforms import JointTransform

# Modules of the public names. They are imported lazily, since most need torch and --help must not.
_MODULES = {
    "AugmentedDataset": "samples",
    "JointTransform": "transforms",
    "SegmentationCollator": "collator",
    "StreamingDataset": "streaming",
    "check_dataset": "schema",
    "dataset_features": "schema",
    "decode_ids": "schema",
    "encode_ids": "schema",
    "expand_masks": "collator",
    "novel_positions": "splits",
    "read_row": "schema",
    "split_categories": "splits",
    "streaming_loader": "streaming",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


__all__ = [
    "AugmentedDataset",
    "JointTransform",
    "SegmentationCollator",
    "StreamingDataset",
    "check_dataset",
    "dataset_features",
    "decode_ids",
    "encode_ids",
    "expand_masks",
    "novel_positions",
    "read_row",
    "split_categories",
    "streaming_loader",
]
