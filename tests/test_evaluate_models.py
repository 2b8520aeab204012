"""Tests of the evaluated models: GKC with test-time augmentation, and models of transformers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    ViTImageProcessor,
)

from modeling_gkc import mask_resampling
from modeling_gkc.post_processing import semantic_scores, semantic_segmentation
from modeling_gkc.vocabulary import Vocabulary
from train.data.benchmarks.protocol import Protocol
from train.data.drawn_world.world import draw_scene
from train.data.prepared import load_prepared
from train.data.schema import read_row, semantic_map
from train.evaluate.adapters import CLIPSegSegmenter, LabeledSegmenter, match_labels
from train.evaluate.command import main
from train.evaluate.result import read_result
from train.evaluate.segmenter import GKCSegmenter, View, tta_views
from train.evaluate.vocabulary import BenchmarkVocabulary
from train.metrics import SemanticMetric

from .conftest import word_tokenizer
from .test_evaluate import SHIPPED, row, write_prepared

CLASSES = Vocabulary([["disc"], ["box", "square"], ["lawn", "grass"], ["sky"]], is_thing=[True, True, False, False])
LABELS = {0: "Grass", 1: "sky-", 2: "disc", 3: "whale"}


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


SCENE_CLASSES = Vocabulary([[name] for name in ("circle", "square", "star", "grass", "sky", "brick", "wood", "water")])


def scene(height: int, width: int, index: int = 0) -> np.ndarray:
    """Return a crop of a drawn scene."""
    return draw_scene((5, 7), index, 192).image[:height, :width]


@pytest.fixture(scope="module")
def gkc():
    return AutoModel.from_pretrained(SHIPPED).eval(), AutoProcessor.from_pretrained(SHIPPED)


def segmenter_of(gkc, *views: View) -> GKCSegmenter:
    return GKCSegmenter(
        *gkc, BenchmarkVocabulary.from_protocol(SCENE_CLASSES, Protocol()), 96, 192, views=views or (View(),)
    )


def test_semantic_maps_match_the_processor(gkc):
    model, processor = gkc
    pictures, sizes = [scene(150, 170), scene(164, 140, 1)], [(150, 170), (164, 140)]
    segmenter = segmenter_of(gkc)
    with torch.inference_mode():
        found = segmenter.forward(segmenter.prepare(pictures))
        words = processor(text=SCENE_CLASSES, return_tensors="pt")
        inputs = processor(images=pictures, return_tensors="pt")
        expected = processor.post_process_semantic_segmentation(model(**inputs, **words), target_sizes=sizes)
    for index, size in enumerate(sizes):
        assert len(expected[index].unique()) > 2
        np.testing.assert_array_equal(segmenter.semantic(found, index, size), expected[index].numpy())


def test_augmentation_sums_the_scores_of_all_views(gkc, within):
    """Compare row tiles of ten outputs with ten whole score maps."""
    views, size = tta_views(), (150, 170)
    assert len(views) == 10 and sum(view.flip for view in views) == 5
    segmenter, plain = segmenter_of(gkc, *views), segmenter_of(gkc)
    with torch.inference_mode():
        outputs = segmenter.forward(segmenter.prepare([scene(*size)]))
        total = torch.zeros(len(SCENE_CLASSES), *size)
        for output, view in zip(outputs, views, strict=True):
            content = tuple(output.content_sizes[0].tolist())
            scores = semantic_scores(output.class_queries_logits[0], output.masks_queries_logits[0], content, size)
            total += scores.flip(-1) if view.flip else scores
        found = segmenter.semantic(outputs, 0, size)
        alone = plain.semantic(plain.forward(plain.prepare([scene(*size)])), 0, size)
    within("pixels where tiles and whole maps disagree (TTA)", np.mean(found != total.argmax(0).numpy()), 1e-4)
    assert len({tuple(output.content_sizes[0].tolist()) for output in outputs}) == 5
    assert 0.001 < np.mean(found != alone) < 0.2  # the other views have an effect
    assert segmenter.provided == ("classes",)


def test_tta_is_independent_of_row_tiles(gkc, monkeypatch):
    segmenter, size = segmenter_of(gkc, View(), View(0.5, True)), (150, 170)
    with torch.inference_mode():
        outputs = segmenter.forward(segmenter.prepare([scene(*size)]))
        whole = segmenter.semantic(outputs, 0, size)
        monkeypatch.setattr(mask_resampling, "TILE_BYTES", 4 * 170 * 60 * 7)
        tiled = segmenter.semantic(outputs, 0, size)
    np.testing.assert_array_equal(tiled, whole)


def test_flipped_view_is_flipped_back(gkc, within):
    size = (192, 192)
    plain, mirrored = segmenter_of(gkc), segmenter_of(gkc, View(flip=True), View(flip=True))
    picture = scene(*size)
    with torch.inference_mode():
        expected = plain.semantic(plain.forward(plain.prepare([np.ascontiguousarray(picture[:, ::-1])])), 0, size)
        found = mirrored.semantic(mirrored.forward(mirrored.prepare([picture])), 0, size)
    within("pixels of a mirrored view that are not mirrored back", np.mean(found != expected[:, ::-1]), 1e-3)
    assert np.mean(found != expected) > 0.1


def test_order_of_sigmoid_and_resampling_barely_matters(gkc, within):
    """Compare one resampling of the mask logits with two resamplings, of masks and of score maps."""
    segmenter, size, differing = segmenter_of(gkc), (192, 192), []
    for index in range(8):
        with torch.inference_mode():
            (output,) = segmenter.forward(segmenter.prepare([scene(*size, index)]))
            classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
            once, _ = semantic_segmentation(classes, masks, (96, 96), size)
            at_input = F.interpolate(masks[None], size=(96, 96), mode="bilinear", align_corners=False).sigmoid()
            scores = torch.einsum("qk,bqhw->bkhw", classes.softmax(-1)[:, :-1], at_input)
            twice = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        differing.append((once != twice).float().mean().item())
    assert max(differing) > 0
    within("share of pixels that the place of the sigmoid decides", np.mean(differing), 0.01)


def test_labels_are_matched_by_name():
    class_of, notes = match_labels(LABELS, CLASSES)
    assert class_of.tolist() == [2, 3, 0, -1]
    assert notes["labels_without_class"] == ["whale"] and notes["classes_without_label"] == ["box"]
    with pytest.raises(ValueError, match="None of its labels"):
        match_labels({0: "LABEL_0", 1: "LABEL_1"}, CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepare a benchmark of five images of two sizes."""
    rows = []
    for index in range(5):
        height, width = (40, 56) if index % 2 else (48, 40)
        ids = np.random.default_rng(index).integers(0, 4, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1)
        rows.append(row(f"scene-{index}", image(height, width, index), ids, [0, 2, 3]))
    return write_prepared(tmp_path_factory.mktemp("other") / "data", "miniworld", CLASSES, rows)


