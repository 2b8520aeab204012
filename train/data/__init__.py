"""Training data: the dataset schema and its check, joint transforms, and the collator."""

from .collator import SegmentationCollator, expand_masks
from .samples import AugmentedDataset
from .schema import check_dataset, dataset_features, decode_ids, encode_ids, read_row
from .splits import novel_positions, split_categories
from .streaming import StreamingDataset, streaming_loader
from .transforms import JointTransform

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
