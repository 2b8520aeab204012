"""A saved folder works in transformers' own doors: Auto classes and the stock pipeline, on the stored vocabulary."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary

from .conftest import small_config, word_tokenizer

WORDS = "red disc; blue square, box; lawn, grass"


@pytest.fixture(scope="module")
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor) -> Path:
    """A checkpoint with stored words whose random weights find something."""
    torch.manual_seed(0)
    model = GKCForOpenVocabSegmentation(small_config()).eval()
    with torch.no_grad():
        model.no_object_embedding.copy_(-model.class_embedder.stage_projections[-1].weight.mean(dim=1))
    model.set_vocabulary(WORDS, processor)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))


def test_stored_vocabulary_is_the_words(folder, processor, image):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "red disc", 1: "blue square", 2: "lawn"}
    assert model.config.label2id == {"red disc": 0, "blue square": 1, "lawn": 2}
    assert model.config.vocabulary == [["red disc"], ["blue square", "box"], ["lawn", "grass"]]
    with torch.no_grad():
        stored = model(**processor(images=image, return_tensors="pt"))
        asked = model(**processor(images=image, text=WORDS, return_tensors="pt"))
    torch.testing.assert_close(stored.class_queries_logits, asked.class_queries_logits, rtol=0, atol=1e-6)


def test_vocabulary_can_be_replaced_and_saved_again(folder, processor, tmp_path):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder)
    model.set_vocabulary(Vocabulary([["star"], ["sky", "air"]], is_thing=[True, False]), processor)
    model.save_pretrained(tmp_path)
    loaded = GKCForOpenVocabSegmentation.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 2 and loaded.config.vocabulary_is_thing == [True, False]
    torch.testing.assert_close(loaded.vocabulary_embeds, model.vocabulary_embeds, rtol=0, atol=0)
    assert loaded.vocabulary_class_ids.tolist() == [0, 1, 1]


def test_auto_processors(folder, image):
    assert isinstance(AutoImageProcessor.from_pretrained(folder), GKCImageProcessor)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, GKCProcessor)
    inputs = processor(images=image, text=WORDS, return_tensors="pt")
    assert inputs["class_ids"].tolist() == [0, 1, 1, 2, 2]
    assert inputs["pixel_values"].shape == (1, 3, 64, 96)


@pytest.mark.parametrize("subtask", ["semantic", "panoptic", "instance", None])
def test_stock_pipeline(folder, image, subtask):
    segmenter = pipeline("image-segmentation", model=str(folder))
    results = segmenter(image, subtask=subtask, threshold=0.0, overlap_mask_area_threshold=0.0)
    assert results
    for result in results:
        assert result["label"] in ("red disc", "blue square", "lawn")
        assert result["mask"].size == image.size


def test_stock_pipeline_prints_no_warning_and_no_error(folder, image, tmp_path):
    """In a fresh interpreter, as a user sees it: nothing on standard error but progress bars, nothing logged."""
    image.save(tmp_path / "image.png")
    code = (
        "import modeling_gkc; from transformers import pipeline; "
        f"print(pipeline('image-segmentation', model={str(folder)!r})({str(tmp_path / 'image.png')!r}) is not None)"
    )
    root = Path(__file__).parent.parent
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "True"
    lines = finished.stderr.replace("\r", "\n").splitlines()
    assert [line for line in lines if line and "Loading weights" not in line] == []


def test_loading_logs_nothing(folder, transformers_log):
    with transformers_log.at_level(logging.WARNING):
        logging.getLogger("transformers").warning("heard")
        pipeline("image-segmentation", model=str(folder))
        AutoProcessor.from_pretrained(folder)
    assert {record.getMessage() for record in transformers_log.records} == {"heard"}