def evaluated(model, data, tmp_path, *options) -> dict:
    out = tmp_path / "result.json"
    given = ["--model", model, "--benchmark", "miniworld", "--data", data, "--out", out, "--cpu", *options]
    assert main(list(map(str, given))) == 0
    return read_result(out)


def scores_by_hand(data, predict) -> dict:
    metric, found = SemanticMetric(len(CLASSES)), set()
    class_of = np.array([2, 3, 0, -1])
    for sample in load_prepared(data, "val").dataset:
        pixels, ids = read_row(sample)
        labels = predict(pixels)
        found.update(np.unique(labels).tolist())
        metric.update(class_of[labels], semantic_map(sample, ids))
    assert len(found) > 1
    return metric.compute()


@torch.inference_mode()
def test_segformer(data, tmp_path):
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label=LABELS,
    )
    torch.manual_seed(3)
    model = SegformerForSemanticSegmentation(config).eval()
    processor = SegformerImageProcessor(size={"height": 64, "width": 64})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = evaluated(tmp_path / "model", data, tmp_path, "--tasks", "semantic", "--batch-size", "2")

    def predict(pixels):
        logits = model(**processor(images=Image.fromarray(pixels), return_tensors="pt")).logits
        return F.interpolate(logits, size=pixels.shape[:2], mode="bilinear", align_corners=False)[0].argmax(0).numpy()

    assert result["scores"]["semantic"]["miou"] == scores_by_hand(data, predict)["miou"]
    assert result["model"]["notes"]["labels_without_class"] == ["whale"]
    assert result["model"]["notes"]["architecture"] == "segformer"


