"""Checkpoints under `kill -9` while they, and their manifests, are written and deleted."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from configuration import Recipe
from modeling_gkc.file_checksums import DamagedFileError
from train.engine import checkpoints as checkpoints_module
from train.engine import trainer as trainer_module
from train.engine.checkpoints import (
    MANIFEST_NAME,
    checkpoints,
    crash_safe_checkpoint,
    is_complete,
    last_complete_checkpoint,
    rotate,
    verify_checkpoint,
    write_manifest,
)
from train.engine.trainer import GKCTrainer

from .processes import forked
from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor

ROOT = Path(__file__).parent.parent
FILES = {"model.safetensors": 3000, "optimizer.pt": 5000, "rng_state.pth": 200, "nested/part.json": 10}
TWO_FILES = {"model.safetensors": 3000, "nested/part.json": 10}


def write_files(folder: Path, files: dict[str, int] = FILES) -> Path:
    for name, size in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    return folder


def complete(folder: Path) -> Path:
    write_manifest(write_files(folder))
    return folder


def test_a_checkpoint_with_a_manifest_is_complete_and_lists_its_files(tmp_path):
    folder = complete(tmp_path / "checkpoint-3")
    assert is_complete(folder) and last_complete_checkpoint(tmp_path) == folder
    first = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert {name: file["bytes"] for name, file in first.items()} == FILES
    write_manifest(folder)
    assert json.loads((folder / MANIFEST_NAME).read_text())["files"] == first


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_raises_and_names_the_file(tmp_path, name):
    folder = complete(tmp_path / "checkpoint-3")
    assert verify_checkpoint(folder) == folder
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert is_complete(folder)  # of its size it is
    remedy = rf"delete {folder} \(`rm -r {folder}`\) to resume from the checkpoint before"
    with pytest.raises(DamagedFileError, match=rf"{folder / name} is damaged \(checksum mismatch\): {remedy}"):
        verify_checkpoint(folder)


def test_a_checkpoint_with_the_first_form_of_manifest_is_complete(tmp_path):
    """The first form of manifest held the files' sizes alone."""
    folder = complete(tmp_path / "checkpoint-3")
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": FILES}))
    assert is_complete(folder) and verify_checkpoint(folder) == folder
    name, size = next(iter(FILES.items()))
    (folder / name).write_bytes(bytes(size - 1))
    assert not is_complete(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_a_checkpoint_whose_files_do_not_fit_is_not_complete(tmp_path, name, damage):
    folder = complete(tmp_path / "checkpoint-3")
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(bytes(FILES[name] + (1 if damage == "longer" else -1)))
    assert not is_complete(folder)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"files": ["model.safetensors"]}', '{"sizes": {}}'])
def test_a_checkpoint_without_a_whole_manifest_is_not_complete(tmp_path, text):
    folder = write_files(tmp_path / "checkpoint-3")
    if text is not None:
        (folder / MANIFEST_NAME).write_text(text)
    assert not is_complete(folder)
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*train without"):
        last_complete_checkpoint(tmp_path)


def test_complete_checkpoint_of_the_highest_step_is_used(tmp_path):
    for step in (900, 1000):
        complete(tmp_path / f"checkpoint-{step}")
    write_files(tmp_path / "checkpoint-1100")
    complete(tmp_path / "checkpoint-best")
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-1000"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-900", "checkpoint-1000", "checkpoint-1100"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4, 5]),
        (0, None, [1, 2, 3, 4, 5]),
        (1, None, [4, 5]),
        (2, None, [3, 4, 5]),
        (1, 1, [1, 4, 5]),
    ],
)
def test_rotation_keeps_complete_ones_and_deletes_leftovers(tmp_path, limit, best, left):
    """Checkpoint 2 is a leftover of a kill; 5 was begun and not finished."""
    for step in (1, 3, 4):
        complete(tmp_path / f"checkpoint-{step}")
    for step in (2, 5):
        write_files(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, limit, None if best is None else tmp_path / f"checkpoint-{best}")
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_rotation_without_a_complete_checkpoint_deletes_nothing(tmp_path):
    for step in (1, 2):
        write_files(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1)
    assert len(checkpoints(tmp_path)) == 2


def arguments(folder: Path, limit: int | None = 1) -> SimpleNamespace:
    return SimpleNamespace(output_dir=str(folder), should_save=True, save_total_limit=limit)


