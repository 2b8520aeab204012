"""`python -m train` as a user runs it: on a dataset folder and a CLIP folder, killed and continued, and used after."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoProcessor, ResNetConfig, ResNetModel, pipeline

from configuration import Recipe, load_recipe
from modeling_gkc.cli.main import main as gkc
from train.engine import trainer
from train.engine.builders import load_student, load_towers
from train.engine.checkpoints import checkpoints, is_complete
from train.engine.command import parse, parse_changes
from train.engine.main import main
from train.engine.run import build_trainer, check_all_processes, check_folder
from train.engine.visualization import EvaluationPictures, class_map, grid
from train.teacher import precompute
from train.teacher.caches import JoinedLookup

from .processes import exit_code, start_child
from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor, toy_row, toy_tokenizer, toy_vision_model

ROOT = Path(__file__).parent.parent
RECIPE = """
from configuration import Recipe

RECIPE = Recipe().replace(
    dataset={dataset!r}, vocabulary="dataset", clip={clip!r}, eval_split="val",
    model=dict(hidden_size=32, mask_feature_size=32, encoder_layers=1, encoder_ffn_dim=64, decoder_layers=2,
               decoder_ffn_dim=64, num_attention_heads=4, num_queries=10),
    steps=6, batch_size=2, crop_size=64, learning_rate=3e-3, max_grad_norm=1.0, train_num_points=64, num_workers=0,
    save_every=2, evaluate_every=5, log_every=1, synonym_mode="sample", distillation_weight=10.0,
)
"""


def save_toy_dataset(folder: Path) -> Path:
    """Eight images to train on, three others to evaluate on, and the vocabulary."""

    def renamed(index: int, row: dict) -> dict:
        return row | {"image_id": f"val-{index}"}

    DatasetDict(train=toy_dataset(8), val=toy_dataset(3, change=renamed)).save_to_disk(folder)

    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY.names))
    return folder


def save_toy_clip(folder: Path) -> Path:
    toy_vision_model().save_pretrained(folder)
    toy_model().text_model.save_pretrained(folder / "text")
    toy_tokenizer().save_pretrained(folder / "text")
    return folder


@dataclass
class Workplace:
    """Folders of a dataset and a CLIP, and a recipe file that names them."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def clip(self) -> Path:
        return self.folder / "clip"

    @property
    def recipe(self) -> str:
        return str(self.folder / "toy.py")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("workplace"))
    save_toy_dataset(place.data)
    save_toy_clip(place.clip)
    Path(place.recipe).write_text(RECIPE.format(dataset=str(place.data), clip=str(place.clip)))
    for split in ("train", "val"):
        assert precompute.main(["teacher", str(place.data), "--clip", str(place.clip), "--split", split]) == 0
    return place


