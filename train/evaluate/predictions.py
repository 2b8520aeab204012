"""Predictions as files, in the ids of the benchmark's own annotations, so that its official tools can read them."""

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
    """
    Writes `semantic/<image_id>.png`, `panoptic/<image_id>.png` and what `panoptic.json` lists of them.

    A semantic map holds the `id` that each class has in the benchmark's annotation files (the vocabulary's `ids` says
    which files), in 8 bits where all fit and in 16 otherwise; void, where the model found none of the classes, is 255
    or 65535. A panoptic map is coded as COCO's: id = R + 256 G + 65536 B, 0 is void.

    Args:
        folder: of all of them.
        raw_ids: for every class its id in the annotation files.

    Raises:
        ValueError: an id does not fit into 16 bits.
    """

    def __init__(self, folder: Path, raw_ids: Sequence[int]):
        if not raw_ids or not 0 <= min(raw_ids) <= max(raw_ids) < 65535:
            raise ValueError(f"class ids must lie between 0 and 65534, got {min(raw_ids)} to {max(raw_ids)}.")
        self.folder, self.raw_ids = folder, list(raw_ids)
        bits, self.void = (np.uint8, 255) if max(raw_ids) < 255 else (np.uint16, 65535)
        self._table = np.array([*raw_ids, self.void], dtype=bits)  # the last entry serves -1

    def write(self, sample: Sample, prediction: Prediction) -> list[dict[str, Any]]:
        """Write what there is of an image; gives its entry in `panoptic.json`, if any."""
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

    def _save(self, picture: Image.Image, kind: str, image_id: str) -> Path:
        path = self.folder / kind / f"{_safe(image_id)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, "PNG")
        return path

    def finish(self, written: Sequence[dict[str, Any]]) -> None:
        """Write `panoptic.json`, if there are panoptic maps."""
        if written:
            atomic_write_json(self.folder / PANOPTIC_JSON, {"annotations": list(written)}, indent=1)


def _safe(image_id: str) -> str:
    """An image id as a relative path that stays within its folder."""
    parts = [part for part in PurePosixPath(image_id).parts if part not in ("/", "..", ".")]
    if not parts:
        raise ValueError(f"the image id {image_id!r} cannot be a file's name.")
    return "/".join(parts)
