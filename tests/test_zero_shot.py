"""Tests of `GKCForZeroShotSegmentation`: parity with its segmenter, regions, batches, files and interfaces."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoModelForUniversalSegmentation, AutoProcessor, pipeline

from benchmarks import zero_shot as zero_shot_benchmark
from modeling_gkc import (
    GKCForZeroShotSegmentation,
    GKCImageProcessor,
    GKCPredictor,
    GKCSegmentationPipeline,
    GKCZeroShotConfig,
)
from modeling_gkc.checkpoint_loading import load_checkpoint_parts
from modeling_gkc.conversion import open_segmenter
from modeling_gkc.export import export_segmenter
from train.data import from_folder
from train.data.drawn_world import examples
from train.evaluate.command import main as evaluate

from .conftest import aligned, word_tokenizer
from .zero_shot_toys import CLASSES, SETTINGS, make_segmenter, make_tower

SEGMENTERS = ("mask2former", "maskformer", "oneformer", "eomt", "eomt_dinov3", "gkc")
TOWERS = ("clip", "metaclip_2", "siglip", "clip_resnet", "clip_convnext")
WORDS = "star; sofa, couch; lawn, grass"


def opened(segmenter: str = "mask2former", tower: str = "clip", words: str | None = None, **settings):
    image_text_model, text_model = make_tower(tower)
    tokenizer = word_tokenizer() if words is None else word_tokenizer(words)
    task = {"task_tokenizer": tokenizer} if segmenter == "oneformer" else {}
    return open_segmenter(
        make_segmenter(segmenter), image_text_model, tokenizer, SETTINGS, text_model=text_model, **task, **settings
    )


def photo(height: int = 50, width: int = 70, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def parts():
    return opened()


@pytest.mark.parametrize("kind", SEGMENTERS)
@torch.no_grad()
def test_source_names_give_the_results_of_the_segmenter(kind, within):
    """With the segmenter's own names, classes and masks are those of the segmenter alone."""
    model, processor = opened(kind, class_scores="segmenter")
    segmenter = make_segmenter(kind)
    inputs = processor(images=photo(), return_tensors="pt")
    outputs = model(**inputs)
    height, width = inputs["pixel_values"].shape[-2:]
    size = 96 if kind.startswith("eomt") else None
    padded = inputs["pixel_values"]
    if size is not None:
        content = inputs["pixel_mask"][0].any(dim=1).sum(), inputs["pixel_mask"][0].any(dim=0).sum()
        padded = padded[..., : content[0], : content[1]]
        padded = F.pad(padded, (0, size - content[1], 0, size - content[0]))
    task = {"task_inputs": torch.tensor([model.config.task_tokens])} if kind == "oneformer" else {}
    expected = segmenter(pixel_values=padded, **task)
    probabilities = expected.class_queries_logits.softmax(dim=-1)
    error = (outputs.class_queries_logits.softmax(dim=-1) - probabilities).abs().max()
    within(f"zero-shot {kind}: class probabilities, max abs", error, 1e-5)
    masks = expected.masks_queries_logits[..., : height // 4, : width // 4]
    within(f"zero-shot {kind}: mask logits, max abs", (outputs.masks_queries_logits - masks).abs().max(), 1e-4)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_region_scores_are_those_of_the_embeddings(kind, within):
    model, processor = opened(tower=kind, class_scores="regions")
    inputs = processor(images=photo(), text=["dog", "star", "lamp"], return_tensors="pt")
    outputs = model(**inputs)
    words = model.get_class_embeddings(inputs["input_ids"], inputs["attention_mask"])
    similarity = model.classifier.region_scale * outputs.query_embeds @ words.class_embeds.T
    segments = model.segment(inputs["pixel_values"][:, :, :64, :89])
    expected = similarity.log_softmax(dim=-1)[~segments.mask_is_empty]
    found = outputs.class_queries_logits[..., :-1].log_softmax(dim=-1)[~segments.mask_is_empty]
    assert len(found) > 0
    within(f"zero-shot {kind}: region scores, max abs", (found - expected).abs().max(), 2e-4)
    no_object = segments.last_hidden_state.softmax(dim=-1)[..., -1]
    within("zero-shot: no-object", (outputs.class_queries_logits[..., -1].exp() - no_object).abs().max(), 1e-6)


@torch.no_grad()
def test_both_is_the_weighted_mean_of_the_logarithms():
    inputs = opened()[1](images=photo(), text=WORDS, return_tensors="pt")
    scores = {}
    for name in ("segmenter", "regions", "both"):
        model, _ = opened(class_scores=name)
        if name == "both":
            model.classifier.region_weight = 0.3
        scores[name] = model(**inputs).class_queries_logits
    torch.testing.assert_close(scores["both"], 0.3 * scores["regions"] + 0.7 * scores["segmenter"])


@torch.no_grad()
def test_regions_without_pixels_are_classified_by_the_segmenter(parts):
    model, processor = copy.deepcopy(parts)
    inputs = processor(images=photo(), text=WORDS, return_tensors="pt")
    segment = model.segmenter.forward

    def without_masks(**arguments):
        outputs = segment(**arguments)
        outputs.masks_queries_logits[:, ::2] = -5
        return outputs

    model.segmenter.forward = without_masks
    found = model(**inputs)
    model.classifier.region_weight = 0.0
    alone = model(**inputs)
    assert torch.equal(found.class_queries_logits[:, ::2], alone.class_queries_logits[:, ::2])
    assert not torch.allclose(found.class_queries_logits[:, 1::2], alone.class_queries_logits[:, 1::2])


@pytest.mark.parametrize(("segmenter", "tower"), [("mask2former", "clip"), ("eomt", "siglip"), ("gkc", "clip_resnet")])
@torch.no_grad()
def test_results_do_not_depend_on_the_batch(segmenter, tower, within):
    model, processor = opened(segmenter, tower)
    images = [photo(50, 70), photo(70, 40, 1), photo(50, 70, 2)]
    batch = model(**processor(images=images, text=WORDS, return_tensors="pt"))
    maps = processor.post_process_semantic_segmentation(batch, target_sizes=[image.size[::-1] for image in images])
    for index, image in enumerate(images):
        alone = model(**processor(images=image, text=WORDS, return_tensors="pt"))
        for field in ("class_queries_logits", "query_embeds"):
            error = (batch[field][index] - alone[field][0]).abs().max()
            within(f"zero-shot {segmenter}, {field} of a batch, max abs", error, 2e-4)
        (single,) = processor.post_process_semantic_segmentation(alone, target_sizes=[image.size[::-1]])
        assert (single == maps[index]).float().mean() > 0.999


@pytest.mark.parametrize("tower", ["clip", "siglip", "clip_convnext"])
@torch.no_grad()
def test_saved_checkpoint_gives_equal_results(tower, tmp_path):
    model, processor = opened(tower=tower)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = processor(images=photo(), text=WORDS, return_tensors="pt")
    expected = model(**inputs)
    for loaded in (
        AutoModel.from_pretrained(tmp_path),
        AutoModelForUniversalSegmentation.from_pretrained(tmp_path),
        load_checkpoint_parts(tmp_path)[0],
    ):
        assert type(loaded) is GKCForZeroShotSegmentation and not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        prepared = AutoProcessor.from_pretrained(tmp_path)(images=photo(), text=WORDS, return_tensors="pt")
        found = aligned(loaded)(**prepared)
        for field in ("class_queries_logits", "masks_queries_logits", "query_embeds"):
            convert = torch.exp if field == "class_queries_logits" else torch.clone  # logits are logarithms
            torch.testing.assert_close(convert(found[field]), convert(expected[field]), rtol=0, atol=1e-5)
    assert loaded.vocabulary.labels == list(CLASSES)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_other_class_scores_can_be_chosen_while_loading(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    loaded = GKCForZeroShotSegmentation.from_pretrained(tmp_path, class_scores="segmenter")
    assert loaded.classifier.region_weight == 0 and parts[0].classifier.region_weight == 0.3
    with pytest.raises(ValueError, match="`class_scores` must be one of segmenter, regions, both, got 'head'"):
        GKCForZeroShotSegmentation.from_pretrained(tmp_path, class_scores="head")


def test_predictor_and_pipelines(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    predictor = GKCPredictor.from_pretrained(tmp_path)
    predictor.set_vocabulary(WORDS, void_labels="sky")
    for task in ("semantic", "instance", "panoptic"):
        assert predictor.predict(photo(), task=task).segmentation.shape == (50, 70)
    segmenter = pipeline("image-segmentation", model=str(tmp_path), pipeline_class=GKCSegmentationPipeline)
    found = segmenter(photo(), labels=WORDS, subtask="semantic")
    assert {segment["label"] for segment in found} <= {"star", "sofa", "lawn"} and found
    stock = pipeline("image-segmentation", model=str(tmp_path))
    assert {segment["label"] for segment in stock(photo(), subtask="semantic")} <= set(CLASSES)


def test_half_precision(parts):
    model, processor = parts
    model = copy.deepcopy(model).to(torch.bfloat16)
    outputs = model(**processor(images=photo(), text=WORDS, return_tensors="pt"))
    assert outputs.class_queries_logits.isfinite().all() and outputs.query_embeds.isfinite().all()


def test_cached_regions_cannot_be_classified_again(parts):
    model, processor = parts
    outputs = model(**processor(images=photo(), text=WORDS, return_tensors="pt"))
    words = processor(text="sky; dog", return_tensors="pt")
    with pytest.raises(ValueError, match="Embeddings of regions cannot be classified again"):
        model.classify(outputs.query_embeds, **model.get_class_embeddings(**words))
    alone, _ = opened(class_scores="segmenter")
    outputs = alone(**processor(images=photo(), text=WORDS, return_tensors="pt"))
    again = alone.classify(outputs.query_embeds, **alone.get_class_embeddings(**words))
    expected = alone(**processor(images=photo(), text="sky; dog", return_tensors="pt")).class_queries_logits
    torch.testing.assert_close(again.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-5)


def test_siglip_reads_texts_padded_to_its_full_length():
    model, processor = opened(tower="siglip")
    tower, _ = make_tower("siglip")
    tokens = processor(text=["dog", "red star"], return_tensors="pt")
    ids = F.pad(tokens["input_ids"], (0, 16 - tokens["input_ids"].shape[1]))
    expected = F.normalize(tower.get_text_features(ids).pooler_output, dim=-1)
    found = model.get_class_embeddings(tokens["input_ids"], tokens["attention_mask"]).class_embeds
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_model_is_not_trained(parts):
    with pytest.raises(ValueError, match="A zero-shot model is not trained"):
        parts[0].train()


def test_images_beyond_a_fixed_size_are_named():
    model, processor = opened("eomt")
    images = GKCImageProcessor(size={"shortest_edge": 128})(photo(), return_tensors="pt")
    with pytest.raises(ValueError, match="takes images of at most 96 x 96 pixels, got 128 x 179"):
        model(**images, **processor(text=WORDS, return_tensors="pt"))


@torch.no_grad()
def test_images_smaller_than_a_patch():
    model, processor = opened("eomt")
    tiny = GKCImageProcessor(do_resize=False)(photo(1, 3), return_tensors="pt")
    assert model(**tiny, **processor(text=WORDS, return_tensors="pt")).class_queries_logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmenter": "tower"}, "A 'clip' does not predict class logits and mask logits of queries: use a segmenter"),
        ({"tower": "segmenter"}, "A 'mask2former' cannot embed regions: use an image-text model of the types clip"),
        ({"class_names": "dog; star"}, "`class_names` has 2 classes, but the source has 5"),
        ({"tokenizer": word_tokenizer(" ".join(f"w{i}" for i in range(40)))}, "The tokenizer has 4. tokens, but"),
        ({"text_model": None, "tower": "resnet"}, "A 'clip_resnet' has no text encoder of its own"),
        ({"class_scores": "head"}, "`class_scores` must be one of"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    models = {"segmenter": make_segmenter("mask2former"), "tower": make_tower("clip")[0]}
    models["resnet"] = make_tower("clip_resnet")[0]
    arguments = {"segmenter": models["segmenter"], "tower": models["tower"], "tokenizer": word_tokenizer()}
    for name, value in change.items():
        arguments[name] = models.get(value, value) if isinstance(value, str) else value
    with pytest.raises(ValueError, match=message):
        open_segmenter(**arguments, segmenter_settings=SETTINGS)


def test_embeddings_of_different_widths_are_named():
    tower, text_model = make_tower("clip_resnet")
    tower.config.projection_dim = 24
    with pytest.raises(ValueError, match="embeds images in 24 and texts in 32 dimensions"):
        open_segmenter(make_segmenter("mask2former"), tower, word_tokenizer(), SETTINGS, text_model=text_model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"region_weight": 2.0}, "`region_weight` must be a number between 0 and 1"),
        ({"image_std": [0.0, 1.0, 1.0]}, "`image_std` must be a number"),
        ({"segmenter_config": {"model_type": "absent"}}, "`segmenter_config` has the unknown model_type 'absent'"),
        ({"tower_config": {"model_type": "clip_resnet"}}, "A 'clip_resnet' has no text encoder of its own"),
    ],
)
def test_invalid_configurations_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        GKCZeroShotConfig(**fields)


def test_evaluation_on_a_prepared_dataset(tmp_path):
    """A zero-shot model is evaluated as a GKC is, on custom data at the input size of its checkpoint."""
    words = "round square triangle grass sky heart valentine arrow pointer hexagon hex water sea sand beach"
    model, processor = opened(words=words, class_names="round; square; triangle; grass; sky")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    examples.main(["--out", str(tmp_path / "shapes"), "--masks", "12"])
    assert from_folder.main([str(tmp_path / "shapes"), "--out", str(tmp_path / "data")]) == 0
    arguments = ["--benchmark", "folder", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "result.json")]
    assert evaluate(["--model", str(tmp_path / "model"), *arguments, "--cpu"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["protocol"]["short_side"], result["protocol"]["long_side"]) == (64, 96)
    assert 0 <= result["scores"]["semantic"]["miou"] <= 1


def test_exports_and_training_name_the_way(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="A 'gkc_zero_shot' cannot be exported: convert its segmenter by"):
        export_segmenter(*parts, tmp_path / "graph")
    with pytest.raises(ValueError, match="has no setting `class_weight` and is not trained: train a student of it by"):
        load_checkpoint_parts(tmp_path / "model", class_weight=1.0)
    assert not (tmp_path / "graph").exists()


def test_copies_and_pickles_give_equal_results(parts):
    model, processor = parts
    inputs = processor(images=photo(), text=WORDS, return_tensors="pt")
    expected = model(**inputs).class_queries_logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**inputs).class_queries_logits, expected, rtol=1e-5, atol=1e-5)


