"""`python -m train distil`: the labels against slow references, kills, reuse of labels, and the trained student."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetModel

from configuration import load_recipe
from modeling_gkc.cli.main import main as gkc
from modeling_gkc.conversion import open_segmenter
from modeling_gkc.post_processing import resize_masks
from modeling_gkc.predictor import GKCPredictor
from modeling_gkc.vocabulary import Vocabulary
from train.data.drawn_world.examples import draw_annotated
from train.data.from_folder import convert
from train.data.prepared import load_prepared
from train.data.schema import read_row
from train.engine import distil, trainer
from train.engine.distil import parse_distillation
from train.engine.main import main
from train.storage.shards import RegionStore
from train.teacher import segmenter_labels
from train.teacher.precompute import cache_folder
from train.teacher.region_teacher import TeacherCache
from train.teacher.segmenter_labels import SegmentConfidences, StoredLabels, label_image

from .conftest import word_tokenizer
from .processes import exit_code, start_child
from .zero_shot_toys import SETTINGS, make_segmenter, make_tower

ROOT = Path(__file__).parent.parent
MINI = ROOT / "hub_card" / "gkc-mini"
WORDS = "disc; square, box; lawn, grass; sky; water; sand"
QUICK = [
    *("steps=4", "batch_size=2", "num_workers=0", "save_every=2", "evaluate_every=4", "log_every=1"),
    *("train_num_points=64", "data.crop_size=96", "--report-to", "none", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Drawn images in `shapes`, one of them broken, and a small ResNet in `resnet`."""
    folder = tmp_path_factory.mktemp("distil")
    draw_annotated(folder / "shapes", 10)
    (folder / "shapes" / "images" / "broken.jpg").write_bytes(b"no image")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder / "resnet")
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    return [
        *("distil", str(place / "shapes" / "images"), "--teacher", str(MINI), "--words", WORDS, "--out", str(out)),
        *("--confidence", "0.3", "--val-share", "0.3", *QUICK, *more),
    ]


def from_backbone(place: Path) -> list[str]:
    sizes = ("hidden_size", "mask_feature_size", "encoder_ffn_dim", "decoder_ffn_dim")
    config = [f"model.config.{name}=32" for name in sizes]
    config += [f"model.config.{name}" for name in ("encoder_layers=1", "decoder_layers=2", "num_attention_heads=4")]
    return [f"model.backbone={place / 'resnet'}", *config, "model.config.num_queries=10"]


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """Run of a student that starts from a backbone, undisturbed, with its labels in `labels`."""
    out = place / "run"
    assert main([*arguments(place, out), *from_backbone(place), "--cache", str(place / "labels")]) == 0
    return out


def labels_of(place: Path, out: Path, *more: str) -> Path:
    return Path(parse_distillation(arguments(place, out, *more)[1:]).recipe.data.dataset)


def teacher(words: str = WORDS) -> GKCPredictor:
    predictor = GKCPredictor.from_pretrained(MINI)
    predictor.set_vocabulary(words)
    return predictor


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of labels; manifests contain the command that wrote them."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix in (".parquet", ".safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_student_has_the_words_and_no_tower(place, trained, capsys):
    parts = load_file(trained / "model.safetensors")
    assert not [name for name in parts if "vision" in name or "tower" in name]
    source, student = load_file(MINI / "model.safetensors"), GKCPredictor.from_pretrained(trained)
    texts = [name for name in parts if name.startswith("text_model.")]
    assert texts and all(torch.equal(parts[name], source[name]) for name in texts)
    assert student.vocabulary.vocabulary.names == Vocabulary.parse(WORDS).names
    image = next((place / "shapes" / "images").glob("*.png"))
    assert gkc(["segment", str(image), "--model", str(trained), "--out", str(place / "segmented")]) == 0
    found = json.loads((trained / "distillation.json").read_text())
    assert 0 <= found["agreement"]["after"] <= 1 and found["images"] >= 1
    seconds = found["seconds_per_image"]
    assert seconds["ratio"] == pytest.approx(seconds["student"] / seconds["teacher"])


def test_every_loss_of_the_recipe_is_trained(place, trained):
    states = [json.loads(path.read_text()) for path in trained.glob("checkpoint-*/trainer_state.json")]
    logged = {name for state in states for entry in state["log_history"] for name in entry}
    assert {"loss_distillation_joint", "loss_synonym", "loss_mask"} <= {name.removeprefix("train_") for name in logged}
    recipe = load_recipe("distil")
    assert recipe.data.ignore_void and recipe.teacher.source == "labels" and recipe.model.clip is None


