"""Mini-world experiment of one seed: datasets, tiny CLIP, warm-up, and training and evaluation of each ablation.

Finished stages are reused, so that an interrupted run resumes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from configuration import Recipe
from modeling_gkc.atomic_files import atomic_folder, atomic_path, atomic_write_json
from modeling_gkc.configuration_gkc import GKCConfig
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from ..data.drawn_world.dataset import build_dataset, training_vocabulary
from ..data.drawn_world.words import CONCEPTS, SHAPES, WORDS
from ..engine.checkpoints import last_complete_checkpoint
from ..engine.trainer import GKCTrainer
from ..losses.registry import make_losses
from ..teacher.region_teacher import RegionTeacher, TeacherEmbeddings
from .clip import MiniCLIP, load_clip, train_clip
from .evaluate import evaluate
from .settings import ABLATIONS, NO_DISTILLATION, NO_SYNONYMS, Experiment

SCENE_SIZE = 96  # side of the images in pixels

WARM_UP = "warmup"
WARM_UP_WORD = "thing"  # a word of the tiny CLIP that fits every region


def run(experiment: Experiment) -> dict:
    """Run the unfinished stages of an experiment and write `results.json`.

    Args:
        experiment: Settings of the experiment.

    Returns:
        The results: `gate`, the evaluation of the tiny CLIP; `settings`; `minutes`, the run time of each stage; and
        `arms`, the scores of each finished ablation.

    Raises:
        ValueError: If the output folder has results of other settings.
    """
    out = Path(experiment.out)
    out.mkdir(parents=True, exist_ok=True)
    _check_same_settings(experiment)
    train_set = _dataset(experiment, "train", experiment.train_scenes)
    test_set = _dataset(experiment, "test", experiment.test_scenes)
    clip = _clip(experiment)
    teacher = RegionTeacher(clip.vision, keep_aspect=True)
    embeddings = {
        name: _timed(out, "teacher", partial(teacher.embed_dataset, dataset, out / f"teacher-{name}.safetensors"))
        for name, dataset in {"train": train_set, "test": test_set}.items()
    }
    parts = Parts(clip, train_set, test_set, embeddings["train"], embeddings["test"])
    results = {"gate": _read(out / "clip" / "gate.json"), "settings": _read(out / "settings.json")}
    for ablation in experiment.ablations:
        _ablation(experiment, ablation, parts)
    finished = {ablation: out / ablation / "scores.json" for ablation in ABLATIONS}
    results["arms"] = {ablation: _read(path) for ablation, path in finished.items() if path.exists()}
    results["minutes"] = {name: round(seconds / 60, 1) for name, seconds in _read(out / "seconds.json").items()}
    _write(out / "results.json", results)
    return results


@dataclass(frozen=True)
class Parts:
    """CLIP, datasets and teacher embeddings of their regions, which all ablations of a seed share."""

    clip: MiniCLIP
    train_set: Dataset
    test_set: Dataset
    train_embeddings: TeacherEmbeddings
    test_embeddings: TeacherEmbeddings


def _dataset(experiment: Experiment, split: str, scenes: int) -> Dataset:
    folder = Path(experiment.out) / "data" / split
    if not (folder / "dataset_info.json").exists():
        dataset = _timed(
            experiment.out,
            f"{split} scenes",
            lambda: build_dataset(split, scenes, experiment.seed, SCENE_SIZE, experiment.num_proc),
        )
        with atomic_folder(folder, overwrite=True) as unfinished:
            dataset.save_to_disk(unfinished)
    return load_from_disk(folder)


def _clip(experiment: Experiment) -> MiniCLIP:
    folder = Path(experiment.out) / "clip"
    if not (folder / "gate.json").exists():
        settings = replace(experiment.clip, seed=experiment.seed)
        _timed(
            experiment.out,
            "clip",
            lambda: train_clip(folder, settings, experiment.num_proc, gate_scenes=min(400, settings.scenes)),
        )
    return load_clip(folder)


def _ablation(experiment: Experiment, name: str, parts: Parts) -> None:
    """Train and evaluate one ablation, unless its scores exist."""
    folder, ablation = Path(experiment.out) / name, ABLATIONS[name]
    if not (folder / "scores.json").exists():
        trained_as = ablation.trained_as or name
        start = _warm_up(experiment, parts)
        trainer = _timed(experiment.out, trained_as, partial(_train_ablation, experiment, trained_as, parts, start))
        model, processor = trainer.student.eval(), trainer.processing_class
        head = trainer.training_model.distillation_head if ablation.test_on_both else None
        scores = evaluate(model, processor, parts.test_set, teacher=parts.test_embeddings, distillation_head=head)
        model.set_vocabulary(all_concepts(), processor)
        with atomic_folder(folder / "model", overwrite=True) as unfinished:
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
        _write(folder / "scores.json", scores)


def _train_ablation(experiment: Experiment, name: str, parts: Parts, start: Path) -> GKCTrainer:
    """Train an ablation from the warm-up weights in the file `start`."""
    ablation = ABLATIONS[name]
    recipe = experiment.recipe.replace({"run.seed": experiment.seed, **ablation.changes})
    if ablation.class_feature is not None:
        recipe = recipe.replace({"model.config": {**recipe.model.config, "class_feature": ablation.class_feature}})
    model = make_student(parts.clip, recipe)
    # Class heads of another `class_feature` differ in shape and keep their initialization.
    own = model.state_dict()
    saved = {name: value for name, value in load_file(start).items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(saved, strict=False)
    needs_teacher = any(loss.needs_teacher for loss in make_losses(recipe))
    embeddings = parts.train_embeddings if needs_teacher else None
    folder = Path(experiment.out) / name / "training"
    return _train(recipe, model, parts.clip, parts.train_set, training_vocabulary(), embeddings, folder)


def _warm_up(experiment: Experiment, parts: Parts) -> Path:
    """Return the weights that all ablations start from, trained on masks with a single class."""
    weights = Path(experiment.out) / WARM_UP / "model.safetensors"
    if not weights.exists():
        changes = {"run.seed": experiment.seed, "synonyms.probabilities": "uniform"}
        changes |= {"optimizer.steps": experiment.warmup_steps, "optimizer.milestones": ()}
        recipe = experiment.recipe.replace(NO_SYNONYMS | NO_DISTILLATION | changes)
        regions = parts.train_set.map(
            lambda row: {"segments": [segment | {"category_id": 0} for segment in row["segments"]]},
            desc="Regions without classes",
        )
        train = partial(
            _train,
            recipe,
            make_student(parts.clip, recipe),
            parts.clip,
            regions,
            Vocabulary([[WARM_UP_WORD]]),
            None,
            weights.parent / "training",
        )
        student = _timed(experiment.out, WARM_UP, train).student
        with atomic_path(weights) as temporary:
            save_file({name: value.contiguous() for name, value in student.state_dict().items()}, temporary)
    return weights


def _train(
    recipe: Recipe,
    model: GKCForOpenVocabSegmentation,
    clip: MiniCLIP,
    train_set: Dataset,
    vocabulary: Vocabulary,
    embeddings: TeacherEmbeddings | None,
    folder: Path,
) -> GKCTrainer:
    """Train a segmenter, resuming from the last checkpoint."""
    set_seed(recipe.run.seed)
    arguments = recipe.to_training_arguments(
        folder,
        logging_steps=max(1, recipe.optimizer.steps // 20),
        save_steps=max(1, recipe.optimizer.steps // 5),
        save_total_limit=1,
    )
    trainer = GKCTrainer(
        model, recipe, arguments, train_set, vocabulary, make_processor(clip), teacher_embeddings=embeddings
    )
    try:
        checkpoint = str(last_complete_checkpoint(folder))
    except ValueError:
        checkpoint = None
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def make_student(clip: MiniCLIP, recipe: Recipe) -> GKCForOpenVocabSegmentation:
    """Create a segmenter whose backbone and text encoder are initialized from the tiny CLIP."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.run.seed)
        vision = clip.vision.config.to_dict()
        config = GKCConfig(backbone_config=vision, text_config=clip.text.config, **recipe.model_settings())
        model = GKCForOpenVocabSegmentation(config)
    model.model.backbone.encoder.load_state_dict(clip.vision.encoder.state_dict())
    model.text_model.load_state_dict(clip.text.state_dict())
    return model


