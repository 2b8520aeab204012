"""Tests of checkpoints in the Auto classes and pipelines of transformers, and of `GKCSegmentationPipeline`."""

import base64
import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines.pt_utils import KeyDataset

from modeling_gkc import (
    GKCForOpenVocabSegmentation,
    GKCImageProcessor,
    GKCModel,
    GKCProcessor,
    GKCSegmentationPipeline,
    Vocabulary,
)
from modeling_gkc.post_processing import semantic_scores

from .conftest import small_config, word_tokenizer
from .processes import without_third_party_lines

WORDS = "red disc; blue square, box; lawn, grass"
OTHER_WORDS = "dog; sofa, couch; lamp; sky"
ALL_SEGMENTS = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor) -> Path:
    """Write a checkpoint with a vocabulary whose random weights find segments of several classes."""
    torch.manual_seed(0)
    model = GKCForOpenVocabSegmentation(small_config()).eval()
    classifier, projection = model.classifier, model.classifier.stage_projections[-1]
    with torch.no_grad():
        queries = model.model(processor(images=noise(80, 120), return_tensors="pt")["pixel_values"]).last_hidden_state
        # The mean over queries is subtracted; otherwise all queries would predict one class.
        projection.bias.copy_(-projection.weight @ classifier.dense(queries).relu().mean(dim=(0, 1)))
        classifier.no_object_embedding.copy_(-projection.weight.mean(dim=1))
    model.set_vocabulary(WORDS, processor)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image() -> Image.Image:
    return noise(80, 120)


def test_stored_vocabulary_is_the_default(folder, processor, image):
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


def test_stock_pipeline_prints_no_warnings(folder, image, tmp_path):
    """Check in a new interpreter that stderr contains progress bars only and nothing is logged."""
    image.save(tmp_path / "image.png")
    code = (
        "import modeling_gkc; from transformers import pipeline; "
        f"print(pipeline('image-segmentation', model={str(folder)!r})({str(tmp_path / 'image.png')!r}) is not None)"
    )
    root = Path(__file__).parent.parent
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "True"
    lines = without_third_party_lines(finished.stderr.replace("\r", "\n"))
    assert [line for line in lines if line and "Loading weights" not in line] == []


def test_loading_logs_nothing(folder, transformers_log):
    with transformers_log.at_level(logging.WARNING):
        logging.getLogger("transformers").warning("heard")
        pipeline("image-segmentation", model=str(folder))
        AutoProcessor.from_pretrained(folder)
    assert {record.getMessage() for record in transformers_log.records} == {"heard"}


# GKCSegmentationPipeline


@pytest.fixture(scope="module")
def segmenter(folder) -> GKCSegmentationPipeline:
    return pipeline("image-segmentation", model=str(folder), pipeline_class=GKCSegmentationPipeline)


def pixels(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask)


def assert_same(results: list[dict], expected: list[dict], within, bound: float = 0.0) -> None:
    """Check that segments are equal and scores differ by at most the bound."""
    assert [result["label"] for result in results] == [result["label"] for result in expected]
    for result, other in zip(results, expected, strict=True):
        assert result["mask"].mode == "L"
        np.testing.assert_array_equal(pixels(result["mask"]), pixels(other["mask"]))
        kind = "pipeline: scores by another way or batch" if bound else "pipeline: scores by the same computation"
        within(kind, abs(result["score"] - other["score"]), bound)


@pytest.mark.parametrize("subtask", ["panoptic", "instance", None])
def test_results_match_the_stock_pipeline(folder, segmenter, image, subtask, within):
    settings = ALL_SEGMENTS | {"mask_threshold": 0.4, "subtask": subtask}
    expected = pipeline("image-segmentation", model=str(folder))(image, **settings)
    assert len(expected) > 1
    assert_same(segmenter(image, **settings), expected, within)


def test_semantic_results_match_the_stock_pipeline_and_have_scores(folder, segmenter, processor, image, within):
    expected = pipeline("image-segmentation", model=str(folder))(image, subtask="semantic")
    with torch.no_grad():
        outputs = segmenter.model(**processor(images=image, return_tensors="pt"))
    scores = semantic_scores(
        outputs.class_queries_logits[0], outputs.masks_queries_logits[0], outputs.content_sizes[0].tolist(), (80, 120)
    )
    for result in expected:
        inside = torch.from_numpy(pixels(result["mask"]) > 0)
        class_scores = scores[segmenter.model.config.label2id[result["label"]]]
        result["score"] = float(class_scores[inside].clamp(max=1).double().mean())
    results = segmenter(image, subtask="semantic")
    assert_same(results, expected, within, 1e-5)
    assert len(results) > 1 and sum((pixels(result["mask"]) > 0).sum() for result in results) == 80 * 120


