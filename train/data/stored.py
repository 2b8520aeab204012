"""Datasets by the place where they are stored: folders of `save_to_disk`, prepared benchmarks, the Hub."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .prepared import finished_splits, is_prepared, load_prepared


def load_split(dataset: str | Path, split: str) -> Dataset:
    """Load one split of a dataset.

    Args:
        dataset: folder that `save_to_disk` or `train.data.prepare` wrote, with one split or several; or a name on the
            Hub.
        split: of a folder with a single one, any name will do.

    Raises:
        ValueError: there is no such dataset or split.
    """
    if is_prepared(dataset):
        try:
            return load_prepared(dataset, split).dataset
        except ValueError as error:
            raise ValueError(f"DATASET: {error}") from error
    try:
        loaded = load_from_disk(str(dataset)) if Path(dataset).is_dir() else load_dataset(str(dataset), split=split)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"DATASET: {dataset} cannot be loaded: {reason}") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise ValueError(f"--split: {dataset} has no split {split!r}, it has {', '.join(loaded)}.")
        return loaded[split]
    return loaded


def load_splits(folder: str | Path) -> Dataset | DatasetDict:
    """All that a folder holds: several splits, or the rows of a single one without a name.

    Raises:
        OSError, ValueError: it is no folder of a dataset.
    """
    if is_prepared(folder):
        return DatasetDict({split: load_prepared(folder, split).dataset for split in finished_splits(folder)})
    return load_from_disk(str(folder))