def make_processor(clip: MiniCLIP) -> GKCProcessor:
    """Create the processor of a segmenter, with the image size and normalization of the tiny CLIP."""
    image_processor = GKCImageProcessor(
        size={"shortest_edge": SCENE_SIZE, "longest_edge": 2 * SCENE_SIZE},
        image_mean=list(OPENAI_CLIP_MEAN),
        image_std=list(OPENAI_CLIP_STD),
    )
    return GKCProcessor(image_processor, clip.tokenizer)


def all_concepts() -> Vocabulary:
    """Return the vocabulary of all concepts with all their words, which is stored with a checkpoint."""
    return Vocabulary(
        [list(WORDS[concept]) for concept in CONCEPTS], is_thing=[concept in SHAPES for concept in CONCEPTS]
    )


def _check_same_settings(experiment: Experiment) -> None:
    """Raise if the output folder has results of other settings; the list of ablations may differ."""
    settings = {
        "seed": experiment.seed,
        "train_scenes": experiment.train_scenes,
        "test_scenes": experiment.test_scenes,
        "warmup_steps": experiment.warmup_steps,
        "clip": asdict(experiment.clip),
        "recipe": experiment.recipe.to_dict(),
    }
    path = Path(experiment.out) / "settings.json"
    made_with = _read(path) if path.exists() else settings
    # Converts a recipe without sections, as written by older versions.
    made_with |= {"recipe": Recipe.from_dict(made_with["recipe"]).to_dict()}
    if made_with != settings:
        differing = sorted(key for key in settings if made_with.get(key) != settings[key])
        raise ValueError(
            f"{experiment.out} has results of other settings ({', '.join(differing)}): choose another --out, or "
            "delete the folder to start again."
        )
    _write(path, settings)


def _timed(out: str | Path, name: str, make: Callable):
    """Call `make` and add its run time in seconds to `seconds.json`."""
    start = perf_counter()
    made = make()
    path = Path(out) / "seconds.json"
    seconds = _read(path) if path.exists() else {}
    seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
    _write(path, seconds)
    return made


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _write(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, values)