@pytest.mark.parametrize("labels", [OTHER_WORDS, ["dog", ["sofa", "couch"], "lamp", "sky"], "file"])
def test_labels_of_a_call(segmenter, processor, image, tmp_path, labels):
    if labels == "file":
        labels = tmp_path / "words.txt"
        labels.write_text("dog\nsofa, couch\nlamp\nsky\n")
    with torch.no_grad():
        outputs = segmenter.model(**processor(images=image, text=OTHER_WORDS, return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 120)])
    found = np.full((80, 120), -1)
    for result in segmenter(image, labels=labels, subtask="semantic"):
        found[pixels(result["mask"]) == 255] = ["dog", "sofa", "lamp", "sky"].index(result["label"])
    np.testing.assert_array_equal(found, expected.numpy())


def test_packaged_vocabulary(segmenter, image):
    with pytest.warns(UserWarning, match="does not know these words"):
        results = segmenter(image, labels="pascal_voc_20", subtask="semantic")
    assert {result["label"] for result in results} <= set(Vocabulary.parse("pascal_voc_20").labels)


def encoded(image: Image.Image, file_format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["path", "name", "bytes", "url", "array", "float array", "tensor", "rotated", "tuple", "file", "memory", "files"],
)
def test_all_image_types(segmenter, image, tmp_path, kind, within):
    image.save(tmp_path / "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise

    def written() -> io.BytesIO:
        """As `save` leaves it: at its end."""
        file = io.BytesIO()
        image.save(file, "PNG")
        return file

    given = {
        "path": lambda: tmp_path / "image.png",
        "name": lambda: str(tmp_path / "image.png"),
        "bytes": lambda: encoded(image),
        "url": lambda: "data:image/png;base64," + base64.b64encode(encoded(image)).decode(),
        "array": lambda: np.asarray(image),
        "float array": lambda: np.asarray(image) / 255,
        "tensor": lambda: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "rotated": lambda: encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif),
        "tuple": lambda: (image,),
        "file": lambda: (tmp_path / "image.png").open("rb"),
        "memory": written,
        "files": lambda: [io.BytesIO(encoded(image))],
    }[kind]()
    results = segmenter(given, **ALL_SEGMENTS)
    expected = segmenter(image, **ALL_SEGMENTS)
    assert_same(results[0] if kind in ("tuple", "files") else results, expected, within)


def test_file_in_text_mode_raises(segmenter, tmp_path):
    (tmp_path / "image.txt").write_text("x")
    with (tmp_path / "image.txt").open() as file, pytest.raises(ValueError, match=r"image\.txt: open .* binary mode"):
        segmenter(file)


def test_images_as_keyword_argument(segmenter, image, within):
    assert_same(segmenter(images=image, **ALL_SEGMENTS), segmenter(image, **ALL_SEGMENTS), within)
    for arguments, settings in (((), {}), ((image,), {"images": image})):
        with pytest.raises(TypeError, match="as `inputs` or as `images`"):
            segmenter(*arguments, **settings)


def test_timeout_of_a_url(segmenter, image, monkeypatch, within):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, timeout))
        return io.BytesIO(encoded(image.convert("RGBA")))

    monkeypatch.setattr("modeling_gkc.image_processing_gkc.urlopen", urlopen)
    for options in ({"timeout": 3.0}, {}):
        results = segmenter("https://example.org/image.png", **options, **ALL_SEGMENTS)
        assert_same(results, segmenter(image, **ALL_SEGMENTS), within)
    assert asked == [("https://example.org/image.png", 3.0), ("https://example.org/image.png", 30)]


def test_arrays_keep_their_range_without_rescaling(folder, processor, image, within):
    settings = {"size": {"height": 64, "width": 96}}
    plain = GKCProcessor(GKCImageProcessor(**settings), processor.tokenizer)
    unscaled = GKCProcessor(GKCImageProcessor(do_rescale=False, **settings), processor.tokenizer)
    model = GKCForOpenVocabSegmentation.from_pretrained(folder)
    values = np.asarray(image) / 255
    expected = GKCSegmentationPipeline(model=model, processor=plain)(values, **ALL_SEGMENTS)
    results = GKCSegmentationPipeline(model=model, processor=unscaled)(values, **ALL_SEGMENTS)
    assert_same(results, expected, within, 1e-5)


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
def test_results_are_independent_of_the_batch(folder, subtask, within):
    """Check in fp64, since rounding in fp32 may change pixels whose two best classes have almost equal scores."""
    segmenter = pipeline(
        "image-segmentation", model=str(folder), pipeline_class=GKCSegmentationPipeline, dtype=torch.float64
    )
    images = [noise(80, 120), noise(33, 200, 1), noise(120, 80, 2), noise(80, 120, 3), noise(1, 1, 4)]
    settings = {"labels": OTHER_WORDS, "subtask": subtask, "threshold": 0.0}
    alone = [segmenter(image, **settings) for image in images]
    assert any(alone)
    for batch_size in (1, 2, 5):
        for results, expected in zip(segmenter(images, batch_size=batch_size, **settings), alone, strict=True):
            assert_same(results, expected, within, 1e-6)


