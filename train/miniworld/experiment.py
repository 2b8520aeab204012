"""The mini-world experiment: pictures -> tiny CLIP -> gate -> segmenter by arm -> scores; finished parts are kept."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter

from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from configuration import Recipe, load_recipe
from modeling_gkc.configuration_gkc import GKCConfig
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.vocabulary import Vocabulary

from ..checkpoints import last_complete_checkpoint
from ..teacher import RegionTeacher, TeacherEmbeddings
from ..trainer import GKCTrainer
from .clip import CLIPTraining, MiniCLIP, load_clip, train_clip
from .dataset import build_dataset, training_vocabulary
from .evaluate import evaluate, per_cent
from .words import CONCEPTS, SHAPES, WORDS

SCENE_SIZE = 96  # side in pixels of the pictures

# What each arm changes in the recipe. `both` is the method of the paper.
ARMS = {
    "baseline": {"synonym_mode": "none", "distillation_weight": 0.0},
    "synonyms": {"distillation_weight": 0.0},
    "distillation": {"synonym_mode": "none"},
    "both": {},
}


@dataclass(frozen=True)
class Experiment:
    """All that decides the result.

    Attributes:
        out: Folder of everything that is made.
        seed: Of world, CLIP and segmenter.
        train_scenes, test_scenes: Pictures.
        clip: Training of the tiny CLIP.
        recipe: Training of the segmenter, before an arm's changes.
        arms: Names of `ARMS`.
        num_proc: Processes that draw scenes.
    """

    out: Path
    seed: int = 0
    train_scenes: int = 6000
    test_scenes: int = 500
    clip: CLIPTraining = field(default_factory=CLIPTraining)
    recipe: Recipe = field(default_factory=lambda: load_recipe("miniworld"))
    arms: tuple[str, ...] = ("both",)
    num_proc: int = 1

    def __post_init__(self):
        unknown = sorted(set(self.arms) - ARMS.keys())
        if unknown or not self.arms:
            raise ValueError(f"Unknown arms {unknown}; choose some of {', '.join(ARMS)}.")


def run(experiment: Experiment) -> dict:
    """Run what is not there yet and return `{"gate", "minutes", "arms": {arm: scores}}`, also in `results.json`."""
    out = Path(experiment.out)
    out.mkdir(parents=True, exist_ok=True)
    _check_same_settings(experiment)
    train_set = _dataset(experiment, "train", experiment.train_scenes)
    test_set = _dataset(experiment, "test", experiment.test_scenes)
    clip = _clip(experiment)
    teacher = RegionTeacher(clip.vision, keep_aspect=True)
    embeddings = _timed(out, "teacher", lambda: teacher.embed_dataset(train_set, out / "teacher.safetensors"))
    results = {"gate": json.loads((out / "clip" / "gate.json").read_text()), "arms": {}}
    for arm in experiment.arms:
        results["arms"][arm] = _arm(experiment, arm, clip, train_set, test_set, embeddings)
    results["minutes"] = {name: round(seconds / 60, 1) for name, seconds in _read(out / "seconds.json").items()}
    _write(out / "results.json", results)
    return results


def _dataset(experiment: Experiment, split: str, scenes: int) -> Dataset:
    folder = Path(experiment.out) / "data" / split
    if not (folder / "state.json").exists():
        dataset = _timed(
            experiment.out,
            f"{split} scenes",
            lambda: build_dataset(split, scenes, experiment.seed, SCENE_SIZE, experiment.num_proc),
        )
        dataset.save_to_disk(folder)
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


def _arm(
    experiment: Experiment,
    arm: str,
    clip: MiniCLIP,
    train_set: Dataset,
    test_set: Dataset,
    embeddings: TeacherEmbeddings,
) -> dict:
    """Train and measure one arm; its scores."""
    folder = Path(experiment.out) / arm
    if not (folder / "scores.json").exists():
        recipe = replace(experiment.recipe, seed=experiment.seed, **ARMS[arm])
        model, processor = _timed(
            experiment.out, arm, lambda: _train(recipe, clip, train_set, embeddings, folder / "training")
        )
        model.set_vocabulary(all_concepts(), processor)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        _write(folder / "scores.json", evaluate(model, processor, test_set))
    return _read(folder / "scores.json")


def _train(
    recipe: Recipe, clip: MiniCLIP, train_set: Dataset, embeddings: TeacherEmbeddings, folder: Path
) -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    """Train a segmenter; a killed training continues at its last checkpoint."""
    set_seed(recipe.seed)
    processor = make_processor(clip)
    model = make_student(clip, recipe)
    arguments = recipe.to_training_arguments(
        folder, logging_steps=max(1, recipe.steps // 20), save_steps=max(1, recipe.steps // 5), save_total_limit=1
    )
    trainer = GKCTrainer(
        model, recipe, arguments, train_set, training_vocabulary(), processor, teacher_embeddings=embeddings
    )
    trainer.train(resume_from_checkpoint=_checkpoint(folder))
    return trainer.student.eval(), processor


def _checkpoint(folder: Path) -> str | None:
    try:
        return str(last_complete_checkpoint(folder))
    except ValueError:
        return None


def make_student(clip: MiniCLIP, recipe: Recipe) -> GKCForOpenVocabSegmentation:
    """A segmenter that starts from the tiny CLIP: its image tower as backbone, its text tower."""
    config = GKCConfig(
        backbone_config=clip.vision.config.to_dict(), text_config=clip.text.config, **recipe.model_settings()
    )
    model = GKCForOpenVocabSegmentation(config)
    model.model.backbone.encoder.load_state_dict(clip.vision.encoder.state_dict())
    model.text_model.load_state_dict(clip.text.state_dict())
    return model


def make_processor(clip: MiniCLIP) -> GKCProcessor:
    """Pictures at the size of the mini-world, normalised as the backbone was trained."""
    image_processor = GKCImageProcessor(
        size={"shortest_edge": SCENE_SIZE, "longest_edge": 2 * SCENE_SIZE},
        image_mean=list(OPENAI_CLIP_MEAN),
        image_std=list(OPENAI_CLIP_STD),
    )
    return GKCProcessor(image_processor, clip.tokenizer)


def all_concepts() -> Vocabulary:
    """Every concept of the world under all its words; stored with a checkpoint."""
    return Vocabulary(
        [list(WORDS[concept]) for concept in CONCEPTS], is_thing=[concept in SHAPES for concept in CONCEPTS]
    )


def _check_same_settings(experiment: Experiment) -> None:
    """Refuse to mix parts made with other settings; arms may be added."""
    settings = {
        "seed": experiment.seed,
        "train_scenes": experiment.train_scenes,
        "test_scenes": experiment.test_scenes,
        "clip": asdict(experiment.clip),
        "recipe": json.loads(json.dumps(asdict(experiment.recipe))),
    }
    path = Path(experiment.out) / "settings.json"
    if path.exists() and (made_with := _read(path)) != settings:
        differing = sorted(key for key in settings if made_with.get(key) != settings[key])
        raise ValueError(
            f"{experiment.out} was made with other settings of {', '.join(differing)}; choose another folder, or "
            "delete it to start anew."
        )
    _write(path, settings)


def _timed(out: str | Path, name: str, make: Callable):
    """Make something and add the seconds to `seconds.json`."""
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
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def format_results(results: dict) -> str:
    """Markdown table of the mIoU of every vocabulary (rows) by arm (columns), in per cent; `-` where there is none."""
    arms = results["arms"]
    rows = [["words asked", *arms], ["---", *["---:"] * len(arms)]]
    groups: Sequence[str] = list(next(iter(arms.values()))["scores"])
    for group in groups:
        rows.append([group, *(per_cent(scores["scores"][group]["miou"]) for scores in arms.values())])
    rows.append(["all, harmonic mean of seen and novel", *(per_cent(s["harmonic_mean"]) for s in arms.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def show(results: dict) -> None:
    """Print the table and the time that each part took."""
    tqdm.write(format_results(results))
    tqdm.write("minutes: " + ", ".join(f"{name} {minutes}" for name, minutes in results["minutes"].items()))
