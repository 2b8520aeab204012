"""Prediction files with the class ids of the benchmark's annotations, for the official evaluation tools."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from modeling_gkc.atomic_files import atomic_path, atomic_write_json

from ..data.schema import encode_ids
from ..metrics.score import Prediction, Sample

PANOPTIC_JSON = "panoptic.json"


class PredictionWriter:
    """Writer of `semantic/<image_id>.png`, `panoptic/<image_id>.png` and `panoptic.json`.

    A semantic map holds the id of each class in the annotation files of the benchmark, in 8 bits if all ids are below
    255 and in 16 bits otherwise; pixels without a class are 255 or 65535. A panoptic map has the color coding of COCO:
    id = R + 256 G + 65536 B, 0 for void.

    Args:
        folder: Folder of all files.
        raw_ids: Id of each class in the annotation files.

    Raises:
        ValueError: An id does not lie between 0 and 65534.
    """

    def __init__(self, folder: Path, raw_ids: Sequence[int]):
        if not raw_ids or not 0 <= min(raw_ids) <= max(raw_ids) < 65535:
            raise ValueError(
                f"Class ids of prediction files must lie between 0 and 65534, got {min(raw_ids)} to {max(raw_ids)}."
            )
        self.folder, self.raw_ids = folder, list(raw_ids)
        bits, self.void = (np.uint8, 255) if max(raw_ids) < 255 else (np.uint16, 65535)
        self._table = np.array(
            [*raw_ids, self.void], dtype=bits
        )  # index -1, a pixel without a class, selects the last entry

    def write(self, sample: Sample, prediction: Prediction) -> list[dict[str, Any]]:
        """Write the maps of one image, and return its entry of `panoptic.json` in a list, which may be empty."""
        if prediction.classes is not None:
            self._save(Image.fromarray(self._table[prediction.classes]), "semantic", sample.image_id)
        if prediction.ids is None:
            return []
        path = self._save(Image.fromarray(encode_ids(prediction.ids)), "panoptic", sample.image_id)
        areas = dict(zip(*np.unique(prediction.ids, return_counts=True), strict=True))
        segments = [
            {
                "id": segment["id"],
                "category_id": self.raw_ids[segment["category_id"]],
                "area": int(areas.get(segment["id"], 0)),
                "iscrowd": 0,
            }
            for segment in prediction.segments
        ]
        return [{"image_id": sample.image_id, "file_name": path.name, "segments_info": segments}]

    def _save(self, image: Image.Image, kind: str, image_id: str) -> Path:
        path = self.folder / kind / f"{_relative_path(image_id)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            image.save(temporary, "PNG")
        return path

    def finish(self, written: Sequence[dict[str, Any]]) -> None:
        """Write `panoptic.json` from the entries of all images; without entries, write nothing."""
        if written:
            atomic_write_json(self.folder / PANOPTIC_JSON, {"annotations": list(written)}, indent=1)


def _relative_path(image_id: str) -> str:
    """Convert an image id to a relative path inside the output folder."""
    parts = [part for part in PurePosixPath(image_id).parts if part not in ("/", "..", ".")]
    if not parts:
        raise ValueError(f"Image id {image_id!r} cannot be used as a file name.")
    return "/".join(parts)