@pytest.mark.parametrize("kind", ["generator", "iterator", "dataset", "array"])
def test_all_collections_of_images(segmenter, kind, within):
    images = [noise(48, 64, seed) for seed in range(3)]
    stream = {
        "generator": lambda: (image for image in images),
        "iterator": lambda: iter(images),
        "dataset": lambda: KeyDataset([{"image": image} for image in images], "image"),
        "array": lambda: np.stack([np.asarray(image) for image in images]),
    }[kind]()
    results = segmenter(stream, batch_size=2, **ALL_SEGMENTS)
    assert isinstance(results, list) == (kind == "array")
    for result, image in zip(results, images, strict=True):
        assert_same(result, segmenter(image, **ALL_SEGMENTS), within, 1e-5)


def test_empty_list_gives_empty_list(segmenter):
    assert segmenter([], labels=OTHER_WORDS) == []


def test_iterator_is_read_lazily(segmenter):
    seen = []
    stream = segmenter((seen.append(seed) or noise(32, 32, seed) for seed in range(9)), subtask="semantic")
    next(iter(stream))
    assert len(seen) <= 2


def test_labels_are_encoded_once(folder, processor, monkeypatch):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder)
    segmenter = GKCSegmentationPipeline(model=model, processor=processor)
    encoded_prompts = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded_prompts.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    images = [noise(32, 40, seed) for seed in range(4)]
    segmenter(images, labels=OTHER_WORDS)
    assert encoded_prompts == [5]
    segmenter(images, labels="lamp; couch; star")
    assert encoded_prompts == [5, 1]
    segmenter(images)
    assert encoded_prompts == [5, 1]


@pytest.mark.parametrize("stored", [True, False])
def test_stuff_segments_are_merged(folder, processor, image, stored):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder)
    words = Vocabulary.parse(WORDS).names
    segmenter = GKCSegmentationPipeline(model=model, processor=processor)
    settings = ALL_SEGMENTS | {"mask_threshold": 0.0}

    def labels_found(is_thing: list[bool]) -> list[str]:
        vocabulary = Vocabulary(words, is_thing)
        if stored:
            model.set_vocabulary(vocabulary, processor)
        return [segment["label"] for segment in segmenter(image, **settings, labels=None if stored else vocabulary)]

    as_things, as_stuff = labels_found([True] * 3), labels_found([False] * 3)
    assert len(as_things) > len(set(as_things))
    assert sorted(as_stuff) == sorted(set(as_things))


