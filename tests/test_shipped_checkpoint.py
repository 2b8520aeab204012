"""Tests of the shipped checkpoint `hub_card/gkc-mini` on images outside of its training and test sets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from hub_card.publish_mini import MAX_BYTES, card
from modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.cli.common import default_model_path
from modeling_gkc.remote_code import add_library_entry
from modeling_gkc.vocabulary import Vocabulary
from train.data.drawn_world.dataset import build_dataset
from train.data.drawn_world.examples import EXAMPLES_SPLIT, draw_examples
from train.data.drawn_world.words import WORDS
from train.data.drawn_world.world import draw_scene
from train.miniworld.evaluate import evaluate
from train.miniworld.settings import ABLATIONS, MAIN_ABLATIONS
from train.miniworld.summary import tables

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "hub_card" / "gkc-mini"
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model() -> GKCForOpenVocabSegmentation:
    return AutoModel.from_pretrained(SHIPPED).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(SHIPPED)


def recorded() -> dict:
    return json.loads((SHIPPED / "results.json").read_text())


def shipped_scores() -> dict:
    """Return the scores of the ablation and seed that are shipped."""
    results = recorded()
    published = results["published"]
    return results["seeds"][str(published["seed"])]["arms"][published["arm"]]["scores"]


DOCUMENTS = [
    "README.md",
    "hub_card/gkc-mini/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if PYTHON_BLOCK.search((ROOT / name).read_text())])
def test_documented_python_runs(document, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = {"folder": str(tmp_path / "published")}
    for block in PYTHON_BLOCK.findall((ROOT / document).read_text()):
        exec(block, names)
    if "image" in names:
        result = names["label_map"] if "label_map" in names else names["labels"]
        assert tuple(result.shape) == names["image"].size[::-1]
    if "segments" in names:
        assert {segment["label"] for segment in names["segments"]} == {"orange square", "cyan hoop"}
    if document == "docs/publishing.md":
        assert {"config.json", "hub_entry.py"} <= {path.name for path in (tmp_path / "published").iterdir()}


REMOTE_CODE = """
from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
assert type(model).__module__ == "modeling_gkc.modeling_gkc", type(model)
assert type(processor).__module__ == "modeling_gkc.processing_gkc", type(processor)
assert pipeline("image-segmentation", model=FOLDER, trust_remote_code=True)("examples/scene-1.png", subtask="semantic")
"""


def test_checkpoint_loads_with_trust_remote_code(tmp_path):
    """Without `import modeling_gkc`, transformers needs the entry for remote code in the folder."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = REMOTE_CODE.replace("FOLDER", repr(str(SHIPPED)))
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_remote_code_entry_is_up_to_date(tmp_path):
    for name in ("config.json", "processor_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    add_library_entry(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes(), path.name


def test_checkpoint_is_small_and_has_only_safetensors():
    files = {path.name: path.stat().st_size for path in SHIPPED.iterdir()}
    assert "model.safetensors" in files and not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert sum(files.values()) < MAX_BYTES


def test_model_card_and_page_contain_the_recorded_results():
    results = recorded()
    config = json.loads((SHIPPED / "config.json").read_text())
    assert (SHIPPED / "README.md").read_text() == card(results, config)
    seeds = {int(seed): values for seed, values in results["seeds"].items()}
    assert results["tables"] == tables(seeds)
    page = (ROOT / "docs" / "miniworld.md").read_text()
    assert all(f"<!-- table {name} -->\n{table}\n<!-- end -->" in page for name, table in results["tables"].items())


def test_scores_of_the_card_hold_on_new_images(model, processor):
    """On 100 images of another seed's world, the mIoU of each vocabulary is within 0.08 of the card's.

    `void` and `never`, three classes each evaluated alone, have too few regions in 100 images to be compared.
    """
    images = build_dataset("test", 100, seed=1234, show_progress=False)
    result = evaluate(model, processor, images, show_progress=False)
    expected = shipped_scores()
    for group in expected.keys() - {"void", "never"}:
        assert abs(result["scores"][group]["miou"] - expected[group]["miou"]) < 0.08, group


def test_text_losses_improve_classes_without_labels():
    """All ablations of a seed share the world, CLIP, warm-up and number of steps: only the losses differ."""
    seeds = recorded()["seeds"].values()
    assert len(seeds) >= 3
    for results in seeds:
        ablations = {ablation: scores["scores"] for ablation, scores in results["arms"].items()}
        assert set(MAIN_ABLATIONS) <= set(ablations) <= set(ABLATIONS)
        for group in ("colour", "fill", "sub", "all/novel"):
            assert ablations["both"][group]["miou"] > ablations["baseline"][group]["miou"], group


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (1, {"cyan hoop": (60, 20), "orange square": (90, 140), "blue stick": (220, 160), "sky": (130, 60)}),
        (2, {"red cross": (190, 240), "cyan square": (200, 80), "meadow": (150, 170)}),
        (3, {"purple square": (50, 70), "yellow star": (160, 60), "cyan hoop": (107, 112), "masonry": (20, 190)}),
    ],
)
def test_unlabeled_compositions_and_synonyms_are_found(model, processor, position, words):
    """Each word of `words` is predicted at its position (row, column) in pixels."""
    image = Image.open(EXAMPLES / f"scene-{position}.png")
    with torch.inference_mode():
        outputs = model(**processor(images=image, text="; ".join(words), return_tensors="pt"))
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    found = {word: list(words)[labels[place]] for word, place in words.items()}
    assert found == {word: word for word in words}


