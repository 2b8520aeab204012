"""Options of an evaluation, and the data and model loaded from them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import modeling_gkc
from modeling_gkc.checkpoint_loading import MODEL_CLASSES
from modeling_gkc.cli.common import load_checkpoint, without_progress_bars
from modeling_gkc.vocabulary import Vocabulary

from ..data.benchmarks import protocol_of
from ..data.benchmarks.protocol import Protocol
from ..data.load import load_judged
from ..data.prepared import Prepared
from ..metrics.score import Score, make_scores, scores_of_task
from ..storage.fingerprints import model_fingerprint, settings_fingerprint
from ..storage.processes import from_main
from .adapters import CLIPSegSegmenter, LabeledSegmenter, model_type
from .segmenter import GKCSegmenter, Segmenter, View, tta_views
from .vocabulary import BenchmarkVocabulary

EDGES = ("shortest_edge", "longest_edge")  # names of the sides in the size of an image processor
DEFAULT_SIDES = (800, 1333)  # for a checkpoint whose processor resizes to a fixed height and width
# Checkpoint files that determine the predictions.
_MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Request:
    """Options of an evaluation; `python -m train.evaluate --help` describes them."""

    model: str
    benchmark: str
    data: Path
    out: Path
    split: str = "val"
    tasks: tuple[str, ...] = ()
    prompts: str = "plain"
    reduction: str = "max"
    tta: bool = False
    limit: int | None = None
    batch_size: int = 1
    dtype: str = "float32"
    compile: bool = False
    short_side: int | None = None
    long_side: int | None = None
    images_per_chunk: int = 64
    trained_on: str | None = None
    write_predictions: Path | None = None
    profile: bool = False
    command: str = ""


@dataclass
class Session:
    """Loaded data, model and options of one evaluation.

    Attributes:
        request: Options of the evaluation.
        prepared: Prepared benchmark.
        protocol: Protocol of the benchmark.
        tasks: Tasks that are scored.
        prompt_vocabulary: Vocabulary that prompts the model.
        segmenter: Model.
        settings: Values that the scores depend on.
        trained_on: Classes of the training data, if given.
        parameters: Number of parameters of the model.
        model_sha256: SHA-256 of the checkpoint.
        fingerprint: Hash of `settings`.
    """

    request: Request
    prepared: Prepared
    protocol: Protocol
    tasks: tuple[str, ...]
    prompt_vocabulary: BenchmarkVocabulary
    segmenter: Segmenter
    settings: dict[str, Any]
    trained_on: Vocabulary | None
    parameters: int
    model_sha256: str
    fingerprint: str = field(init=False)

    def __post_init__(self):
        self.fingerprint = settings_fingerprint(self.settings)

    @property
    def rows(self) -> int:
        """Number of images that are evaluated."""
        limit = self.request.limit
        return len(self.prepared.dataset) if limit is None else min(limit, len(self.prepared.dataset))

    def make_scores(self) -> dict[str, Score]:
        """Return new, empty scores of the tasks by name."""
        return make_scores(self.tasks, self.prepared.vocabulary, self.segmenter.provided)


def load_session(request: Request, state: PartialState) -> Session:
    """Load the data and the model of an evaluation.

    Raises:
        ValueError: An option names missing data, an unusable model or an unsupported combination; the message names
            the option.
    """
    prepared = from_main(state, lambda: load_judged(request.data, request.split))
    if request.benchmark not in (prepared.benchmark, ""):
        raise ValueError(f"--data: {request.data} holds {prepared.benchmark!r}, not {request.benchmark!r}.")
    protocol = protocol_of(prepared.benchmark)
    tasks = tuple(dict.fromkeys(request.tasks or protocol.tasks))
    kinds = [score for task in tasks for score in scores_of_task(task).values()]
    if any(score.needs_videos for score in kinds) and not any(video_ids(prepared)):
        raise ValueError(f"--tasks: {prepared.benchmark} contains no videos, which the given tasks need.")
    trained_on = _training_vocabulary(request.trained_on)
    prompt_vocabulary = BenchmarkVocabulary.from_protocol(
        prepared.vocabulary, protocol, request.prompts, request.reduction
    )
    segmenter, sha256 = _load_segmenter(request, protocol, prompt_vocabulary, prepared.vocabulary, state)
    make_scores(tasks, prepared.vocabulary, segmenter.provided)  # raises early if a task cannot be scored
    settings = _settings(request, prepared, protocol, tasks, prompt_vocabulary, sha256, state)
    parameters = sum(weight.numel() for weight in segmenter.model.parameters())
    return Session(
        request, prepared, protocol, tasks, prompt_vocabulary, segmenter, settings, trained_on, parameters, sha256
    )


def _training_vocabulary(text: str | None) -> Vocabulary | None:
    try:
        return None if text is None else Vocabulary.parse(text)
    except ValueError as error:
        raise ValueError(f"--trained-on: {error}") from error


def _load_segmenter(
    request: Request,
    protocol: Protocol,
    prompt_vocabulary: BenchmarkVocabulary,
    vocabulary: Vocabulary,
    state: PartialState,
) -> tuple[Segmenter, str]:
    panoptic = {
        "threshold": protocol.panoptic_threshold,
        "overlap_mask_area_threshold": protocol.panoptic_overlap,
    }
    kind = model_type(request.model)
    if kind in MODEL_CLASSES:
        model, processor = load_checkpoint(request.model)
        size = processor.image_processor.size  # without `shortest_edge` it is a fixed height and width
        sides, origins = [], []
        for name, edge, default in zip(("short_side", "long_side"), EDGES, DEFAULT_SIDES, strict=True):
            candidates = {
                "command line": getattr(request, name),
                "protocol": getattr(protocol, name),
                "image processor of the model": size.get(edge),
                "default": default,
            }
            origin, side = next((origin, side) for origin, side in candidates.items() if side)
            sides.append(side)
            origins.append(f"{name.replace('_', ' ')} {side} from the {origin}")
        sha256 = model_sha256(request.model, model)
        views = tta_views() if request.tta else (View(),)
        model.to(state.device)
        options = {"dtype": request.dtype, "compile": request.compile}
        segmenter = GKCSegmenter(model, processor, prompt_vocabulary, *sides, panoptic, views, **options)
        segmenter.notes["image_size"] = ", ".join(origins)
        return segmenter, sha256
    if request.tta or request.compile or request.short_side or request.long_side:
        raise ValueError("--tta, --compile, --short-side and --long-side apply to GKC checkpoints only; remove them.")
    with without_progress_bars():
        if kind == "clipseg":
            segmenter = CLIPSegSegmenter(request.model, prompt_vocabulary, request.dtype)
        else:
            if request.prompts != "plain":
                raise ValueError(
                    f"--prompts: A {kind} model has a fixed label list and takes no prompts; remove the option."
                )
            panoptic |= {"label_ids_to_fuse": vocabulary.stuff_ids}
            segmenter = LabeledSegmenter(request.model, vocabulary, panoptic, request.dtype)
    sha256 = model_sha256(request.model, segmenter.model)
    segmenter.model.to(state.device)
    return segmenter, sha256


def model_sha256(path: str, model: torch.nn.Module) -> str:
    """Compute the SHA-256 of the files of a checkpoint folder; for a Hub repository, a hash of the weights."""
    folder = Path(path)
    if not folder.is_dir():
        return model_fingerprint(model)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _settings(
    request: Request,
    prepared: Prepared,
    protocol: Protocol,
    tasks: Sequence[str],
    prompt_vocabulary: BenchmarkVocabulary,
    sha256: str,
    state: PartialState,
) -> dict[str, Any]:
    """Collect everything that the scores depend on, for the fingerprint."""
    return {
        "gkc": modeling_gkc.__version__,
        "model": sha256,
        "benchmark": prepared.benchmark,
        "split": request.split,
        "data": [shard["sha256"] for shard in prepared.info["shards"]],
        "vocabulary": [prepared.vocabulary.names, prepared.vocabulary.is_thing],
        "protocol": protocol.as_dict(),
        "tasks": list(tasks),
        "prompts": prompt_vocabulary.as_dict() | {"words": prompt_vocabulary.vocabulary.names},
        "predictions": None if request.write_predictions is None else str(request.write_predictions.resolve()),
        "device": state.device.type,
    } | {
        name: getattr(request, name)
        for name in (
            *("tta", "limit", "batch_size", "dtype", "compile", "short_side", "long_side"),
            *("images_per_chunk", "trained_on"),
        )
    }


def video_ids(prepared: Prepared) -> list[str]:
    """Return the video id of each row, "" for images."""
    dataset = prepared.dataset
    if "video_id" not in dataset.column_names:
        return [""] * len(dataset)
    return [name or "" for name in dataset["video_id"][:]]
