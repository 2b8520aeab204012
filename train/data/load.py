"""Loading of datasets from `save_to_disk` folders, prepared benchmarks and the Hugging Face Hub.

The commands of this project save a file of checksums with a dataset. The files of a split are compared with it when
the split is loaded. A folder without the file is not checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_gkc.label_text import error_line
from modeling_gkc.vocabulary import Vocabulary

from ..storage.checksums import FILES, describe_files, read_checksummed_json, require_files, write_checksummed_json
from ..storage.fingerprints import settings_fingerprint
from .prepared import VOCABULARY_NAME, Prepared, finished_splits, is_prepared, load_prepared

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CHECKSUMS_NAME = "checksums.json"
_SHAPE = {"files": FILES, "remedy": str}


def write_dataset_checksums(folder: Path, remedy: str) -> None:
    """Write the checksums of a dataset that was just saved.

    Args:
        folder: Folder that `save_to_disk` wrote.
        remedy: Instruction that ends the error message about a damaged file.
    """
    paths = [*folder.rglob("*.arrow"), *folder.rglob("state.json"), *folder.rglob("dataset_*.json")]
    write_checksummed_json(folder / CHECKSUMS_NAME, {"files": describe_files(folder, paths), "remedy": remedy})


def _read_checksums(folder: Path) -> dict[str, Any]:
    return read_checksummed_json(folder / CHECKSUMS_NAME, _SHAPE, "delete it, or create the dataset again.")


def load_saved(folder: str | Path, split: str | None = None) -> Dataset | DatasetDict:
    """Load a dataset that `save_to_disk` wrote, after comparing its files with their checksums, if present.

    Args:
        folder: Folder of the dataset.
        split: Name of the only split to check. None checks all splits.

    Raises:
        ValueError: If the folder cannot be loaded, or a file is damaged.
    """
    from datasets import load_from_disk

    folder = Path(folder)
    if (folder / CHECKSUMS_NAME).exists():
        own = _read_checksums(folder)
        others = [
            name for name in own["files"] if "/" in name and split is not None and not name.startswith(f"{split}/")
        ]
        require_files(folder, {name: file for name, file in own["files"].items() if name not in others}, own["remedy"])
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # datasets and Arrow raise errors of many types
        raise ValueError(f"{folder} cannot be loaded: {error_line(error)}") from error


def load_split(dataset: str | Path, split: str) -> Dataset:
    """Load one split of a dataset.

    Args:
        dataset: Folder that `save_to_disk` or `train.data.prepare` wrote, or the name of a dataset on the Hub.
        split: Name of the split. It is ignored for a folder that holds a single dataset without splits.

    Raises:
        ValueError: If the dataset or split does not exist or is damaged.
    """
    from datasets import DatasetDict, load_dataset

    try:
        if is_prepared(dataset):
            return load_prepared(dataset, split).dataset
        if Path(dataset).is_dir():
            loaded = load_saved(dataset, split)
        else:
            try:
                loaded = load_dataset(str(dataset), split=split)
            except (OSError, ValueError) as error:
                raise ValueError(f"{dataset} cannot be loaded: {error_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"DATASET: {error}") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"--split: {dataset} has no split {split!r}, it has {', '.join(loaded)}. Name one of these."
            )
        return loaded[split]
    return loaded


def load_judged(folder: str | Path, split: str) -> Prepared:
    """Load a split to evaluate on, from a prepared benchmark or a dataset that `train.data.from_folder` wrote.

    Args:
        folder: Folder of the dataset.
        split: Name of the split.

    Raises:
        ValueError: If the dataset or split does not exist, or a file is damaged.
    """
    folder = Path(folder)
    if is_prepared(folder) or not (folder / CHECKSUMS_NAME).is_file():
        return load_prepared(folder, split)
    dataset = load_split(folder, split)
    own = _read_checksums(folder)
    files = [file for name, file in sorted(own["files"].items()) if name.startswith(f"{split}/")]
    info = {"shards": [{"sha256": settings_fingerprint(file)} for file in files], "expected": None}
    return Prepared(dataset, Vocabulary.from_file(folder / VOCABULARY_NAME), "folder", info)


def load_splits(folder: str | Path) -> Dataset | DatasetDict:
    """Load all finished splits in a folder, or a single dataset without splits.

    Raises:
        ValueError: If the folder is not a dataset, or a file is damaged.
    """
    from datasets import DatasetDict

    if is_prepared(folder):
        return DatasetDict({split: load_prepared(folder, split).dataset for split in finished_splits(folder)})
    return load_saved(folder)