def test_incomplete_folder_is_rewritten(tmp_path):
    write_files(tmp_path / "checkpoint-6", {"rng_state_7.pth": 5, "model.safetensors": 1})
    args = arguments(tmp_path)
    with crash_safe_checkpoint(args, 6) as folder:
        assert not folder.exists() and args.save_total_limit is None
        write_files(folder)
    assert args.save_total_limit == 1 and is_complete(folder) and not (folder / "rng_state_7.pth").exists()


def test_an_error_while_writing_leaves_no_manifest_and_deletes_nothing(tmp_path):
    complete(tmp_path / "checkpoint-3")
    args = arguments(tmp_path)
    with pytest.raises(OSError, match="disk full"), crash_safe_checkpoint(args, 6) as folder:
        write_files(folder)
        raise OSError("disk full")
    assert args.save_total_limit == 1 and last_complete_checkpoint(tmp_path).name == "checkpoint-3"


def kill_at_file_event(number: int) -> None:
    """From now on, the so-manieth time that this process opens, renames or deletes a file is its end."""
    left = [number]

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_and_rotate(folder: Path, event: int) -> None:
    kill_at_file_event(event)
    for step in (6, 9):
        with crash_safe_checkpoint(arguments(folder), step) as checkpoint:
            write_files(checkpoint, TWO_FILES)


