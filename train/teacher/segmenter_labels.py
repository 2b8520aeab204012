"""Labels of unlabeled images by a segmentation model: segments, their confidences and their embeddings.

The labels are a prepared dataset (`train.data.prepared`), with the embeddings and confidences of its segments as
region rows (`train.storage.shards`) in the folders of `train.teacher.precompute.cache_folder`. Every shard is complete
or absent, so that an interrupted command continues.

Letters: Q queries, K classes, N segments of an image, D width of the text space.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_write_json
from modeling_gkc.mask_resampling import MaskResampler
from modeling_gkc.predictor import GKCPredictor, PreparedImage
from modeling_gkc.vocabulary import Vocabulary

from ..data.benchmarks.base import Benchmark
from ..data.prepared import VOCABULARY_NAME, is_damaged, is_prepared, read_manifest, vocabulary_json, write_manifest
from ..data.prepared_shards import PROGRESS_FOLDER, ShardReport, Work, plan_shards, write_shards
from ..data.samples import stable_number
from ..data.schema import VOID
from ..data.sources import AnnotatedImage, Segmentation
from ..storage.checksums import file_xxh3
from ..storage.fingerprints import settings_fingerprint
from ..storage.locks import lock_output
from ..storage.shards import RegionStore, StoreSettings, StoreWriter
from .precompute import cache_folder
from .region_teacher import TeacherCache

LABELED = "distil"
IMAGES_PER_SHARD = 64  # repeated at most by a killed run
_SPLITS = ("train", "val")
_CHECKPOINT_FILES = (".json", ".safetensors", ".txt", ".model")


class SegmentConfidences(RegionStore):
    """Confidences (N, 1) of segments: the mean over their pixels of class score times mask probability."""

    kind = "confidence"
    holds = "confidences of segments"
    has_vocabulary = False


@dataclass(frozen=True)
class LabelOptions:
    """Options of labeling that change its result.

    Attributes:
        confidence: Least class score times mask probability of a labeled pixel; the other pixels are void.
        val_share: Fraction of the images that are held out as split `val`, at least one image.
    """

    confidence: float = 0.5
    val_share: float = 0.1

    def __post_init__(self):
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence must lie between 0 and 1, got {self.confidence}.")
        if not 0 < self.val_share < 1:
            raise ValueError(f"--val-share must lie between 0 and 1, got {self.val_share}.")


@dataclass(frozen=True)
class ImageLabels:
    """Labels of one image.

    Attributes:
        ids: (H, W) int32 segment ids, 0 for void.
        classes: Class of each of the N segments, whose ids are 1..N.
        confidences: (N, 1) mean confidence of the pixels of each segment.
        embeds: (N, D) unit embeddings in the text space.
    """

    ids: np.ndarray
    classes: list[int]
    confidences: np.ndarray
    embeds: np.ndarray


def label_image(predictor: GKCPredictor, image: PreparedImage, confidence: float) -> ImageLabels:
    """Label one image with the vocabulary of a predictor.

    A query takes part if its best class is not "no object". Queries compete for each pixel by class score times mask
    probability, the confidence of the pixel. Pixels with a lower confidence than the threshold are void. The pixels
    that a query wins are one segment; those of all queries of one stuff class are one segment together, whose
    embedding is the mean of theirs, weighted by their pixels.

    Args:
        predictor: Predictor whose model gives `class_queries_logits`, `masks_queries_logits` and `query_embeds`.
        image: Image of the predictor's `prepare`.
        confidence: Least confidence of a labeled pixel.

    Returns:
        The labels, at the size of the image.
    """
    outputs = predictor.forward([image])
    vocabulary = predictor.vocabulary.vocabulary
    scores, classes = outputs.class_queries_logits[0].float().softmax(dim=-1).max(dim=-1)
    queries = ((classes < len(vocabulary)) & (scores >= confidence)).nonzero().flatten()
    scores, classes = scores[queries], classes[queries].tolist()
    embeds = F.normalize(outputs.query_embeds[0][queries].float(), dim=-1)
    owner = torch.zeros(image.size, dtype=torch.int64, device=scores.device)
    sums, pixels = torch.zeros(2, len(classes) + 1, dtype=torch.float64, device=scores.device)
    if len(classes):
        content = None if outputs.content_sizes is None else tuple(outputs.content_sizes[0].tolist())
        resampler = MaskResampler(outputs.masks_queries_logits[0][queries], content, image.size)
        for rows, logits in resampler.tiles(planes=2 * len(classes) + 4):
            best, winner = (scores[:, None, None] * logits.sigmoid()).max(dim=0)
            owner[rows] = torch.where(best >= confidence, winner + 1, VOID)
            sums.index_add_(0, owner[rows].flatten(), best.double().flatten())
            pixels += torch.bincount(owner[rows].flatten(), minlength=len(pixels))
    sums, pixels = sums[1:], pixels[1:]
    segments: list[list[int]] = []  # positions of the queries of each segment
    of_stuff: dict[int, list[int]] = {}
    for position in (pixels > 0).nonzero().flatten().tolist():
        label = classes[position]
        if label in of_stuff:
            of_stuff[label].append(position)
            continue
        segments.append([position])
        if label in vocabulary.stuff_ids:
            of_stuff[label] = segments[-1]
    ids = torch.zeros(len(classes) + 1, dtype=torch.int32, device=scores.device)
    for number, positions in enumerate(segments, start=1):
        ids[[position + 1 for position in positions]] = number
    weights = [pixels[positions].float() / pixels[positions].sum() for positions in segments]
    means = [weight @ embeds[positions] for weight, positions in zip(weights, segments, strict=True)]
    confidences = [sums[positions].sum() / pixels[positions].sum() for positions in segments]
    return ImageLabels(
        ids=ids[owner].cpu().numpy(),
        classes=[classes[positions[0]] for positions in segments],
        confidences=_rows(confidences, 1),
        embeds=_rows([F.normalize(mean, dim=0) for mean in means], embeds.shape[1]),
    )


def _rows(values: Sequence[Tensor], columns: int) -> np.ndarray:
    """Return one row of float32 for each of the tensors, which may be none."""
    return (
        torch.stack(list(values)).float().view(-1, columns).cpu().numpy() if values else np.empty((0, columns), "f4")
    )


def labels_fingerprint(
    teacher: Path, vocabulary: Vocabulary, images: Mapping[str, Path], options: LabelOptions
) -> dict[str, str]:
    """Return hashes of everything that decides the labels, without loading the teacher.

    Args:
        teacher: Folder of the teacher's checkpoint, of which weights, configuration and tokenizer are read.
        vocabulary: Classes of the labels.
        images: Files of the images by their ids, identified by path, size and modification time.
        options: Options of labeling.
    """
    files = sorted(path for path in teacher.iterdir() if path.suffix in _CHECKPOINT_FILES and path.is_file())
    states = [(name, path.stat()) for name, path in images.items()]
    return {
        "teacher": settings_fingerprint([[path.name, file_xxh3(path)] for path in files]),
        "words": settings_fingerprint(vocabulary_json(vocabulary)),
        "images": settings_fingerprint([[name, state.st_size, state.st_mtime_ns] for name, state in states]),
        "options": settings_fingerprint(asdict(options)),
    }


class StoredLabels:
    """Inputs of the labels in a folder, by which `RegionCaches.open` opens the embeddings of their segments.

    Args:
        folder: Folder that `write_labels` wrote.

    Raises:
        ValueError: The folder holds no labels of a teacher.
    """

    def __init__(self, folder: str | Path):
        manifest = read_manifest(folder) if is_prepared(folder) else {}
        if "labels" not in manifest:
            raise ValueError(
                f"`data.dataset`: {folder} holds no labels of a teacher, which teacher.source=labels needs: make them "
                "with `python -m train distil`, or set distillation.weight=0."
            )
        self.inputs: dict[str, str] = manifest["labels"]

    def fingerprint(self, dataset: Dataset, remember: str | Path | None = None, progress: bool = True) -> dict:
        """Return the hashes of `labels_fingerprint`, which are the same for all splits."""
        return self.inputs


class _Labeling(Benchmark):
    """Rules of the labels: images without a segment are left out."""

    def keeps(self, split: str, segments: Sequence[Mapping[str, Any]]) -> bool:
        return bool(segments)


def write_labels(
    folder: Path,
    source: Path,
    images: Mapping[str, Path],
    fingerprint: Mapping[str, str],
    options: LabelOptions,
    load_teacher: Callable[[], GKCPredictor],
    command: str,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Label images, or the rest of them after an interruption; intact labels are returned as they are.

    Every file is compared with its checksum. A split with a missing or damaged file is labeled again.

    Images that cannot be read and images without a segment are left out of the splits.

    Args:
        folder: Folder of the labels, which depends on the fingerprint.
        source: Folder of the images.
        images: Files of the images by their ids, at least two.
        fingerprint: Result of `labels_fingerprint`.
        options: Options of labeling.
        load_teacher: Function that loads the teacher with its vocabulary set; called only if images are to be labeled.
        command: Command that writes the labels, for error messages.
        progress: Whether to show a progress bar.

    Returns:
        The entries of the splits `train` and `val` in `prepared.json`.

    Raises:
        ValueError: Another process writes to the folder, there are fewer than two images, or an image of a split has
            no segment.
    """
    if len(images) < 2:
        raise ValueError(f"{source} has {len(images)} images: give at least two, one of which is held out.")
    ordered = sorted(images, key=stable_number)
    held_out = set(ordered[: max(1, min(round(options.val_share * len(images)), len(images) - 1))])
    chosen = {split: [name for name in sorted(images) if (name in held_out) == (split == "val")] for split in _SPLITS}
    with lock_output(folder):
        manifest = read_manifest(folder) if is_prepared(folder) else None
        splits = [] if manifest is None else [split for split in _SPLITS if _is_intact(folder, split, manifest)]
        if len(splits) == len(_SPLITS):
            return manifest["splits"]
        predictor = load_teacher()
        vocabulary = predictor.vocabulary.vocabulary
        if manifest is None:
            folder.mkdir(parents=True, exist_ok=True)
            manifest = {
                "benchmark": LABELED,
                "source": str(source.resolve()),
                "options": {
                    "images_per_shard": IMAGES_PER_SHARD,
                    "columns": predictor.model.config.projection_dim,
                    **{split: len(names) for split, names in chosen.items()},
                },
                "splits": {},
                "command": command,
                "labels": dict(fingerprint),
            }
        atomic_write_json(folder / VOCABULARY_NAME, vocabulary_json(vocabulary), indent=1)
        with tqdm(total=len(images), desc="Labeling", unit="image", disable=not progress) as bar:
            for split, names in chosen.items():
                if split in splits:
                    bar.update(len(names))
                    continue
                manifest["splits"][split] = {"complete": False, "shards": []}
                write_manifest(folder, manifest)
                of_split = {name: images[name] for name in names}
                record = _label_split(folder, split, of_split, predictor, options.confidence, manifest, bar.update)
                manifest["splits"][split] = record
                write_manifest(folder, manifest)
        shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)
        return manifest["splits"]