def test_labels_are_the_confident_queries_of_the_teacher(place, trained):
    """Segments, confidences and embeddings against a loop over queries at the size of the image."""
    folder, predictor = labels_of(place, trained, "--cache", str(place / "labels")), teacher()
    seen = 0
    for split in ("train", "val"):
        dataset = load_prepared(folder, split).dataset
        fingerprint = StoredLabels(folder).fingerprint(dataset)
        stores: dict[type[RegionStore], RegionStore] = {
            kind: kind.open(cache_folder(folder, split, kind.kind), fingerprint)
            for kind in (TeacherCache, SegmentConfidences)
        }
        for row in dataset:
            image, ids = read_row(row)
            outputs = predictor.forward([predictor.prepare(Image.fromarray(image))])
            content = tuple(outputs.content_sizes[0].tolist())
            masks = resize_masks(outputs.masks_queries_logits[0], content, image.shape[:2]).sigmoid().numpy()
            scores, classes = (part.numpy() for part in outputs.class_queries_logits[0].softmax(-1).max(-1))
            scores = np.where(classes < 6, scores, 0)
            products = scores[:, None, None] * masks
            confidence, owner = products.max(0), products.argmax(0)
            assert (ids > 0).mean() > 0 and ((ids > 0) == (confidence >= 0.3)).mean() > 0.999
            numbers = torch.tensor([segment["id"] for segment in row["segments"]])
            embeds, means = (store.lookup([row["image_id"]], [numbers])[0] for store in stores.values())
            kinds = predictor.vocabulary.vocabulary.stuff_ids
            for segment, embed, mean in zip(row["segments"], embeds, means, strict=True):
                inside = ids == segment["id"]
                queries = np.unique(owner[inside])
                assert set(classes[queries]) == {segment["category_id"]}
                assert mean.item() == pytest.approx(confidence[inside].mean(), abs=1e-3)
                own = torch.nn.functional.normalize(outputs.query_embeds[0, queries].float(), dim=-1)
                if len(queries) == 1:
                    assert torch.allclose(embed, own[0], atol=1e-3)
                    seen += 1
                else:
                    assert segment["category_id"] in kinds
                    shares = torch.tensor([float((owner[inside] == query).mean()) for query in queries])
                    assert torch.allclose(embed, torch.nn.functional.normalize(shares @ own, dim=0), atol=1e-3)
    assert seen > 5


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of `gkc open` by the kind of their tower."""
    folders = {}
    for kind in ("clip", "siglip"):
        tower, text_model = make_tower(kind)
        model, processor = open_segmenter(
            make_segmenter("mask2former"), tower, word_tokenizer(), SETTINGS, text_model=text_model
        )
        model.config.region_weight = 0.5  # with less, the random segmenter finds no object
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        processor.save_pretrained(folders[kind])
    return folders


def test_teacher_of_gkc_open_makes_a_student_without_its_tower(place, opened, tmp_path):
    given = arguments(place, tmp_path / "run", "--confidence", "0.05")
    given[3:6] = [str(opened["clip"]), "--words", "dog; sofa; sky"]
    assert main([*given, *from_backbone(place)]) == 0
    folder = Path(parse_distillation(given[1:]).recipe.data.dataset)
    predictor = GKCPredictor.from_pretrained(opened["clip"])
    predictor.set_vocabulary("dog; sofa; sky")
    row = load_prepared(folder, "train").dataset[0]
    image, ids = read_row(row)
    found = label_image(predictor, predictor.prepare(Image.fromarray(image)), 0.05)
    assert found.classes and np.array_equal(found.ids, ids)
    store = TeacherCache.open(cache_folder(folder, "train", "teacher"), StoredLabels(folder).inputs)
    [embeds] = store.lookup([row["image_id"]], [torch.arange(1, len(found.classes) + 1)])
    assert np.allclose(embeds, found.embeds, atol=1e-3) and np.allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-3)
    student = load_file(tmp_path / "run" / "model.safetensors")
    assert not [name for name in student if "vision" in name or name.startswith("tower")]
    texts = GKCPredictor.from_pretrained(tmp_path / "run").model
    tokens = predictor.processor(text="dog; sofa", return_tensors="pt")
    expected = predictor.model.get_class_embeddings(**tokens).class_embeds
    assert torch.equal(texts.get_class_embeddings(**tokens).class_embeds, expected)
    second = [
        *given,
        "--init",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "second"),
        "--cache",
        str(folder.parent),
    ]
    assert main(second) == 0, "a student has the text encoder of its teacher"


def test_teacher_with_another_text_encoder_is_refused_before_labeling(place, opened, tmp_path, capsys):
    given = arguments(place, tmp_path / "run")
    given[3:6] = [str(opened["siglip"]), "--words", "dog; sofa; sky"]
    assert main([*given, *from_backbone(place)]) == 2
    assert "is a siglip_text_model, not CLIP's" in capsys.readouterr().err
    assert not (tmp_path / "run-labels").exists()


def test_broken_and_unconfident_images_are_named_and_left_out(place, tmp_path, capsys):
    images = shutil.copytree(place / "shapes" / "images", tmp_path / "images")
    Image.new("RGB", (96, 96), (127, 127, 127)).save(images / "plain.png")
    command = parse_distillation([str(images), *arguments(place, tmp_path / "run", "--confidence", "0.9")[2:]])
    distil.label_photos(command)
    printed = capsys.readouterr().out
    assert "1 images cannot be read and are left out:" in printed and str(images / "broken.jpg") in printed
    assert "images without a pixel of confidence 0.9 or more are left out" in printed
    folder = Path(command.recipe.data.dataset)
    kept = [name for split in ("train", "val") for name in load_prepared(folder, split).dataset["image_id"]]
    assert "broken" not in kept and "plain" not in kept and 0 < len(kept) <= 10


def killed_after(place: Path, count: int, images: int) -> None:
    """Kill the process when it labels the image after `count` others."""
    done, original = [], segmenter_labels.label_image

    def counted(*given):
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(given)
        return original(*given)

    segmenter_labels.label_image = counted
    segmenter_labels.IMAGES_PER_SHARD = images


@pytest.mark.parametrize("count", [1, 5, 8])
def test_killed_labeling_goes_on_without_repeating_finished_shards(place, tmp_path, monkeypatch, count):
    monkeypatch.setattr(segmenter_labels, "IMAGES_PER_SHARD", 2)
    command = parse_distillation(arguments(place, tmp_path / "run")[1:])
    undisturbed = parse_distillation(arguments(place, tmp_path / "other")[1:])
    distil.label_photos(undisturbed)

    def killed() -> int:
        killed_after(place, count, 2)
        distil.label_photos(command)
        return 0

    assert exit_code(start_child(killed)) == -signal.SIGKILL
    labeled, original = [], segmenter_labels.label_image
    monkeypatch.setattr(segmenter_labels, "label_image", lambda *given: labeled.append(given) or original(*given))
    distil.label_photos(command)
    assert len(labeled) <= 10 - count + 2
    first, second = (files_of(Path(each.recipe.data.dataset)) for each in (undisturbed, command))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and name.endswith(".parquet")] == []


def test_run_killed_in_training_resumes_to_the_same_student(place, trained, tmp_path):
    out, cache = tmp_path / "run", str(place / "labels")

    def killed() -> int:
        original = trainer.GKCTrainer.compute_loss

        def counted(self, *given, **named):
            if self.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *given, **named)

        trainer.GKCTrainer.compute_loss = counted
        return main([*arguments(place, out), *from_backbone(place), "--cache", cache])

    assert exit_code(start_child(killed)) == -signal.SIGKILL
    assert (out / "checkpoint-2").is_dir() and not (out / "config.json").exists()
    assert main([*arguments(place, out), *from_backbone(place), "--cache", cache, "--resume"]) == 0
    expected, found = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_labels_are_reused_until_an_input_changes(place, trained, tmp_path, monkeypatch):
    cache = ("--cache", str(place / "labels"))
    folder = labels_of(place, tmp_path, *cache)
    assert (folder / "prepared.json").is_file()

    def fail(*given):
        raise AssertionError("the labels were made again")

    monkeypatch.setattr(segmenter_labels, "label_image", fail)
    distil.label_photos(parse_distillation(arguments(place, tmp_path / "run", *cache)[1:]))
    assert labels_of(place, tmp_path, *cache, "--init", str(MINI), "learning_rate=1e-3") == folder
    changed = [
        labels_of(place, tmp_path, *cache, "--words", "disc; sky"),
        labels_of(place, tmp_path, *cache, "--words", "disc; square; lawn, grass; sky; water; sand"),
        labels_of(place, tmp_path, *cache, "--confidence", "0.4"),
        labels_of(place, tmp_path, *cache, "--val-share", "0.4"),
    ]
    images = shutil.copytree(place / "shapes" / "images", tmp_path / "images")
    (images / "broken.jpg").unlink()
    changed.append(
        Path(parse_distillation([str(images), *arguments(place, tmp_path, *cache)[2:]]).recipe.data.dataset)
    )
    other = shutil.copytree(MINI, tmp_path / "mini")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"prompt_reduction": "max"}))
    given = arguments(place, tmp_path, *cache)[1:]
    given[given.index(str(MINI))] = str(other)
    changed.append(Path(parse_distillation(given).recipe.data.dataset))
    assert len({folder, *changed}) == 1 + len(changed)


@pytest.mark.parametrize("damaged", ["train-00000-of-00001.parquet", "shard-00000.safetensors", "vocabulary.json"])
def test_damaged_labels_are_made_again(place, trained, tmp_path, damaged):
    cache = shutil.copytree(place / "labels", tmp_path / "labels")
    command = parse_distillation(arguments(place, tmp_path / "run", "--cache", str(cache))[1:])
    folder = Path(command.recipe.data.dataset)
    undisturbed = files_of(folder)
    file = next(path for path in sorted(folder.rglob(damaged)) if "/val/" not in str(path))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    distil.label_photos(command)
    assert files_of(folder) == undisturbed and load_prepared(folder, "train").vocabulary.labels[0] == "disc"


def test_resumed_run_with_other_words_is_refused(place, trained, tmp_path, capsys):
    given = [*arguments(place, trained), *from_backbone(place), "--cache", str(place / "labels"), "--resume"]
    assert main([*given, "--words", "disc; sky"]) == 2
    assert "was trained with data.dataset" in capsys.readouterr().err


def test_start_from_the_teacher_itself_and_report_on_labeled_data(place, tmp_path, capsys):
    clean = shutil.copytree(place / "shapes", tmp_path / "shapes", ignore=shutil.ignore_patterns("broken.jpg"))
    convert(clean, tmp_path / "data", val_share=0.3)
    given = arguments(place, tmp_path / "run", "--init", str(MINI), "--labels", str(tmp_path / "data"))
    given[given.index(WORDS)] = str(tmp_path / "data" / "vocabulary.json")
    assert main(given) == 0
    report = json.loads((tmp_path / "run" / "distillation.json").read_text())
    labeled = report["labeled"]
    assert labeled["before"] == labeled["teacher"] > 0 and labeled["after"] > 0, "the student starts as its teacher"
    printed = capsys.readouterr().out
    assert "Agreement with the teacher on " in printed and f"images of {tmp_path / 'data'} (mIoU): teacher" in printed
    assert "of the teacher's)" in printed and f"gkc segment photo.jpg --model {tmp_path / 'run'}" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", str(MINI)], "--teacher was given 2 times: give one teacher."),
        (["--confidence", "1.5"], "--confidence must lie between 0 and 1, got 1.5."),
        (["--val-share", "0"], "--val-share must lie between 0 and 1, got 0.0."),
        (["--words", "disc | sky"], "--words: "),
        (["data.dataset=x"], "`data.dataset` is set by the command: use --cache, --words, --teacher or --init."),
        (["stepz=3"], "A recipe has no field 'stepz'; did you mean optimizer.steps?"),
        (["--labels", "nowhere"], "--labels: "),
        (["model.backbone=nowhere/none"], "`model.backbone`: "),
        (["--init", "nowhere"], "`model.init_from`: nowhere is not a GKC checkpoint"),
        (["--device", "cuda:77"], "--device: "),
        (["--confidence", "0.999999"], "None of the "),
    ],
)
def test_misuse_ends_in_one_line(place, tmp_path, capsys, more, message):
    start = [] if "--init" in more or more[0].startswith("model.backbone=") else from_backbone(place)
    assert main([*arguments(place, tmp_path / "run"), *start, *more]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].partition("error: ")[2].startswith(message), error
    assert "Traceback" not in error


def test_missing_folders_and_a_lone_image_end_in_one_line(place, tmp_path, capsys):
    given = arguments(place, tmp_path / "run")
    for position, message in (
        (1, "PHOTOS: nowhere is not a directory."),
        (3, "--teacher: nowhere is not a checkpoint;"),
    ):
        assert main([*given[:position], "nowhere", *given[position + 1 :]]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    shutil.copy(ROOT / "examples" / "scene-1.png", tmp_path / "one")
    assert main([given[0], str(tmp_path / "one"), *given[2:], *from_backbone(place)]) == 2
    assert "has 1 images: give at least two, one of which is held out." in capsys.readouterr().err


def test_init_with_another_text_encoder_is_refused(place, tmp_path, capsys):
    other = shutil.copytree(MINI, tmp_path / "other")
    model = GKCPredictor.from_pretrained(other).model
    with torch.no_grad():
        next(model.text_model.parameters()).mul_(1.01)
    model.save_pretrained(other)
    assert main([*arguments(place, tmp_path / "run"), "--init", str(other)]) == 2
    assert f"--init: {other} has another text encoder than {MINI}" in capsys.readouterr().err


def test_recipe_with_stored_labels_needs_them(tmp_path):
    with pytest.raises(ValueError, match=r"holds no labels of a teacher, which teacher\.source=labels needs"):
        StoredLabels(tmp_path)


def test_help_needs_no_torch():
    program = "import sys; from train.engine.main import main\ntry: main(['distil', '--help'])\nfinally: "
    program += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "--teacher DIR" in done.stdout, done.stderr