@dataclass
class Run:
    """A run that was told to end after its first checkpoint, and continued."""

    out: Path
    status: int
    said: str
    steps_done: int
    status_resumed: int


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def continued(workplace, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("continued") / "out"
    command = [sys.executable, "-m", "train", workplace.recipe, "steps=8", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: is_complete(out / "checkpoint-2"), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    last = max(path for path in checkpoints(out) if is_complete(path))
    done = int(last.name.removeprefix("checkpoint-"))
    return Run(out, process.returncode, said, done, main([workplace.recipe, "steps=8", "--out", str(out), "--resume"]))


def test_a_stopped_run_prints_the_command_that_resumes_it(continued, workplace):
    assert continued.status == 128 + signal.SIGTERM
    assert f"The last checkpoint is {continued.out}/checkpoint-{continued.steps_done}" in continued.said
    assert f"python -m train {workplace.recipe} steps=8 --out {continued.out} --resume" in continued.said
    assert "step 1/8  loss" in continued.said and "Traceback" not in continued.said
    assert 2 <= continued.steps_done < 8


def test_a_resumed_run_reads_the_checkpoint_once_to_verify_it(continued, workplace, monkeypatch):
    verified = []
    monkeypatch.setattr("train.engine.checkpoints.require_files", lambda folder, *_: verified.append(folder))
    assert main([workplace.recipe, "steps=8", "--out", str(continued.out), "--resume"]) == 0
    assert verified == [continued.out / "checkpoint-8"]


def test_resumed_run_equals_an_undisturbed_one(continued, workplace, tmp_path):
    assert continued.status_resumed == 0
    assert main([workplace.recipe, "steps=8", "--out", str(tmp_path / "out"), "--report-to", "none"]) == 0
    for name in ("model.safetensors", "checkpoint-8/training_heads.safetensors"):
        weights, expected = load_file(continued.out / name), load_file(tmp_path / "out" / name)
        assert weights.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_output_folder_loads_in_every_interface(continued, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModel.from_pretrained(continued.out)
        AutoProcessor.from_pretrained(continued.out)
        segment = pipeline("image-segmentation", model=str(continued.out))
    assert model.vocabulary.names == VOCABULARY.names
    image = toy_row(99)["image"]
    assert {part["label"] for part in segment(image, subtask="semantic")} <= set(VOCABULARY.labels)
    image.save(tmp_path / "image.png")
    arguments = ["segment", str(tmp_path / "image.png"), "--model", str(continued.out), "--out", str(tmp_path / "out")]
    assert gkc(arguments) == 0 and len(list((tmp_path / "out").iterdir())) > 0
    assert json.loads((continued.out / "recipe.json").read_text())["optimizer"]["steps"] == 8
    assert {path.name for path in checkpoints(continued.out)} == {"checkpoint-6", "checkpoint-8"}


def test_every_evaluation_writes_a_visualization(continued):
    pictures = sorted((continued.out / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:06d}.png" for step in (5, 8)]
    first, last = (np.asarray(Image.open(path)).astype(int) for path in (pictures[0], pictures[-1]))
    assert first.shape[0] > 3 * 480 and first.shape[1] > 3 * 480
    third = 480 + 12
    assert np.array_equal(first[:, :third], last[:, :third]), "always the same images"


def test_tensorboard_gets_every_logged_value(continued):
    """The killed process and the one that went on write into one folder, which TensorBoard shows as one run."""
    events = EventAccumulator(str(continued.out / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    losses = (
        "cross_entropy",
        "mask",
        "dice",
        "synonym",
        *(f"distillation_{t}" for t in ("feature", "relation", "joint")),
    )
    expected = {f"train/loss_{name}{stages}" for name in losses for stages in ("", "_auxiliary")}
    expected |= {f"train/{name}" for name in ("loss", "temperature", "grad_norm", "learning_rate", "regions")}
    expected |= {f"train/{name}" for name in ("matched_regions", "images_per_second", "data_wait_share", "eta_hours")}
    tags = events.Tags()
    assert expected | {"eval/loss"} <= set(tags["scalars"]) and "eval/pictures" in tags["images"]
    for tag in expected:
        scalars = events.Scalars(tag)
        assert scalars[-1].step == 8 and all(np.isfinite(scalar.value) for scalar in scalars), tag
    assert {scalar.step for scalar in events.Scalars("train/loss")} == set(range(1, 9))
    assert events.Scalars("train/eta_hours")[-1].value == 0
    assert [scalar.step for scalar in events.Scalars("eval/loss")][-1] == 8


REFUSED = {
    "an earlier run": ([], "contains checkpoint-8 of an earlier run: continue it with --resume"),
    "other settings": (["--resume", "steps=13"], "was trained with optimizer.steps 8 and now 13"),
    "no such split": (["eval_split=test"], "`eval_split`: .* has no split 'test', it has train, val"),
    "no dataset": (["dataset=nowhere"], "`dataset`: nowhere cannot be loaded"),
    "none named": (["dataset=none"], "names no dataset: give data.dataset=FOLDER"),
    "no CLIP": (["clip=none"], "needs a teacher but names no CLIP"),
    "nothing to start from": (
        ["clip=none", "distillation_weight=0"],
        "give model.clip=FOLDER or model.init_from=CHECKPOINT",
    ),
    "no probabilities": (
        ["synonym_probabilities=boxes"],
        "create them with `python -m train.cache synonyms .*/data --clip .*/clip --split train "
        "--vocabulary .*/data/vocabulary.json`",
    ),
    "another vocabulary": (["vocabulary=disc"], "Category ids .* are not in the vocabulary of 1 classes"),
    "batches": (["batch_size=3", "accumulation=2"], "`data.batch_size` = 3 cannot be divided among 2"),
    "no checkpoint": (
        ["init_from=nowhere/at/all"],
        "`model.config` and `model.backbone` are determined by the checkpoint",
    ),
    "a value": (["steps=many"], "`optimizer.steps` must be a whole number, got 'many'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_runs_are_rejected_in_one_line(continued, workplace, tmp_path, capsys, case):
    changes, message = REFUSED[case]
    fresh = [] if case in ("an earlier run", "other settings") else ["--out", str(tmp_path / "new")]
    steps = [] if any(change.startswith("steps") for change in changes) else ["steps=8"]
    assert main([workplace.recipe, "--out", str(continued.out), *steps, *changes, *fresh]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("python -m train: error:")]
    assert len(lines) == 1 and "Traceback" not in said
    with pytest.raises(ValueError, match=message):
        raise ValueError(" ".join(said.split()))
    assert not (tmp_path / "new").exists()


def test_the_error_for_a_missing_teacher_cache_contains_the_command_that_writes_it(workplace, tmp_path, capsys):
    data = save_toy_dataset(tmp_path / "data")
    assert main([workplace.recipe, f"dataset={data}", "--out", str(tmp_path / "out")]) == 2
    command = f"python -m train.cache teacher {data} --clip {workplace.clip} --split train"
    assert f"create them with `{command}`" in capsys.readouterr().err
    assert precompute.main(command.split()[3:]) == 0
    assert main([workplace.recipe, f"dataset={data}", "--out", str(tmp_path / "out")]) == 2
    assert "--split val`" in capsys.readouterr().err


def test_output_folders_with_other_files_are_rejected(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"contains holiday.jpg and no complete checkpoint: name an empty or new"):
            check_folder(tmp_path, Recipe(), resume)


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    assert check_folder(tmp_path / "nowhere", Recipe(), resume=False) is None
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "recipe.json").write_text("{}")
    assert check_folder(tmp_path, Recipe(), resume=False) is None
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="contains checkpoint-3 of an earlier run"):
        check_folder(tmp_path, Recipe(), resume=False)
    assert check_folder(tmp_path, Recipe(), resume=True) is None
    assert "no complete checkpoint" in capsys.readouterr().out + capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_command(workplace, tmp_path, capsys, monkeypatch):
    original = trainer.GKCTrainer._forward

    def broken(self, model, inputs):
        outputs = original(self, model, inputs)
        if self.state.global_step == 3:
            head = outputs.heads["distillation"]
            head["scale"] = head["scale"] * float("nan")
        return outputs

    monkeypatch.setattr(trainer.GKCTrainer, "_forward", broken)
    assert main([workplace.recipe, "--out", str(tmp_path), "eval_split=none"]) == 1
    error = capsys.readouterr().err.partition("python -m train: error: ")[2]
    first, second, *_ = error.splitlines()
    assert "step 4, images ['toy-" in first and "loss_distillation_joint" in first
    assert second.startswith(f"The last checkpoint is {tmp_path}/checkpoint-2.") and "--resume" in error
    assert is_complete(tmp_path / "checkpoint-2") and not (tmp_path / "config.json").exists()


def test_a_full_disk_ends_the_command_and_keeps_the_last_checkpoint(workplace, tmp_path, capfd, monkeypatch):
    """The command runs in its own process, in which no file may grow beyond 60 kB once step 4 is saved."""
    original = trainer.GKCTrainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        original(self, output_dir)

    monkeypatch.setattr(trainer.GKCTrainer, "_save_optimizer_and_scheduler", full)
    arguments = [workplace.recipe, "--out", str(tmp_path), "eval_split=none", "--report-to", "none"]
    assert exit_code(start_child(lambda: main(arguments))) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    first, second, *_ = error.partition("python -m train: error: ")[2].splitlines()
    assert first.startswith(f"The disk is full, nothing more can be written to {tmp_path} in step 4: ")
    assert second.startswith(f"The last checkpoint is {tmp_path}/checkpoint-2.") and "--resume" in error
    assert is_complete(tmp_path / "checkpoint-2") and not (tmp_path / "checkpoint-4").exists()


def test_a_cache_that_is_damaged_ends_the_command_in_one_line(workplace, tmp_path, capsys):
    data = shutil.copytree(workplace.data, tmp_path / "data")
    shard = data / "gkc_cache" / "train" / "teacher" / "shard-00000.safetensors"
    content, rows = shard.read_bytes(), load_file(shard)["rows"].numpy().tobytes()
    shard.write_bytes(content.replace(rows, rows[::-1]))
    given = [workplace.recipe, f"dataset={data}", "eval_split=none", "--out", str(tmp_path / "out")]
    assert main(given) == 1
    first, second = capsys.readouterr().err.partition("python -m train: error: ")[2].splitlines()
    assert first.startswith(f"{shard} is damaged, the checksum of rows ")
    assert f"`python -m train.cache teacher {workplace.data} --clip" in first and "writes it again" in first
    assert second == "There is no checkpoint yet: run the same command again to start from the beginning."


def test_fine_tuning_the_shipped_checkpoint_on_a_folder(workplace, tmp_path, monkeypatch):
    """Recipe `custom` as it stands, but for its length, from another working folder."""
    monkeypatch.chdir(tmp_path)
    arguments = ["custom", f"dataset={workplace.data}", "--out", str(tmp_path / "out"), "--report-to", "none"]
    arguments += ["steps=3", "batch_size=2", "num_workers=0", "save_every=2", "train_num_points=64"]
    assert main(arguments) == 0
    before, after = (
        load_file(ROOT / "hub_card/gkc-mini/model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    moved = [
        key
        for key in after
        if key in before and before[key].shape == after[key].shape and not torch.equal(before[key], after[key])
    ]
    assert any("backbone" in key for key in moved) and any("decoder" in key for key in moved)
    assert not any("text_model" in key for key in moved)
    toy_row(5)["image"].save(tmp_path / "image.png")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.vocabulary.labels == VOCABULARY.labels
    assert (
        gkc(["segment", str(tmp_path / "image.png"), "--model", str(tmp_path / "out"), "--out", str(tmp_path / "o")])
        == 0
    )
    assert (tmp_path / "out/pictures/step-000003.png").exists()


def test_two_processes_of_accelerate_are_one_run(workplace, tmp_path):
    """The same images in every step as with one process, and one voice; test_batch_invariance.py compares weights."""
    arguments = ["-m", "train", workplace.recipe, "steps=2", "save_every=2", "eval_split=none", "--report-to", "none"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    finished = subprocess.run(
        [*launch, *arguments, "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("The model is in") == 1 and finished.stdout.count("step 2/2  loss") == 1
    assert main([*arguments[2:], "--out", str(tmp_path / "one")]) == 0
    logs = [
        json.loads((tmp_path / name / "checkpoint-2/trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == 2
    for one, two in zip(*logs, strict=True):
        for name in ("regions", "matched_regions"):  # of each process, on average
            assert two[name] == pytest.approx(one[name] / 2), name
    assert (tmp_path / "two/checkpoint-2/rng_state_1.pth").exists()


def test_unconnected_processes_raise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but training sees 1"):
        check_all_processes(SimpleNamespace(world_size=1))
    check_all_processes(SimpleNamespace(world_size=2))


def test_help_lists_recipes_and_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert "coco_clip_r50 " in text and "fine-tune on your own images" in text
    for name in Recipe.field_names():
        assert f"  {name}=" in text or name == "model.config", name
    assert "  data.batch_size=112\n      Number of images in an optimizer step" in text


def test_show_prints_the_recipe_without_training(capsys, tmp_path):
    arguments = ["coco_r101", "steps=10", "model.num_queries=50", "data.crop_size=none", "--out", str(tmp_path / "o")]
    assert main([*arguments, "--show"]) == 0
    text = capsys.readouterr().out
    assert "  optimizer.steps=10   (given)" in text and "  data.crop_size=none   (given)" in text
    assert "  data.batch_size=56\n" in text
    assert "model.config.num_queries=50" in text and not (tmp_path / "o").exists()
    assert len(text.splitlines()) == 1 + len(Recipe.field_names())


def test_values_are_read_by_the_type_of_their_field():
    """By full names and by short ones."""
    changes = parse_changes(
        Recipe(),
        [
            "steps=50_000",
            "optimizer.learning_rate=1e-4",
            "compile=True",
            "crop_size=none",
            "scale_range=(0.1, 2)",
            "milestones=",
            "data.dataset=data/a=b",
            "vocabulary=a: b; [c]",
            "distillation_relation_weight=2",
            "teacher=online",
            "model.num_queries=50",
            "model.config.dropout=0.1",
            "model.config.backbone_config.depths=[3,4,23,3]",
            "model.backbone_config.model_type=resnet",
        ],
    )
    backbone = {"depths": [3, 4, 23, 3], "model_type": "resnet"}
    assert changes == {
        "optimizer.steps": 50_000,
        "optimizer.learning_rate": 1e-4,
        "run.compile": True,
        "data.crop_size": None,
        "data.scale_range": (0.1, 2.0),
        "optimizer.milestones": (),
        "data.dataset": "data/a=b",
        "data.vocabulary": "a: b; [c]",
        "distillation.relation_weight": 2.0,
        "teacher.source": "online",
        "model.config": {"num_queries": 50, "dropout": 0.1, "backbone_config": backbone},
    }
    assert isinstance(changes["distillation.relation_weight"], float)


def test_nested_changes_of_the_model_keep_what_the_recipe_has():
    recipe = load_recipe("coco_r101")
    changes = parse_changes(recipe, ["model.config.backbone_config.depths=[3,4,6,3]"])
    backbone = {"model_type": "resnet", "depths": [3, 4, 6, 3]}
    assert changes == {"model.config": {"backbone_config": backbone}}
    assert recipe.model.config["backbone_config"]["depths"] == [3, 4, 23, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps=${run.seed}", r"`optimizer.steps`: '\$\{run.seed\}' refers to another value"),
        ("seed=???", "`run.seed`: '\\?\\?\\?' refers to another value"),
        ("steps=abc", "`optimizer.steps` must be a whole number, got 'abc'"),
        ("scale_range=a,b", "`data.scale_range` must be 2 numbers separated by commas, got 'a,b'"),
        ("dataset=", "`data.dataset` has no value: give one, or `none`"),
    ],
)
def test_values_of_another_type_are_named(change, message, capsys):
    assert main(["custom", change, "--show"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("python -m train: error:") and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def (", r"recipe\.py, line 1: SyntaxError: invalid syntax"),
        ("\nimport absent", r"recipe\.py, line 2: ModuleNotFoundError: No module named 'absent'"),
        ("from configuration import Recipe\nRECIPE = Recipe(stepz=3)", r"recipe\.py, line 2: .*'stepz'"),
        (
            "from configuration import load_recipe\nRECIPE = load_recipe('custom', {'optimizer.steps': '3'})",
            r"recipe\.py, line 2: `optimizer\.steps` must be a number, got '3'",
        ),
    ],
)
def test_errors_of_recipe_files_name_file_and_line(content, message, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(content)
    assert main([str(tmp_path / "recipe.py"), "--show"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1


def test_output_below_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match="2"):
            main(["custom", "dataset=data", "--out", str(out)])
        assert f"argument --out: {tmp_path / 'file'} is not a directory" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            main(["distil", "photos", "--teacher", "teacher", "--words", "dog", "--out", str(out)])
        assert f"argument --out: {tmp_path / 'file'} is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco"], "no recipe 'coco'; there are .*coco_r101"),
        (["nowhere.py"], "recipe file nowhere.py does not exist"),
        (["coco_r101", "stepz=3"], "no field 'stepz'; did you mean optimizer.steps"),
        (["coco_r101", "data.stepz=3"], "no field 'data.stepz'; did you mean optimizer.steps"),
        (["coco_r101", "num_queries=3"], "no field 'num_queries'; did you mean model.config.num_queries"),
        (["coco_r101", "model.num_querys=3"], "'num_querys' not in 'GKCConfig'. Did you mean: 'num_queries'"),
        (
            ["coco_r101", "model.num_queries=few"],
            "`model.config.num_queries` must be a whole number or none, got 'few'",
        ),
        (["coco_r101", "model.backbone_confg.depths=[1]"], "'backbone_confg' not in 'GKCConfig'"),
        (["coco_r101", "model={}"], "`model.config` is set field by field"),
        (["coco_r101", "weight=3"], "Several sections .* give synonyms.weight or distillation.weight"),
        (["coco_r101", "steps"], "'steps' does not have the form section.field=value"),
        (["coco_r101", "steps=1", "optimizer.steps=2"], "`optimizer.steps` is given twice"),
        (["coco_r101", "scale_range=1"], "`data.scale_range` must be 2 numbers separated by commas, got '1'"),
        (["coco_r101", "learning_rate=nan"], "`optimizer.learning_rate` must be positive, got nan"),
        (["coco_r101", "compile=maybe"], "`run.compile` must be true or false, got 'maybe'"),
        (["coco_r101", "steps=none"], "`optimizer.steps` must be a whole number, got 'none'"),
        (["coco_r101", "steps=many"], "`optimizer.steps` must be a whole number, got 'many'"),
        (["coco_r101", "precision=int8"], r"`optimizer.precision` must be fp32 or bf16 or fp16, got 'int8'"),
    ],
)
def test_errors_name_the_invalid_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_a_file_without_a_recipe_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("RECIPE = {}")
    with pytest.raises(ValueError, match=r"mine.py does not define RECIPE = Recipe"):
        parse([str(tmp_path / "mine.py")])


def test_the_output_folder_is_named_after_the_recipe(workplace):
    assert parse(["coco_r101"]).out == Path("runs/coco_r101") and parse([workplace.recipe]).out == Path("runs/toy")


def test_the_student_starts_from_the_clip(workplace):
    recipe = parse([workplace.recipe]).recipe
    towers = load_towers(recipe)
    model, processor = load_student(recipe, towers)
    for name, value in towers.vision_model.encoder.state_dict().items():
        assert torch.equal(model.model.backbone.encoder.state_dict()[name], value)
    for name, value in towers.text_model.state_dict().items():
        assert torch.equal(model.text_model.state_dict()[name], value)
    assert processor.image_processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert model.config.num_queries == 10 and model.config.train_num_points == 64


def test_another_backbone_comes_with_its_weights(workplace, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1])
    ResNetModel(config).save_pretrained(tmp_path)
    changes = [f"backbone={tmp_path}", "model.backbone_config.model_type=resnet"]
    recipe = parse([workplace.recipe, *changes, "model.backbone_config.depths=[1,1,1,1]"]).recipe
    model, _ = load_student(recipe, load_towers(recipe))
    saved, loaded = load_file(tmp_path / "model.safetensors"), model.model.backbone.state_dict()
    found = [key for key in loaded if any(torch.equal(value, loaded[key]) for value in saved.values())]
    assert len(found) >= len(saved) - 2
    recipe = parse([workplace.recipe, *changes, "model.backbone_config.depths=[1,1,2,1]"]).recipe
    with pytest.raises(ValueError, match=r"differs from `model.config.backbone_config` in"):
        load_student(recipe, load_towers(recipe))


def test_splits_that_share_images_cannot_share_a_lookup(workplace, tmp_path):
    folder = tmp_path / "data"
    DatasetDict(train=toy_dataset(4), val=toy_dataset(2)).save_to_disk(folder)
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY.names))
    for split in ("train", "val"):
        precompute.main(["teacher", str(folder), "--clip", str(workplace.clip), "--split", split])
    with pytest.raises(ValueError, match="share 2 image ids, such as 'toy-0'"):
        build_trainer(parse([workplace.recipe, f"dataset={folder}"]).recipe, tmp_path / "out")


def test_image_is_looked_up_in_the_split_that_contains_it():
    class Store:
        def __init__(self, image: str, value: float):
            self.image, self.value = image, value

        def lookup(self, image_ids, segment_ids):
            if image_ids != [self.image]:
                raise KeyError(image_ids[0])
            return [torch.full((len(segment_ids[0]), 2), self.value)]

    joined = JoinedLookup([Store("a", 1.0), Store("b", 2.0)])
    rows = joined.lookup(["b", "a"], [torch.arange(3), torch.arange(1)])
    assert [len(row) for row in rows] == [3, 1] and rows[0].unique() == 2 and rows[1].unique() == 1
    with pytest.raises(KeyError, match="c"):
        joined.lookup(["c"], [torch.arange(1)])


def test_visualization_shows_the_prediction():
    pictures = EvaluationPictures(None, toy_dataset(5), VOCABULARY, toy_processor(), 64, count=2)
    assert [sample["image_id"] for sample in pictures.samples] == ["toy-0", "toy-4"]
    truth = [class_map(sample, 3) for sample in pictures.samples]
    right = np.asarray(pictures.draw(truth)).astype(int)
    column = right[42:, 12 + 480 + 12 :]
    half = column.shape[1] // 2
    assert np.array_equal(column[:, :half], column[:, half : 2 * half]), "a right prediction looks as the truth"
    wrong = np.asarray(pictures.draw([np.zeros_like(classes) for classes in truth])).astype(int)
    assert not np.array_equal(right[:, -half:], wrong[:, -half:])


def test_visualizations_exclude_padding():
    def cut(index, row):
        box = (0, 0, 64, 40)
        return {**row, "image": row["image"].crop(box), "segmentation": row["segmentation"].crop(box)}

    pictures = EvaluationPictures(None, toy_dataset(2, change=cut), VOCABULARY, toy_processor(), 32, count=2)
    assert [sample["image"].shape[:2] for sample in pictures.samples] == [(20, 32)] * 2
    assert [sample["ids"].shape for sample in pictures.samples] == [(20, 32)] * 2


def test_class_map_and_image_grid():
    sample = {
        "ids": np.array([[0, 7], [9, 9]]),
        "segments": [{"id": 7, "category_id": 2}, {"id": 9, "category_id": 0}],
    }
    assert class_map(sample, 3).tolist() == [[3, 2], [0, 0]]
    red, blue = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 10), "blue")
    picture = grid([[red, blue], [blue, red]], ("one", "two"))
    assert picture.size == (2 * (30 + 12) + 12, 20 + 20 + 2 * 12 + 30 + 12)
    assert picture.getpixel((12, 42)) == (255, 0, 0) and picture.getpixel((12 + 42, 42 + 32)) == (255, 0, 0)
    wide = grid([[Image.new("RGB", (2900, 100))] * 2], ("one", "two"))
    assert wide.width == 3000