def test_demo_classifies_every_drawn_region_correctly(model, processor):
    """With the vocabulary of `make demo`, most pixels of each drawn region get the word that describes it."""
    words = re.search(r"^LABELS \?= (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    vocabulary, shown = Vocabulary.parse(words), set()
    encoded = model.get_class_embeddings(**processor(text=vocabulary, return_tensors="pt"))
    for number in (2, 10, 11):
        scene = draw_scene((0, EXAMPLES_SPLIT), number, 288)
        with torch.inference_mode():
            outputs = model(**processor(images=scene.image, return_tensors="pt"), **encoded)
        (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[scene.region_index.shape])
        for index, region in enumerate(scene.regions):
            found = vocabulary.labels[labels[torch.from_numpy(scene.region_index == index)].mode().values]
            *adjectives, noun = found.split()
            assert noun in WORDS[region["concept"]], (number, region, found)
            assert set(adjectives) <= {region["colour"], region["fill"]}, (number, region, found)
            shown.add(found)
    assert shown == set(vocabulary.labels)


def test_batch_results_equal_single_image_results(model, processor):
    images = [Image.open(EXAMPLES / f"scene-{index}.png") for index in (1, 2, 3)]
    images += [image.resize(size) for image, size in zip(images, [(150, 290), (300, 64), (65, 65)], strict=True)]
    sizes = [image.size[::-1] for image in images]
    words = processor(text="orange square; cyan hoop; lawn, grass; sky", return_tensors="pt")

    def results(first, last):
        inputs = processor(images=images[first:last], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs, **words)
        semantic, panoptic, instance = (
            getattr(processor, f"post_process_{task}_segmentation")(outputs, target_sizes=sizes[first:last])
            for task in ("semantic", "panoptic", "instance")
        )
        return list(zip(semantic, panoptic, instance, strict=True))

    batched = results(0, len(images))
    single = [results(index, index + 1)[0] for index in range(len(images))]
    for (semantic, *segmented), (expected, *segmented_alone) in zip(batched, single, strict=True):
        assert (semantic != expected).float().mean() <= 1e-4  # rounding may decide between two classes
        for found, expected in zip(segmented, segmented_alone, strict=True):
            assert (found["segmentation"] != expected["segmentation"]).float().mean() <= 1e-4
            for segment, other in zip(found["segments_info"], expected["segments_info"], strict=True):
                assert segment["score"] == pytest.approx(other["score"], abs=1e-5)
                assert segment["label_id"] == other["label_id"]


def test_example_images_are_reproducible(tmp_path):
    for path in draw_examples(tmp_path, [2, 10, 11]):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(EXAMPLES / path.name)))


def test_transformers_pipeline_uses_the_stored_vocabulary():
    results = pipeline("image-segmentation", model=str(SHIPPED))(str(EXAMPLES / "scene-3.png"), subtask="semantic")
    assert {"sky", "brick", "ring"} <= {result["label"] for result in results}


def test_command_line_finds_the_checkpoint_without_network(tmp_path, monkeypatch):
    monkeypatch.delenv("GKC_MODEL", raising=False)
    assert default_model_path() == SHIPPED
    command = [
        sys.executable,
        "-m",
        "modeling_gkc",
        "segment",
        str(EXAMPLES),
        "--labels",
        "red cross; lawn, grass; sky",
    ]
    # an unwritable home directory and no network
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HOME": "/nonexistent", "HF_HOME": str(tmp_path / "cache")}
    finished = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "out" / "scene-2.json").read_text())
    assert {"red cross", "lawn"} <= {segment["label"] for segment in result["segments"]}
