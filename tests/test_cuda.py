"""Tests that the library on a GPU gives the results of the CPU: command, pipeline and training.

These tests need a GPU and `GKC_TEST_CUDA=1`; the rest of the suite hides the GPU. Convolutions and matrix products use
full single precision (no TF32), so that both devices can be compared.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from configuration import Recipe
from modeling_gkc import GKCForOpenVocabSegmentation, GKCProcessor, GKCSegmentationPipeline
from modeling_gkc.cli.common import default_model_path
from modeling_gkc.cli.main import main
from modeling_gkc.loss_gkc import _PointDraws
from train.engine.trainer import GKCTrainer
from train.teacher.region_teacher import OnlineTeacher, RegionTeacher

from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor, toy_vision_model

DEVICE = "cuda"
WORDS = "red cross; orange square; cyan hoop; lawn, meadow; masonry; sky"
RECIPE = Recipe().replace(steps=2, batch_size=4, crop_size=64, learning_rate=3e-4, train_num_points=64)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: GKC_TEST_CUDA=1 on a machine that has one"
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def same_points(monkeypatch):
    """Sample the points of the mask losses on the CPU, because the generators of the two devices differ."""

    class DrawsOnCPU(_PointDraws):
        def __init__(self, num_images, seeds, device):
            super().__init__(num_images, seeds, torch.device("cpu"))
            self.target = device

        def __call__(self, counts, num_points):
            return super().__call__(counts, num_points).to(self.target)

    monkeypatch.setattr("modeling_gkc.loss_gkc._PointDraws", DrawsOnCPU)


@pytest.fixture(scope="module")
def processor() -> GKCProcessor:
    return GKCProcessor.from_pretrained(default_model_path())


def shipped(device: str, dtype: torch.dtype = torch.float32) -> GKCForOpenVocabSegmentation:
    return GKCForOpenVocabSegmentation.from_pretrained(default_model_path(), dtype=dtype).to(device).eval()


def scenes(count: int = 3) -> list[Image.Image]:
    folder = default_model_path().parent.parent / "examples"
    return [Image.open(folder / f"scene-{number}.png").convert("RGB") for number in range(1, count + 1)]


@torch.no_grad()
def outputs_on(device: str, processor: GKCProcessor, images, dtype: torch.dtype = torch.float32):
    model = shipped(device, dtype)
    inputs = processor(images=images, text=WORDS, return_tensors="pt").to(device)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return model(**inputs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference relative to that of the expected values."""
    return ((found.cpu().float() - expected.cpu().float()).norm() / expected.cpu().float().norm()).item()


def test_gpu_logits_match_cpu(processor, within):
    images = scenes()
    found, expected = (outputs_on(device, processor, images) for device in (DEVICE, "cpu"))
    within(
        "CUDA against CPU: masks, relative", relative(found.masks_queries_logits, expected.masks_queries_logits), 1e-3
    )
    within(
        "CUDA against CPU: class logits, relative",
        relative(found.class_queries_logits, expected.class_queries_logits),
        1e-3,
    )


def test_batch_matches_single_images_on_gpu(processor, within):
    small = scenes(1)[0].resize((160, 224))
    alone, together = (outputs_on(DEVICE, processor, images) for images in ([small], [small, *scenes()]))
    height, width = alone.masks_queries_logits.shape[-2:]
    masks = together.masks_queries_logits[:1, :, :height, :width]
    within("CUDA, alone against in a batch: masks, relative", relative(masks, alone.masks_queries_logits), 1e-3)