def test_benchmark_of_the_regions_runs(capsys):
    threads = torch.get_num_threads()
    assert zero_shot_benchmark.main(["--preset", "toy", "--rounds", "2", "--classes", "5", "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    *_, cells = capsys.readouterr().out.strip().splitlines()
    alone, both, ratio = (float(cell) for cell in cells.strip("| ").split("|"))
    assert alone > 0 and both > 0 and ratio > 0


def test_segmenters_of_a_fixed_size_get_images_of_that_size():
    """A source that splits images into squares names only the shorter side; longer images would be too large."""
    tower, _ = make_tower("clip")
    settings = {"size": {"shortest_edge": 96, "longest_edge": None}, "do_split_image": True, "do_pad": False}
    model, processor = open_segmenter(make_segmenter("eomt"), tower, word_tokenizer(), settings)
    for image in (photo(48, 64), photo(1, 500), photo(200, 30)):
        outputs = model(**processor(images=image, text=WORDS, return_tensors="pt"))
        assert outputs.class_queries_logits.isfinite().all()


def test_settings_are_checked_while_loading(parts, tmp_path):
    parts[0].save_pretrained(tmp_path)
    for settings in ({"tower_image_size": 0}, {"tower_image_size": -5}, {"region_weight": 2.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            GKCForZeroShotSegmentation.from_pretrained(tmp_path, **settings)


def test_model_card_names_both_models(parts, tmp_path):
    GKCSegmentationPipeline(model=parts[0], processor=parts[1]).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "the masks are those of a mask2former" in card and "a clip compares each region" in card
    assert "ICCV 2023" not in card and "<<" not in card