@pytest.mark.parametrize(("subtask", "threshold"), [("panoptic", 0.6), ("instance", 0.4), ("semantic", 0.4)])
@pytest.mark.parametrize("stored", [True, False])
def test_void(segmenter, processor, image, subtask, threshold, stored):
    """Void labels and thresholds act as in post-processing, for labels of the call and for stored ones."""
    joined, void_ids = Vocabulary.parse(WORDS).with_void("star; blue")
    with torch.no_grad():
        outputs = segmenter.model(**processor(images=image, text=joined, return_tensors="pt"))
    process = getattr(processor, f"post_process_{subtask}_segmentation")
    settings = {} if subtask == "semantic" else ALL_SEGMENTS

    def not_void(**void) -> np.ndarray:
        (result,) = process(outputs, target_sizes=[(80, 120)], void_id=-1, **void, **settings)
        return ((result if subtask == "semantic" else result["segmentation"]) != -1).int().numpy()

    expected = not_void(void_label_ids=void_ids, void_threshold=threshold)
    assert 0 < expected.sum() < min(not_void(void_label_ids=void_ids).sum(), not_void(void_threshold=threshold).sum())
    results = segmenter(
        image,
        labels=None if stored else WORDS,
        subtask=subtask,
        void_labels="star; blue",
        void_threshold=threshold,
        **settings,
    )
    assert {result["label"] for result in results} <= {"red disc", "blue square", "lawn"}
    shown = sum((pixels(result["mask"]) // 255).astype(int) for result in results)
    np.testing.assert_array_equal(shown, expected)


def test_threshold_of_semantic_segments(segmenter, image):
    every = segmenter(image, subtask="semantic")
    limit = sorted(result["score"] for result in every)[-1]
    kept = segmenter(image, subtask="semantic", threshold=limit)
    assert [result["label"] for result in kept] == [r["label"] for r in every if r["score"] >= limit]
    assert 0 < len(kept) < len(every)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, processor, image, dtype):
    """Results in half precision are equal whether the model was loaded so or is converted by the pipeline."""
    model = GKCForOpenVocabSegmentation.from_pretrained(folder).to(dtype)
    inputs = processor(images=image, text=OTHER_WORDS, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        outputs = model(**inputs)
    (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 120)])
    loaded = pipeline("image-segmentation", model=str(folder), pipeline_class=GKCSegmentationPipeline, dtype=dtype)
    single = GKCForOpenVocabSegmentation.from_pretrained(folder)
    converted = GKCSegmentationPipeline(model=single, processor=processor, device="cpu", dtype=dtype)
    for half in (loaded, converted):
        assert half.model.dtype == dtype
        for result in half(image, labels=OTHER_WORDS, subtask="semantic"):
            index = Vocabulary.parse(OTHER_WORDS).labels.index(result["label"])
            np.testing.assert_array_equal(pixels(result["mask"]) == 255, expected.numpy() == index)


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "bfloat16"},
        {"dtype": "torch.bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"dtype": "auto", "torch_dtype": "bfloat16"},
    ],
)
def test_dtype_arguments(folder, processor, given):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder)
    assert GKCSegmentationPipeline(model=model, processor=processor, **given).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["half precision", "int8", torch.int64, 16])
def test_invalid_dtype_raises(processor, dtype):
    with pytest.raises(ValueError, match=r"`dtype` must be a floating-point type such as torch\.bfloat16, got"):
        GKCSegmentationPipeline(model=GKCForOpenVocabSegmentation(small_config()), processor=processor, dtype=dtype)


def test_constructor_arguments_are_defaults(folder, segmenter, processor, image, within):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder).train()
    own = GKCSegmentationPipeline(model=model, processor=processor, labels=OTHER_WORDS, subtask="semantic")
    assert not model.training
    assert_same(own(image), segmenter(image, labels=OTHER_WORDS, subtask="semantic"), within)
    assert_same(own(image, labels=WORDS), segmenter(image, labels=WORDS, subtask="semantic"), within)


def test_image_processor_and_tokenizer_instead_of_processor(folder, segmenter, processor, image, within):
    model = GKCForOpenVocabSegmentation.from_pretrained(folder)
    images_only = GKCSegmentationPipeline(model=model, image_processor=processor.image_processor)
    assert_same(images_only(image, **ALL_SEGMENTS), segmenter(image, **ALL_SEGMENTS), within)
    with pytest.raises(ValueError, match="`labels` and `void_labels` need a tokenizer"):
        images_only(image, labels="dog")
    both = GKCSegmentationPipeline(
        model=model, image_processor=processor.image_processor, tokenizer=processor.tokenizer
    )
    settings = ALL_SEGMENTS | {"labels": OTHER_WORDS}
    assert_same(both(image, **settings), segmenter(image, **settings), within)
    with pytest.raises(ValueError, match="Pass the `processor`"):
        GKCSegmentationPipeline(model=model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"subtask": "video"}, ValueError, "`subtask` must be one of panoptic, instance, semantic, got 'video'"),
        ({"labels": "dog; ; lamp"}, ValueError, "Label 2 .* is empty"),
        ({"labels": []}, ValueError, "No labels were given"),
        ({"labels": 3}, TypeError, "Labels must be"),
        ({"void_labels": "lawn"}, ValueError, "'lawn' is a void label"),
        ({"lables": "dog"}, TypeError, "no parameter 'lables'"),
    ],
)
def test_invalid_calls_raise(segmenter, image, settings, error, message):
    with pytest.raises(error, match=message):
        segmenter(image, **settings)


def test_invalid_labels_of_an_iterator_raise_at_once(segmenter, image):
    with pytest.raises(ValueError, match="empty"):
        segmenter((image for _ in range(2)), labels="")