def _stores(folder: Path, split: str, manifest: Mapping[str, Any]) -> dict[str, StoreWriter]:
    """Return the writers of the region rows of a split, by the field of `ImageLabels`."""
    options = manifest["options"]
    return {
        field: StoreWriter(
            cache_folder(folder, split, kind.kind),
            StoreSettings(
                kind=kind.kind,
                fingerprint=manifest["labels"],
                columns=columns,
                images=options[split],
                images_per_shard=options["images_per_shard"],
                command=manifest["command"],
            ),
        )
        for field, kind, columns in (
            ("embeds", TeacherCache, options["columns"]),
            ("confidences", SegmentConfidences, 1),
        )
    }


def _is_intact(folder: Path, split: str, manifest: Mapping[str, Any]) -> bool:
    """Return whether a split is finished and all its files have their checksums."""
    record = manifest["splits"].get(split)
    if record is None or not record["complete"]:
        return False
    if any(is_damaged(folder / shard["file"], shard["sha256"]) for shard in record["shards"]):
        return False
    if is_damaged(folder / VOCABULARY_NAME, manifest["vocabulary_sha256"]):
        return False
    return not any(store.pending() for store in _stores(folder, split, manifest).values())


def _label_split(
    folder: Path,
    split: str,
    images: Mapping[str, Path],
    predictor: GKCPredictor,
    confidence: float,
    manifest: Mapping[str, Any],
    advance: Callable[[int], Any],
) -> dict[str, Any]:
    """Write the unfinished shards of a split, and return its entry in the manifest."""
    labels: dict[str, ImageLabels] = {}

    def read(name: str, shape: tuple[int, int]) -> Segmentation:
        found = labels[name] = label_image(predictor, predictor.prepare(images[name]), confidence)
        numbered = enumerate(found.classes, start=1)
        return found.ids, [{"id": number, "category_id": label, "iscrowd": False} for number, label in numbered]

    vocabulary = predictor.vocabulary.vocabulary
    annotated = [AnnotatedImage(name, path, partial(read, name)) for name, path in images.items()]
    plans = plan_shards(split, len(annotated), manifest["options"]["images_per_shard"])
    rules = _Labeling(
        name=LABELED, vocabulary="", layout="", find=lambda source, split: annotated, splits={split: None}
    )
    work = Work(rules, split, annotated, len(vocabulary), folder, plans)
    stores = _stores(folder, split, manifest)
    work.shards.remove_leftovers()
    for store in stores.values():
        store.begin()
    reports: dict[int, ShardReport] = work.shards.finished()
    rowless = {number for store in stores.values() for number in store.pending()}
    for plan in plans:
        if plan.number in reports and plan.number not in rowless:
            advance(plan.stop - plan.start)
            continue
        labels.clear()
        [reports[plan.number]] = write_shards(work, [plan], 1, advance)
        names = [image.image_id for image in annotated[plan.start : plan.stop]]
        counts = [len(labels[name].classes) if name in labels else 0 for name in names]
        segment_ids = np.concatenate([np.arange(1, count + 1) for count in counts])
        for field, store in stores.items():
            rows = [getattr(labels[name], field) for name in names if name in labels]
            rows = np.concatenate([np.empty((0, store.settings.columns), "f4"), *rows])
            store.write(plan.number, names, counts, segment_ids, rows)
    ordered = [reports[plan.number] for plan in plans]
    if not any(report.images for report in ordered):
        first = [problem for report in ordered for problem in report.problems][:1]
        raise ValueError(
            f"None of the {len(annotated)} images of the split {split!r} can be used: "
            f"{first[0] if first else f'no pixel has a confidence of {confidence}'}. Give more images, other --words "
            "or a lower --confidence."
        )
    for store in stores.values():
        store.finish()
    return {
        "complete": True,
        "images": sum(report.images for report in ordered),
        "found": len(annotated),
        "expected": None,
        "left_out": sum(report.left_out for report in ordered),
        "problems": [problem for report in ordered for problem in report.problems],
        "notes": [],
        "classes": {
            label: {
                "segments": sum(report.segments[index] for report in ordered),
                "images": sum(report.class_images[index] for report in ordered),
            }
            for index, label in enumerate(vocabulary.labels)
        },
        "shards": [{"file": report.file, "images": report.images, "sha256": report.sha256} for report in ordered],
    }
