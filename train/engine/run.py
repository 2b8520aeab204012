"""Construction of the trainer of a recipe, and start or resumption of a run."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from configuration import Recipe
from modeling_gkc.atomic_files import atomic_write, remove_leftovers

from ..data import check_dataset
from ..teacher.caches import RegionCaches
from ..teacher.text_bank import TextBank
from .builders import load_data, load_sources, load_student, load_towers, load_vocabulary, split_classes
from .checkpoints import checkpoints, is_complete, verify_checkpoint
from .command import is_main_process, print_rank0
from .logging import ConsoleLogger, logging_callbacks
from .trainer import RECIPE_NAME, GKCTrainer
from .visualization import PICTURES_FOLDER, EvaluationPictures

TENSORBOARD_FOLDER = "tensorboard"
_CHECKED_SAMPLES = 32
_KEPT_CHECKPOINTS = 2
# Fields that may change when a run is resumed, because they do not change its result.
_FREE_FIELDS = {"run.save_every", "run.evaluate_every", "run.log_every", "run.compile", "data.max_broken_samples"}


def run(recipe: Recipe, output_dir: str | Path, resume: bool = False, **training_arguments: Any) -> GKCTrainer:
    """Train a model with a recipe and save it in `output_dir`.

    Args:
        recipe: Recipe of the run.
        output_dir: Folder of checkpoints, pictures and reports, and of the trained model.
        resume: Whether to continue from the last complete checkpoint in `output_dir`.
        training_arguments: Further `TrainingArguments`, such as `report_to`.

    Returns:
        The trainer after training.

    Raises:
        ValueError: The recipe cannot be run, or `output_dir` contains files that the run would mix with.
        TrainingStopped: Training cannot continue.
    """
    checkpoint = check_folder(output_dir, recipe, resume)
    trainer = build_trainer(recipe, output_dir, **training_arguments)
    train(trainer, checkpoint)
    return trainer


def train(trainer: GKCTrainer, checkpoint: Path | None = None) -> None:
    """Train from the beginning or from the checkpoint that `check_folder` verified, and save the model."""
    folder = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / RECIPE_NAME, json.dumps(trainer.recipe.to_dict(), indent=2) + "\n")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), verify=False)
    trainer.save_model(str(folder))


def check_folder(output_dir: str | Path, recipe: Recipe, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        output_dir: Output folder of the run.
        recipe: Recipe of the run.
        resume: Whether the run is to be resumed.

    Raises:
        ValueError: The folder contains checkpoints and `resume` is false, checkpoints of another recipe, or files that
            no run wrote. The message says what to do.
    """
    folder, found = Path(output_dir), checkpoints(output_dir)
    remove_leftovers(folder)
    if not resume and (found or (folder / "config.json").exists()):
        raise ValueError(
            f"{folder} contains {found[-1].name if found else 'the model'} of an earlier run: continue it with "
            "--resume, name another folder with --out, or delete it."
        )
    complete = next((path for path in reversed(found) if is_complete(path)), None)
    if complete is not None:
        verify_checkpoint(complete)
        _check_same_recipe(complete, recipe)
        return complete
    _check_other_files(folder)
    if resume:
        print_rank0(f"There is no complete checkpoint in {folder}: training starts from the beginning.")
    return None


def _check_same_recipe(checkpoint: Path, recipe: Recipe) -> None:
    """Raise a `ValueError` if a checkpoint was trained with other settings, which would mix two runs."""
    path = checkpoint / RECIPE_NAME
    try:
        stored = type(recipe).from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a recipe: {error}") from error
    # The samples of a streamed dataset are divided among the workers, so that their number changes the batches.
    free = _FREE_FIELDS if recipe.data.streaming else _FREE_FIELDS | {"data.num_workers"}
    differing = [name for name in recipe.field_names() if name not in free and stored.get(name) != recipe.get(name)]
    if differing:
        listed = ", ".join(f"{name} {stored.get(name)} and now {recipe.get(name)}" for name in differing)
        raise ValueError(
            f"{checkpoint} was trained with {listed}: give the same values to resume; or start a new run with "
            f"model.init_from={checkpoint} and another --out."
        )