def test_unreadable_image_error_names_the_file(segmenter, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        segmenter([str(tmp_path / "broken.png")])
    with (tmp_path / "broken.png").open("rb") as file, pytest.raises(ValueError, match=r"broken\.png"):
        segmenter(file)


@pytest.mark.parametrize("broken", [b"no image", io.BytesIO(b"no image"), None])
def test_unreadable_image_of_a_list_error_gives_the_index(segmenter, image, broken):
    with pytest.raises((ValueError, TypeError), match=r"^image 2 \(index 1\): "):
        segmenter([image, broken], batch_size=2)


@pytest.mark.parametrize("kind", ["generator", "iterator", "dataset"])
def test_unreadable_image_of_an_iterator_error_gives_the_index(segmenter, image, kind):
    images = [image, image, b"no image"]
    given = {"generator": (each for each in images), "iterator": iter(images)}.get(kind)
    if given is None:
        given = KeyDataset([{"image": each} for each in images], "image")
    results = iter(segmenter(given))
    assert next(results) == next(results)
    with pytest.raises(ValueError, match=r"^image 3 \(index 2\): "):
        next(results)


def test_top_k(folder, segmenter, image):
    """Pass `top_k` of instance results to the call and to the constructor."""
    settings = {"subtask": "instance", "threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    assert len(segmenter(image, **settings)) > 2
    assert len(segmenter(image, **settings, top_k=2)) == 2
    fixed = pipeline("image-segmentation", str(folder), pipeline_class=GKCSegmentationPipeline, top_k=1)
    assert len(fixed(image, **settings)) == 1 and fixed(image) == segmenter(image)
    with pytest.raises(ValueError, match="`top_k`"):
        segmenter(image, **settings, top_k=0)


def test_result_of_a_rotated_image_is_upright(folder, processor, tmp_path):
    """Run the Python example of the README on an image with an EXIF rotation."""
    exif = Image.Exif()
    exif[274] = 6
    noise(80, 120).save(tmp_path / "turned.png", exif=exif)
    upright = noise(80, 120).transpose(Image.Transpose.ROTATE_270)
    model = GKCForOpenVocabSegmentation.from_pretrained(folder).eval()
    results = []
    for picture in (Image.open(tmp_path / "turned.png"), upright):
        inputs = processor(images=picture, return_tensors="pt")
        sizes = inputs["original_sizes"]
        assert sizes.tolist() == [[120, 80]]
        results += processor.post_process_panoptic_segmentation(model(**inputs), 0.0, 0.5, 0.0, target_sizes=sizes)
    assert torch.equal(*(result["segmentation"] for result in results)) and len(results[0]["segments_info"]) > 1
    with pytest.warns(UserWarning, match="height and width seem to be swapped"):
        processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(80, 120)])


@pytest.mark.parametrize(
    "given",
    [
        {"num_labels": 2},
        {"id2label": {0: "a", 1: "b"}},
        {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        {"label2id": {"a": 0}},
    ],
    ids=str,
)
def test_changing_stored_labels_while_loading_raises(folder, given):
    """Changed labels would rename classes, or remove names, without changing results."""
    field = next(iter(given))
    message = (
        rf"`{field}` cannot be changed while loading: .* 3 classes \(red disc, blue square, lawn\).*set_vocabulary"
    )
    for load in (GKCForOpenVocabSegmentation.from_pretrained, AutoModel.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(folder, **given)


def test_equal_labels_while_loading_are_accepted(folder, tmp_path):
    names = {0: "red disc", 1: "blue square", 2: "lawn"}
    model = GKCForOpenVocabSegmentation.from_pretrained(folder, num_labels=3, id2label=names)
    model.config.id2label = {0: "Scheibe", 1: "Quadrat", 2: "Wiese"}
    model.save_pretrained(tmp_path)
    again = GKCForOpenVocabSegmentation.from_pretrained(
        tmp_path, id2label={"0": "Scheibe", "1": "Quadrat", "2": "Wiese"}
    )
    assert again.config.id2label == model.config.id2label and again.vocabulary.labels == list(names.values())
    model.config.id2label = {0: "Scheibe", 1: "Quadrat"}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must name the 3 stored classes"):
        GKCForOpenVocabSegmentation.from_pretrained(tmp_path)


def test_missing_vocabulary_raises(processor, image):
    segmenter = GKCSegmentationPipeline(model=GKCForOpenVocabSegmentation(small_config()), processor=processor)
    with pytest.raises(ValueError, match="There is no vocabulary: pass `labels`"):
        segmenter(image)
    assert segmenter(image, labels="dog", subtask="semantic")[0]["label"] == "dog"


def test_other_model_class_raises(processor):
    with pytest.raises(ValueError, match="must be a GKCForOpenVocabSegmentation, got a GKCModel"):
        GKCSegmentationPipeline(model=GKCModel(small_config()), processor=processor)