def test_half_precision_is_close_to_single(processor):
    """Most pixels of the label map keep their class in bf16."""
    images = scenes()
    sizes = [(image.height, image.width) for image in images]
    maps = [
        processor.post_process_semantic_segmentation(outputs_on(DEVICE, processor, images, dtype), target_sizes=sizes)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for single, half in zip(*maps, strict=True):
        assert (single == half).float().mean() > 0.97


def test_pipeline_with_labels_at_call_time_uses_the_gpu(processor):
    segmenter = pipeline("image-segmentation", model=str(default_model_path()), pipeline_class=GKCSegmentationPipeline)
    assert segmenter.device.type == DEVICE
    on_cpu = GKCSegmentationPipeline(model=shipped("cpu"), processor=processor, device="cpu")
    for subtask in ("semantic", "panoptic", "instance"):
        options = {"labels": WORDS, "subtask": subtask}
        found, expected = (each(scenes(1)[0], **options) for each in (segmenter, on_cpu))
        assert [segment["label"] for segment in found] == [segment["label"] for segment in expected]
        for one, other in zip(found, expected, strict=True):
            assert (np.asarray(one["mask"]) == np.asarray(other["mask"])).mean() > 0.999


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_command_output_on_gpu_matches_cpu(task, tmp_path):
    scenes(1)[0].save(tmp_path / "scene.png")
    maps = []
    for device in (DEVICE, "cpu"):
        command = ["segment", str(tmp_path / "scene.png"), "--labels", WORDS, "--task", task, "--device", device]
        assert main([*command, "--out", str(tmp_path / device)]) == 0
        maps.append(np.asarray(Image.open(tmp_path / device / "scene.labels.png")))
    assert (maps[0] == maps[1]).mean() > 0.999


def test_text_embeddings_follow_weight_updates(processor):
    """The cache of text embeddings on a GPU is invalidated by an optimizer step on the text encoder."""
    model = shipped(DEVICE)
    words = processor(text=WORDS, return_tensors="pt").to(DEVICE)
    before = model.get_class_embeddings(**words).class_embeds
    with torch.no_grad():
        for parameter in model.text_model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(before, model.get_class_embeddings(**words).class_embeds)


def test_forward_can_be_captured_in_a_cuda_graph(processor, within):
    model = shipped(DEVICE)
    with torch.no_grad():
        cached = model.get_class_embeddings(**processor(text=WORDS, return_tensors="pt").to(DEVICE))
        pixels = processor(images=scenes(1), return_tensors="pt")["pixel_values"].to(DEVICE)
        expected = model(pixels, **cached)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(pixels, **cached)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(pixels, **cached)
        graph.replay()
        torch.cuda.synchronize()
    masks = relative(captured.masks_queries_logits, expected.masks_queries_logits)
    within("CUDA graph against eager: masks, relative", masks, 1e-5)


MODES = {
    "sampled synonyms, cached teacher": {"synonym_mode": "sample", "region_dropout": 0.3},
    "averaged synonyms, online teacher": {"synonym_mode": "average", "teacher": "online"},
    "grounding": {"synonym_mode": "sample", "grounding_weight": 10.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_training_steps_on_gpu_match_cpu(mode, tmp_path, within, same_points):
    losses = []
    for device in (DEVICE, "cpu"):
        recipe = RECIPE.replace(**MODES[mode])
        settings = {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": device == "cpu"}
        dataset = toy_dataset(4).add_column("nouns", [["disc", "lawn"], ["square"], ["box"], []])
        teacher = RegionTeacher(toy_vision_model())
        if recipe.teacher.source == "online":
            teaching = {"online_teacher": OnlineTeacher(teacher)}
        else:
            teaching = {"teacher_embeddings": teacher.embed_dataset(dataset, progress=False)}
        trainer = GKCTrainer(
            toy_model(hidden_size=64, mask_feature_size=64, encoder_layers=1, decoder_layers=2),
            recipe,
            recipe.to_training_arguments(tmp_path / device, report_to=[], **settings),
            dataset,
            VOCABULARY,
            toy_processor(),
            **teaching,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert len(losses[-1]) == RECIPE.optimizer.steps
    errors = [abs(one - other) / other for one, other in zip(*losses, strict=True)]
    within(f"CUDA against CPU: loss of two training steps, {mode}, relative", max(errors), 1e-2)