def _check_other_files(folder: Path) -> None:
    """Raise a `ValueError` if a folder contains files that no run writes before its first checkpoint."""
    left = {RECIPE_NAME, TENSORBOARD_FOLDER, PICTURES_FOLDER, *(path.name for path in checkpoints(folder))}
    others = sorted(path.name for path in folder.iterdir() if path.name not in left) if folder.exists() else []
    if others:
        raise ValueError(
            f"{folder} contains {', '.join(others[:5])} and no complete checkpoint: name an empty or new folder with "
            "--out."
        )


def build_trainer(recipe: Recipe, output_dir: str | Path, **training_arguments: Any) -> GKCTrainer:
    """Build the trainer of a recipe with its dataset, model and losses.

    Args:
        recipe: Recipe of the run.
        output_dir: Folder of checkpoints, pictures and reports.
        training_arguments: Further `TrainingArguments`, such as `report_to`.

    Raises:
        ValueError: Something that the recipe names is missing or does not fit; the message names the field.
    """
    set_seed(recipe.run.seed)
    own_arguments = {
        "save_strategy": "steps",
        "save_steps": recipe.run.save_every,
        "save_total_limit": _KEPT_CHECKPOINTS,
        "logging_steps": recipe.run.log_every,
        "eval_strategy": "no" if recipe.data.eval_split is None else "steps",
        "eval_steps": recipe.run.evaluate_every,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise processes on CPUs do not form a group
        "per_device_eval_batch_size": 1,  # all images have the same weight, and no incomplete batch is dropped
        "dataloader_num_workers": recipe.data.num_workers,
    }
    arguments = recipe.to_training_arguments(output_dir, **{**own_arguments, **training_arguments})
    check_all_processes(arguments)
    stored, all_classes = load_data(recipe), load_vocabulary(recipe)
    for dataset in stored.values():
        check_dataset(dataset, all_classes.labels, progress=False, sample=_CHECKED_SAMPLES)
    splits, vocabulary = split_classes(recipe, stored, all_classes)
    towers = load_towers(recipe)
    sources = load_sources(recipe, RegionCaches(recipe, towers, stored, all_classes, vocabulary))
    model, processor = load_student(recipe, towers)
    # The vocabulary is encoded now, so that every checkpoint contains it; the text encoder is frozen.
    try:
        model.set_vocabulary(vocabulary, processor)
    except ValueError as error:
        raise ValueError(
            f"`data.vocabulary`: {error} Name another checkpoint with model.init_from=CHECKPOINT."
        ) from error
    trainer = GKCTrainer(
        model=model,
        recipe=recipe,
        args=arguments,
        train_dataset=splits[recipe.data.train_split],
        vocabulary=vocabulary,
        processor=processor,
        text_bank=TextBank.from_vocabulary(vocabulary, model, processor, progress=is_main_process()),
        eval_dataset=splits.get(recipe.data.eval_split),
        **sources,
    )
    _place_reports(trainer)
    if (dataset := splits.get(recipe.data.eval_split)) is not None:
        trainer.add_callback(EvaluationPictures(trainer, dataset, vocabulary, processor, recipe.data.crop_size))
    for callback in logging_callbacks(recipe):
        trainer.add_callback(callback)
    return trainer


def check_all_processes(arguments: TrainingArguments) -> None:
    """Raise a `ValueError` if launched processes do not form one group, because each would train a model by itself."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != arguments.world_size:
        raise ValueError(
            f"{launched} processes were launched, but training sees {arguments.world_size}: launch them with "
            "`accelerate launch --multi_gpu --num_processes N -m train ...`, on GPUs or CPUs that all of them can use."
        )


def _place_reports(trainer: GKCTrainer) -> None:
    """Make TensorBoard write to the output folder, and the console show one line for each log."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(trainer.args.output_dir, TENSORBOARD_FOLDER)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleLogger())
