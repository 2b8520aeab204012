"""Run an evaluation: distribute the chunks over processes, merge them and write the result file."""

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

import modeling_gkc
from modeling_gkc.vocabulary import Vocabulary

from ..data.benchmarks import benchmark_named
from ..data.prepared import VOCABULARY_NAME
from ..data.schema import without_decoding
from ..storage.checksums import file_sha256
from ..storage.fingerprints import settings_fingerprint
from ..storage.processes import from_main
from .chunks import ChunkFolder, plan_chunks
from .groups import class_facts, class_groups, group_scores
from .loop import Evaluation, total_seconds
from .predictions import PredictionWriter
from .profiling import profile
from .result import SCHEMA_NAME, per_cent, read_result, write_result
from .session import Session, video_ids

PACKAGES = ("torch", "transformers", "datasets", "numpy", "pillow", "accelerate")


def run(session: Session, state: PartialState, progress: bool = True) -> dict[str, Any] | None:
    """Run or resume an evaluation; every process must call this function.

    Args:
        session: Loaded data, model and options.
        state: Processes of the evaluation.
        progress: Whether the main process shows a progress bar.

    Returns:
        In the main process, the result, which is also written to `session.request.out`; None in the other processes.

    Raises:
        ValueError: `session.request.out` is the result of another evaluation, or there is nothing to evaluate.
    """
    if not session.rows:
        raise ValueError("--data: The split contains no image.")
    chunks = plan_chunks(video_ids(session.prepared)[: session.rows], session.request.images_per_chunk)
    folder = ChunkFolder(chunk_folder(session), len(chunks))
    known = from_main(state, lambda: _finished_result(session))
    if known is not None:
        return known if state.is_main_process else None
    _evaluate_chunks(session, chunks, folder, state, progress)
    state.wait_for_everyone()
    result = finish(session, folder, state) if state.is_main_process else None
    state.wait_for_everyone()
    return result


def _evaluate_chunks(
    session: Session, chunks: Sequence[range], folder: ChunkFolder, state: PartialState, progress: bool
) -> None:
    """Evaluate the chunks of this process that are not finished."""
    pending = from_main(state, folder.pending)
    evaluation = Evaluation(
        without_decoding(session.prepared.dataset),
        session.segmenter,
        session.make_scores,
        session.request.batch_size,
        session.protocol.shrink_above,
        _prediction_writer(session),
    )
    own = pending[state.process_index :: state.num_processes]
    others = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    hidden = not (progress and state.is_main_process)
    total = sum(len(chunks[index]) for index in own)
    with tqdm(total=total, desc=f"Evaluating{others}", unit="image", disable=hidden) as bar:
        for index in own:
            scores, meta = evaluation.run_chunk(chunks[index], bar.update)
            folder.write(index, scores, meta | {"processes": state.num_processes})


def chunk_folder(session: Session) -> Path:
    """Return the folder that holds the finished chunks until the result is written."""
    out = session.request.out
    return out.with_name(f"{out.name}.parts") / session.fingerprint


def _finished_result(session: Session) -> dict[str, Any] | None:
    out = session.request.out
    if not out.exists():
        return None
    result = read_result(out)
    if result["fingerprint"] == session.fingerprint:
        return result
    differing = [name for name, value in session.settings.items() if result["settings"].get(name) != _as_json(value)]
    raise ValueError(f"--out: {out} is a result with other {', '.join(differing)}: choose another file, or delete it.")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _prediction_writer(session: Session) -> PredictionWriter | None:
    folder, classes = session.request.write_predictions, session.prepared.vocabulary
    if folder is None:
        return None
    facts = class_facts(benchmark_named(session.prepared.benchmark), len(classes))
    return PredictionWriter(folder, facts.raw_ids)


def finish(session: Session, folder: ChunkFolder, state: PartialState) -> dict[str, Any]:
    """Merge all chunks, write the result file, and delete the chunks."""
    scores = session.make_scores()
    metas = [folder.merge_into(index, scores) for index in range(folder.count)]
    computed = {name: score.compute() for name, score in scores.items()}
    result = _build_result(session, computed, metas, state)
    writer = _prediction_writer(session)
    if writer is not None:
        writer.finish([entry for meta in metas for entry in meta["written"]])
    write_result(result, session.request.out)
    shutil.rmtree(folder.folder.parent, ignore_errors=True)
    return result


