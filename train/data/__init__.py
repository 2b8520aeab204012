"""Training data: the dataset schema and its check, joint transforms, and the collator."""

from .collator import SegmentationCollator
from .schema import check_dataset, dataset_features, decode_ids, encode_ids, read_row
from .transforms import AugmentedDataset, JointTransform

__all__ = [
    "AugmentedDataset",
    "JointTransform",
    "SegmentationCollator",
    "check_dataset",
    "dataset_features",
    "decode_ids",
    "encode_ids",
    "read_row",
]