@torch.inference_mode()
def test_mask2former(data, tmp_path):
    config = Mask2FormerConfig(
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=32,
        num_queries=8,
        id2label=LABELS,
    )
    torch.manual_seed(3)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # otherwise all queries of an untrained model predict the same
        model.class_predictor.weight *= 100
        model.model.transformer_module.queries_features.weight.normal_(std=5)
        model.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0].weight *= 100
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = evaluated(tmp_path / "model", data, tmp_path, "--tasks", "semantic", "panoptic", "instance")

    def predict(pixels):
        outputs = model(**processor(images=Image.fromarray(pixels), return_tensors="pt"))
        masks = F.interpolate(
            outputs.masks_queries_logits, size=pixels.shape[:2], mode="bilinear", align_corners=False
        )
        classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid())[0].argmax(0).numpy()

    expected = scores_by_hand(data, predict)["miou"]
    assert result["scores"]["semantic"]["miou"] == pytest.approx(expected, abs=1e-3)
    assert set(result["scores"]) == {"semantic", "panoptic", "instance"}


@torch.inference_mode()
def test_eomt_with_image_patches(data, tmp_path):
    config = EomtConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_queries=6,
        num_blocks=2,
        num_upscale_blocks=1,
        id2label=LABELS,
    )
    torch.manual_seed(3)
    model = EomtForUniversalSegmentation(config).eval()
    with torch.no_grad():  # otherwise all queries of an untrained model predict the same
        model.query.weight.normal_(std=5)
        model.class_predictor.weight *= 100
    processor = EomtImageProcessor(size={"shortest_edge": 32, "longest_edge": None}, do_split_image=True)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = evaluated(tmp_path / "model", data, tmp_path, "--tasks", "semantic", "--batch-size", "3")

    def predict(pixels):
        inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
        assert len(inputs["pixel_values"]) == 2
        return processor.post_process_semantic_segmentation(model(**inputs), [pixels.shape[:2]])[0].numpy()

    assert result["scores"]["semantic"]["miou"] == scores_by_hand(data, predict)["miou"]


@torch.inference_mode()
def test_clipseg(data, tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = CLIPSegConfig(
        text_config=vision | {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 1},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    torch.manual_seed(3)
    model = CLIPSegForImageSegmentation(config).eval()
    processor = CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), word_tokenizer())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = evaluated(tmp_path / "model", data, tmp_path, "--tasks", "semantic")
    segmenter = CLIPSegSegmenter(
        str(tmp_path / "model"), BenchmarkVocabulary.from_protocol(CLASSES, Protocol(), "synonyms")
    )
    assert segmenter.class_of.tolist() == [0, 1, 1, 2, 2, 3]

    metric = SemanticMetric(len(CLASSES))
    for sample in load_prepared(data, "val").dataset:
        pixels, ids = read_row(sample)
        inputs = processor(
            text=CLASSES.labels, images=[Image.fromarray(pixels)] * len(CLASSES), padding=True, return_tensors="pt"
        )
        logits = model(**inputs).logits[None]
        full = F.interpolate(logits, size=ids.shape, mode="bilinear", align_corners=False)[0]
        assert len(full.argmax(0).unique()) > 1
        metric.update(full.argmax(0).numpy(), semantic_map(sample, ids))
    assert result["scores"]["semantic"]["miou"] == pytest.approx(metric.compute()["miou"], abs=1e-3)
    assert result["model"]["notes"]["architecture"] == "clipseg"


def test_unsupported_architecture_raises(data, tmp_path, capsys):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    given = ["--benchmark", "miniworld", "--data", data, "--out", tmp_path / "result.json", "--cpu"]
    assert main(list(map(str, ["--model", tmp_path / "bert", *given]))) == 2
    assert "is a bert, which is not a supported segmentation model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a supported segmentation model"):
        LabeledSegmenter(str(tmp_path / "bert"), CLASSES)