def _build_result(
    session: Session, computed: Mapping[str, tuple], metas: list[dict], state: PartialState
) -> dict[str, Any]:
    request, prepared = session.request, session.prepared
    return {
        "schema": SCHEMA_NAME,
        "fingerprint": session.fingerprint,
        "benchmark": prepared.benchmark,
        "split": request.split,
        "tasks": list(session.tasks),
        **_score_fields(session, computed),
        "images": {
            "evaluated": sum(meta["images"] for meta in metas),
            "prepared": len(prepared.dataset),
            "published": published_images(prepared.info),
            "broken": [line for meta in metas for line in meta["broken"]],
        },
        **_describe_inputs(session),
        "settings": _as_json(session.settings),
        "versions": {"python": platform.python_version(), "gkc": modeling_gkc.__version__}
        | {name: version(name) for name in PACKAGES},
        "command": request.command,
        "machine": machine(state),
        "times": times(metas),
        "profile": profile(session.segmenter, prepared.dataset) if request.profile else None,
    }


def _score_fields(session: Session, computed: Mapping[str, tuple]) -> dict[str, Any]:
    """Compute the result fields that hold scores of tasks, groups and classes."""
    vocabulary = session.prepared.vocabulary
    numbers = {task: values for task, (values, _) in computed.items()}
    columns = {task: values for task, (_, values) in computed.items()}
    facts = class_facts(benchmark_named(session.prepared.benchmark), len(vocabulary))
    groups = class_groups(vocabulary, facts, session.protocol.groups, session.trained_on)
    return {
        "scores": numbers,
        "per_cent": {
            task: {name: per_cent(value) for name, value in values.items()} for task, values in numbers.items()
        },
        "groups": group_scores(groups, columns),
        "classes": _class_table(vocabulary, columns),
    }


def _describe_inputs(session: Session) -> dict[str, Any]:
    """Compute the result fields that describe protocol, prompts, model and data."""
    request, protocol = session.request, session.protocol
    short, long = getattr(session.segmenter, "sides", (protocol.short_side, protocol.long_side))
    sides = {"short_side": short, "long_side": long}
    return {
        "protocol": protocol.as_dict() | sides,
        "prompts": session.prompt_vocabulary.as_dict() | {"tta": request.tta},
        "model": {
            "name": model_name(request.model),
            "sha256": session.model_sha256,
            "parameters": session.parameters,
            "notes": session.segmenter.notes,
        },
        "data": {
            "folder": str(request.data),
            "fingerprint": settings_fingerprint(session.settings["data"]),
            "vocabulary_sha256": file_sha256(request.data / VOCABULARY_NAME),
        },
    }


def published_images(info: Mapping[str, Any]) -> int | None:
    """Return the published number of images, less those that a base or novel variant excludes; None if unknown."""
    return None if info.get("expected") is None else info["expected"] - info.get("left_out", 0)


def model_name(path: str) -> str:
    """Return the last part of a folder path, or the full name of a Hub repository."""
    return Path(path).resolve().name if Path(path).exists() else path


def _class_table(vocabulary: Vocabulary, columns: Mapping[str, Mapping[str, list]]) -> list[dict[str, Any]]:
    return [
        {
            "name": label,
            "scores": {
                task: {name: values[index] for name, values in lists.items() if len(values) == len(vocabulary)}
                for task, lists in columns.items()
            },
        }
        for index, label in enumerate(vocabulary.labels)
    ]


def machine(state: PartialState) -> dict[str, Any]:
    """Describe the hardware that the measured times depend on."""
    accelerator = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else None
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": state.device.type,
        "accelerator": accelerator,
    }


def times(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute total seconds, milliseconds per image, and images per second of all processes together.

    Loading the model and the data is not included. Chunks finished before an interruption keep their measured times.
    """
    seconds = total_seconds([meta["seconds"] for meta in metas])
    images, processes = sum(meta["images"] for meta in metas), max(meta["processes"] for meta in metas)
    parallel = sum(meta["seconds"]["total"] / meta["processes"] for meta in metas)
    return {
        "images_per_second": images / parallel if parallel and images else None,
        "processes": processes,
        "seconds": seconds,
        "milliseconds_per_image": {phase: 1000 * value / max(images, 1) for phase, value in seconds.items()},
    }