def test_complete_checkpoint_exists_after_a_kill_at_any_time(tmp_path, monkeypatch):
    """Killed at each file operation of two savings with rotation, over a leftover of step 6."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and only of use when the machine fails
    seen = set()
    for event in range(1, 500):
        folder = tmp_path / str(event)
        write_manifest(write_files(folder / "checkpoint-3", TWO_FILES))
        write_files(folder / "checkpoint-6", {"model.safetensors": 7})
        status = forked(lambda folder=folder, event=event: save_and_rotate(folder, event))
        last = last_complete_checkpoint(folder)
        seen.add(last.name)
        assert {name: (last / name).stat().st_size for name in TWO_FILES} == TWO_FILES
        with crash_safe_checkpoint(arguments(folder), 9) as checkpoint:
            write_files(checkpoint, TWO_FILES)
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-9"] and is_complete(checkpoint)
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0 and event > 40 and seen == {"checkpoint-3", "checkpoint-6", "checkpoint-9"}


RECIPE = Recipe().replace(
    steps=6,
    batch_size=2,
    crop_size=64,
    learning_rate=3e-3,
    max_grad_norm=1.0,
    milestones=(0.5, 0.9),
    train_num_points=64,
    distillation_embedding="query",
    region_dropout=0.3,
)


class DrawnTeacher:
    """Embeddings that depend on image and segment alone."""

    def lookup(self, image_ids, segment_ids):
        return [
            torch.stack([self._draw(image_id, int(i)) for i in ids])
            for image_id, ids in zip(image_ids, segment_ids, strict=True)
        ]

    def _draw(self, image_id: str, segment_id: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(segment_id + 10**6 * int(image_id.partition("-")[2]))
        return F.normalize(torch.randn(16, generator=generator), dim=0)


class RandomnessOfEveryKind(TrainerCallback):
    """Draws from all generators in every step, and keeps what came, with the images, beside the run."""

    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args, state, control, **kwargs):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        with self.path.open("a") as file:
            file.write(json.dumps([state.global_step, *drawn]) + "\n")


def make_trainer(folder: Path) -> GKCTrainer:
    torch.set_num_threads(1)
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    settings |= {"logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    return GKCTrainer(
        model=toy_model(decoder_layers=1, encoder_layers=1, **RECIPE.model_settings()),
        recipe=RECIPE,
        args=RECIPE.to_training_arguments(folder, **settings),
        train_dataset=toy_dataset(8),
        vocabulary=VOCABULARY,
        processor=toy_processor(),
        teacher_embeddings=DrawnTeacher(),
        callbacks=[RandomnessOfEveryKind(folder.parent / f"{folder.name}.jsonl")],
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def newest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)


class EndAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            die()


def arm(owner: object, name: str, when: str, folder: Path) -> None:
    """Make a function's call for checkpoint 4 the end of this process."""
    original, calls = getattr(owner, name), []
    call_of_checkpoint_4 = 1 if when == "half done" else 2

    def wrapper(*args, **kwargs):
        calls.append(name)
        due = len(calls) == call_of_checkpoint_4
        if due and when == "before":
            die()
        if due and when == "half done":  # deleting a folder
            for path in list(Path(args[0]).iterdir())[::2]:
                path.unlink()
            die()
        result = original(*args, **kwargs)
        if due and when == "torn":
            path = newest_file(folder / "checkpoint-4")
            os.truncate(path, path.stat().st_size // 2)
        if due:
            die()
        return result

    setattr(owner, name, wrapper)


# Where the process dies while checkpoint 4 is written, and the checkpoint that the run must go on from.
MOMENTS = {
    "between steps": (None, "", "", 4),
    "within the model": (GKCTrainer, "_save", "torn", 2),
    "within the heads": (trainer_module, "save_file", "torn", 2),
    "within the optimiser": (Trainer, "_save_optimizer_and_scheduler", "torn", 2),
    "within the random states": (Trainer, "_save_rng_state", "torn", 2),
    "within the Trainer's state": (TrainerState, "save_to_json", "torn", 2),
    "before the manifest": (checkpoints_module, "write_manifest", "before", 2),
    "after the manifest": (checkpoints_module, "write_manifest", "after", 4),
    "within the deletion": (checkpoints_module.shutil, "rmtree", "half done", 4),
}


def train_and_die(folder: Path, moment: str) -> None:
    trainer = make_trainer(folder)
    owner, name, when, _ = MOMENTS[moment]
    if owner is None:
        trainer.add_callback(EndAt())
    else:
        arm(owner, name, when, folder)
    trainer.train()


def resume(folder: Path) -> None:
    torch.manual_seed(99)
    make_trainer(folder).train(resume_from_checkpoint=True)


def run_all(out: Path) -> None:
    """All runs, each in a process of its own; how the first of each ended, and what it left, goes to a file."""
    # Once, in the parent: transformers looks up here how to write a model, which takes longer than to train this one.
    toy_model().save_pretrained(out / "warmed_up")
    ends = {"undisturbed": [forked(lambda: make_trainer(out / "undisturbed").train())]}
    for number, moment in enumerate(MOMENTS):
        folder = out / str(number)
        ends[moment] = [forked(lambda folder=folder, moment=moment: train_and_die(folder, moment))]
        ends[moment] += [last_complete_checkpoint(folder).name, sorted(path.name for path in folder.iterdir())]
        ends[moment].append(forked(lambda folder=folder: resume(folder)))
    (out / "ends.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    assert forked(lambda: run_all(out)) == 0
    assert json.loads((out / "ends.json").read_text())["undisturbed"] == [0]
    return out


def assert_same(first: object, second: object, place: str) -> None:
    """Nested values, equal to the last bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_same(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{place}/{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), place
    else:
        assert first == second, place


def state_of(folder: Path) -> dict:
    """All that a checkpoint holds."""
    files = {path.name: path for path in (folder / "checkpoint-6").iterdir()}
    state = {name: load_file(path) for name, path in files.items() if path.suffix == ".safetensors"}
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    ):
        state |= {name: torch.load(path) for name, path in files.items() if path.suffix in (".pt", ".pth")}
    history = json.loads(files["trainer_state.json"].read_text())
    return {**state, "files": sorted(files), "log_history": history["log_history"], "epoch": history["epoch"]}


def draws_of(folder: Path) -> dict[int, set[tuple]]:
    """By step what was drawn in it; a step that a resumed run repeats stands there twice."""
    draws: dict[int, set[tuple]] = {}
    for line in (folder.parent / f"{folder.name}.jsonl").read_text().splitlines():
        step, *drawn = json.loads(line)
        draws.setdefault(step, set()).add(tuple(drawn))
    return draws


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_undisturbed(killed, moment):
    """To the last bit: model, heads, optimiser, schedule, losses of every step, all random states."""
    status, last, left, resumed = json.loads((killed / "ends.json").read_text())[moment]
    assert (status, last, resumed) == (-signal.SIGKILL, f"checkpoint-{MOMENTS[moment][3]}", 0)
    assert len(left) == (1 if moment == "between steps" else 2)
    folder = killed / str(list(MOMENTS).index(moment))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-6"]
    expected, got = state_of(killed / "undisturbed"), state_of(folder)
    assert_same(expected, got, moment)
    assert {
        "model.safetensors",
        "training_heads.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    } <= expected.keys()
    assert [log["step"] for log in got["log_history"]] == list(range(1, 7))
    assert draws_of(folder) == draws_of(killed / "undisturbed")
    assert all(len(drawn) == 1 for drawn in draws_of(folder).values())


def test_optimizer_states_are_restored_to_an_indexed_cpu(tmp_path):
    """The device of CPU processes under accelerate, to which transformers 5.17 restores the optimizer's state."""
    torch.save({"exp_avg": torch.arange(3.0)}, tmp_path / "optimizer.pt")
    restored = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 0), weights_only=True)
    assert torch.equal(restored["exp_avg"], torch.arange(3.0))
