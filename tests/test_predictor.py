"""Tests of `GKCPredictor`: results, memory bounds and errors."""

import io
import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_gkc import (
    EncodedVocabulary,
    GKCForOpenVocabSegmentation,
    GKCImageProcessor,
    GKCPredictor,
    GKCProcessor,
    Vocabulary,
)
from modeling_gkc.post_processing import semantic_segments
from modeling_gkc.predictor import (
    FailedImage,
    InstanceResult,
    PanopticResult,
    PredictionOptions,
    SemanticResult,
    prefetch,
)

from .conftest import small_config, word_tokenizer

WORDS = "red disc; blue square, box; lawn, grass"
ALL_SEGMENTS = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}
SECONDS = 30  # maximum time of a thread before a test fails


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())


@pytest.fixture(scope="module")
def model(processor) -> GKCForOpenVocabSegmentation:
    """Return a model whose random weights find segments of several classes."""
    torch.manual_seed(0)
    model = GKCForOpenVocabSegmentation(small_config()).eval()
    classifier, projection = model.classifier, model.classifier.stage_projections[-1]
    with torch.no_grad():
        queries = model.model(processor(images=noise(80, 120), return_tensors="pt")["pixel_values"]).last_hidden_state
        # The mean over queries is subtracted; otherwise all queries would predict one class.
        projection.bias.copy_(-projection.weight @ classifier.dense(queries).relu().mean(dim=(0, 1)))
        classifier.no_object_embedding.copy_(-projection.weight.mean(dim=1))
    return model


@pytest.fixture
def predictor(model, processor) -> GKCPredictor:
    predictor = GKCPredictor(model, processor)
    predictor.set_vocabulary(WORDS)
    return predictor


def by_hand(model, processor, image, task, words=WORDS, **options):
    """Segment without a predictor, as in the README."""
    cached = model.get_class_embeddings(**processor(text=words, return_tensors="pt"))
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, **cached)
    process = getattr(processor, f"post_process_{task}_segmentation")
    return process(outputs, target_sizes=inputs["original_sizes"], **options)[0]


def same(first, second) -> bool:
    """Return whether two results are bitwise equal."""
    equal = torch.equal(first.segmentation, second.segmentation) and first.segments == second.segments
    scores = [getattr(each, "scores", None) for each in (first, second)]
    return type(first) is type(second) and equal and (scores[0] is None or torch.equal(*scores))


def infos(result) -> list[dict]:
    return [
        {name: getattr(segment, name) for name in ("id", "label_id", "was_fused", "score")}
        for segment in result.segments
    ]


class TestPredict:
    def test_semantic_results_match_separate_calls(self, model, processor, predictor):
        image = noise(80, 120)
        expected = by_hand(model, processor, image, "semantic", return_scores=True)
        plain, scored = predictor.predict(image), predictor.predict(image, return_scores=True)
        assert type(plain) is SemanticResult and plain.scores is None and plain.image is None
        assert torch.equal(plain.segmentation, expected.segmentation) and plain.void_id == 255
        assert torch.equal(scored.segmentation, expected.segmentation)
        assert torch.equal(scored.scores, expected.scores)
        assert plain.labels == ["red disc", "blue square", "lawn"]
        segments = semantic_segments(expected.segmentation, expected.scores, 3)
        assert [(each.id, each.label_id, each.score) for each in scored.segments] == [
            (each["id"], each["label_id"], each["score"]) for each in segments
        ]
        assert len(segments) > 1 and all(each.label == scored.labels[each.id] for each in scored.segments)
        assert [each.id for each in plain.segments] == [each.id for each in scored.segments]
        assert {each.score for each in plain.segments} == {None}
        assert torch.equal(plain.mask(plain.segments[0]), plain.segmentation == plain.segments[0].id)

    @pytest.mark.parametrize(("task", "kind"), [("instance", InstanceResult), ("panoptic", PanopticResult)])
    @pytest.mark.parametrize(
        "options", [{}, ALL_SEGMENTS, ALL_SEGMENTS | {"mask_threshold": 0.3, "void_threshold": 0.2}]
    )
    def test_segments_match_separate_calls(self, model, processor, predictor, task, kind, options):
        image = noise(80, 120)
        expected = by_hand(model, processor, image, task, **options)
        result = predictor.predict(image, task, **options)
        assert type(result) is kind and result.task == task and result.void_id == (-1 if task == "instance" else 0)
        assert torch.equal(result.segmentation, expected["segmentation"])
        assert infos(result) == expected["segments_info"] and (result.segments or not options)
        assert all(segment.label == result.labels[segment.label_id] for segment in result.segments)

    def test_stuff_segments_are_merged(self, model, processor):
        predictor = GKCPredictor(model, processor)
        predictor.set_vocabulary(Vocabulary(Vocabulary.parse(WORDS).names, [False] * 3))
        settings = ALL_SEGMENTS | {"mask_threshold": 0.0}
        result = predictor.predict(noise(80, 120), "panoptic", **settings)
        labels = [segment.label for segment in result.segments]
        assert len(labels) == len(set(labels)) > 1 and all(segment.was_fused for segment in result.segments)
        expected = by_hand(model, processor, noise(80, 120), "panoptic", label_ids_to_fuse=[0, 1, 2], **settings)
        assert infos(result) == expected["segments_info"]

    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    def test_void(self, model, processor, task):
        predictor = GKCPredictor(model, processor)
        predictor.set_vocabulary(WORDS, void_labels="star; blue")
        joined, void_ids = Vocabulary.parse(WORDS).with_void("star; blue")
        void = {"void_threshold": 0.4, "void_id": 999 if task == "semantic" else -9}
        settings = void | ({} if task == "semantic" else ALL_SEGMENTS)
        expected = by_hand(model, processor, noise(80, 120), task, words=joined, void_label_ids=void_ids, **settings)
        result = predictor.predict(noise(80, 120), task, **settings)
        expected = expected if task == "semantic" else expected["segmentation"]
        assert torch.equal(result.segmentation, expected) and (expected == void["void_id"]).any()
        assert result.labels == ["red disc", "blue square", "lawn"] and result.void_id == void["void_id"]
        assert {segment.label for segment in result.segments} <= set(result.labels)

    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    def test_several_images_of_mixed_sizes(self, predictor, task, within):
        images = [noise(80, 120), noise(33, 200, 1), noise(120, 80, 2), noise(80, 120, 3), noise(1, 1, 4)]
        options = {} if task == "semantic" else ALL_SEGMENTS
        together = predictor.predict(images, task, **options)
        assert [result.segmentation.shape for result in together] == [(i.height, i.width) for i in images]
        for image, result in zip(images, together, strict=True):
            alone = predictor.predict(image, task, **options)
            differing = (alone.segmentation != result.segmentation).float().mean()
            within("predictor: share of pixels that a batch changes by rounding", differing, 0.002)
        assert predictor.predict([], task) == []

    @pytest.mark.parametrize("kind", ["path", "bytes", "array", "tensor", "batch", "file"])
    def test_image_types(self, predictor, tmp_path, kind):
        image, file = noise(80, 120), io.BytesIO()
        image.save(tmp_path / "image.png")
        image.save(file, "PNG")
        given = {
            "path": str(tmp_path / "image.png"),
            "bytes": file.getvalue(),
            "array": np.asarray(image),
            "tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1),
            "batch": np.asarray(image)[None],
            "file": file,
        }[kind]
        result = predictor.predict(given)
        result = result[0] if kind == "batch" else result
        assert same(result, predictor.predict(image))

    def test_returned_images_are_upright(self, predictor, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
        noise(40, 90).save(tmp_path / "turned.png", exif=exif)
        result = predictor.predict(tmp_path / "turned.png", return_images=True)
        assert result.image.size == (40, 90) and result.segmentation.shape == (90, 40)
        np.testing.assert_array_equal(np.asarray(result.image), np.rot90(np.asarray(noise(40, 90)), -1))

    def test_results_are_writable(self, predictor):
        result = predictor.predict(noise(80, 120), return_scores=True)
        result.segmentation[result.scores < 0.1] = 255

    @pytest.mark.parametrize(
        ("task", "options", "error", "message"),
        [
            ("video", {}, ValueError, "`task` must be one of semantic, instance, panoptic, got 'video'"),
            ("semantic", {"threshold": 0.0}, ValueError, "`threshold` applies to instance and panoptic results only"),
            (
                "panoptic",
                {"top_k": 5},
                ValueError,
                "`top_k` applies to instance results only, not to panoptic",
            ),
            ("panoptic", {"return_scores": True}, ValueError, "`return_scores` applies to semantic results only"),
            ("instance", {"threshold": 2}, ValueError, "`threshold` must be a number between 0 and 1"),
            ("instance", {"top_k": 0}, ValueError, "`top_k` must be"),
            ("semantic", {"return_images": 1}, ValueError, "`return_images` must be"),
            ("semantic", {"void_threshold": -1}, ValueError, "`void_threshold` must be"),
            ("semantic", {"tresh": 0.5}, TypeError, "tresh"),
        ],
    )
    def test_invalid_options_raise(self, predictor, task, options, error, message):
        with pytest.raises(error, match=message):
            predictor.predict(noise(32, 32), task, **options)

    def test_unreadable_image_error_names_the_file(self, predictor, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"broken\.png: cannot be read"):
            predictor.predict(tmp_path / "broken.png")
        with pytest.raises(ValueError, match=r"^image 2 \(index 1\): cannot be read"):
            predictor.predict([noise(32, 32), b"no image"])

    def test_model_optimized_for_inference(self, processor, within):
        """An optimized model works with vocabularies encoded before and after the optimization."""
        plain, model = (GKCForOpenVocabSegmentation(small_config()) for _ in range(2))
        model.load_state_dict(plain.state_dict())
        expected = GKCPredictor(plain, processor)
        expected.set_vocabulary(WORDS)
        optimized = GKCPredictor(model.optimize_for_inference(compile=False), processor)
        for vocabulary in (expected.vocabulary, WORDS):
            optimized.set_vocabulary(vocabulary)
            results = [each.predict(noise(80, 120), return_scores=True) for each in (expected, optimized)]
            difference = (results[0].scores - results[1].scores).abs().max()
            within("predictor: score map of an optimized model", difference, 1e-4)

    def test_model_is_set_to_evaluation_mode(self, processor):
        model = GKCForOpenVocabSegmentation(small_config()).train()
        GKCPredictor(model, processor)
        assert not model.training

    def test_dtype_by_name(self, model, processor, tmp_path):
        for part in (model, processor):
            part.save_pretrained(tmp_path)
        assert GKCPredictor.from_pretrained(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"`dtype` must be a type such as torch\.bfloat16 or its name, got 'bf'"):
            GKCPredictor.from_pretrained(tmp_path, dtype="bf")


class TestVocabulary:
    def test_stored_vocabulary_is_the_default(self, processor):
        model = GKCForOpenVocabSegmentation(small_config())
        predictor = GKCPredictor(model, processor)
        assert predictor.vocabulary is None
        for call in (lambda: predictor.predict(noise(32, 32)), lambda: predictor.predict_batches([])):
            with pytest.raises(ValueError, match=r"No vocabulary is set: call `predictor\.set_vocabulary"):
                call()
        model.set_vocabulary(WORDS, processor)
        assert predictor.predict(noise(32, 32)).labels == ["red disc", "blue square", "lawn"]
        predictor.set_vocabulary("star; sky")
        assert predictor.predict(noise(32, 32)).labels == ["star", "sky"]
        predictor.set_vocabulary(None, void_labels="star")
        assert predictor.vocabulary.labels == ["red disc", "blue square", "lawn"]
        assert predictor.vocabulary.void_ids == (3,)

    def test_cached_prompts_are_not_encoded_again(self, processor):
        model = GKCForOpenVocabSegmentation(small_config())
        encoded = []
        model.text_model.register_forward_pre_hook(
            lambda module, args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        predictor = GKCPredictor(model, processor)
        predictor.set_vocabulary("dog; sofa, couch; lamp")
        predictor.predict([noise(32, 32)] * 2)
        list(predictor.predict_batches([noise(32, 32)] * 3))
        assert encoded == [4]
        predictor.set_vocabulary("lamp; couch; star", void_labels="dog; sky")
        assert encoded == [4, 1, 1]
        predictor.set_vocabulary("couch; dog")
        assert encoded == [4, 1, 1]

    def test_templates_and_reduction(self, model, processor):
        predictor = GKCPredictor(model, processor)
        predictor.set_vocabulary(WORDS, prompt_templates=["red {}", "blue {}"], reduction="max")
        prompts = processor(text=WORDS, prompt_templates=["red {}", "blue {}"], return_tensors="pt")
        inputs = processor(images=noise(80, 120), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs, **model.get_class_embeddings(**prompts), prompt_reduction="max")
        (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 120)])
        assert torch.equal(predictor.predict(noise(80, 120)).segmentation, expected)

    def test_thing_and_stuff_kinds_of_stored_names(self, processor):
        model = GKCForOpenVocabSegmentation(small_config())
        model.set_vocabulary(Vocabulary([["disc"], ["lawn", "grass"]], [True, False]), processor)
        predictor = GKCPredictor(model, processor)
        predictor.set_vocabulary("grass; sky; disc")
        assert predictor.vocabulary.vocabulary.is_thing == [False, None, True]
        predictor.set_vocabulary("grass; sky; disc", void_labels=Vocabulary([["star"]], [False]))
        assert predictor.vocabulary.vocabulary.is_thing == [False, None, True, False]

    def test_image_processor_suffices_for_encoded_vocabularies(self, model, processor, predictor):
        images_only = GKCPredictor(model, processor.image_processor)
        images_only.set_vocabulary(predictor.vocabulary)
        assert same(images_only.predict(noise(80, 120)), predictor.predict(noise(80, 120)))

    def test_iterator_keeps_its_vocabulary(self, predictor):
        results = predictor.predict_batches([noise(32, 32)] * 3)
        next(results)
        predictor.set_vocabulary("star; sky")
        assert next(results).labels == ["red disc", "blue square", "lawn"]

    def test_reduction_applies_to_encoded_and_stored_vocabularies(self, model, processor):
        encoded = EncodedVocabulary.encode(WORDS, model, processor, reduction="max")
        predictor = GKCPredictor(model, processor)
        predictor.set_vocabulary(encoded, reduction="mean")
        assert predictor.vocabulary.reduction == "mean" and encoded.reduction == "max"
        with pytest.raises(ValueError, match="`reduction` must be one of"):
            predictor.set_vocabulary(encoded, reduction="median")

    def test_templates_without_words_raise(self, model, processor):
        encoded = EncodedVocabulary.encode(WORDS, model, processor)
        predictor = GKCPredictor(model, processor)
        with pytest.raises(ValueError, match="`prompt_templates` apply to words, but an encoded or stored"):
            predictor.set_vocabulary(encoded, prompt_templates="photo")
        predictor.set_vocabulary(encoded, void_labels="star", prompt_templates="photo")
        assert len(predictor.vocabulary.void_ids) == 1


class TestPredictBatches:
    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    @pytest.mark.parametrize(("batch_size", "ahead"), [(1, None), (1, 0), (2, None), (3, 1), (9, 9)])
    def test_results_in_order(self, predictor, task, batch_size, ahead):
        images = [noise(80, 120, seed) if seed % 2 else noise(70, 50, seed) for seed in range(5)]
        options = {} if task == "semantic" else ALL_SEGMENTS
        batches = [images[start : start + batch_size] for start in range(0, 5, batch_size)]
        expected = [result for batch in batches for result in predictor.predict(batch, task, **options)]
        results = predictor.predict_batches(
            iter(images), task, batch_size=batch_size, prefetch_images=ahead, return_images=True, **options
        )
        for image, result, other in zip(images, results, expected, strict=True):
            assert same(result, other) and np.array_equal(np.asarray(result.image), np.asarray(image))

    def test_images_are_read_while_the_model_computes(self, predictor, monkeypatch):
        """Each forward pass waits for the next image to be read, which requires a separate thread."""
        read = [threading.Event() for _ in range(4)]
        waited = []

        def images():
            for seed, event in enumerate(read):
                event.set()
                yield noise(32, 32, seed)

        original = GKCPredictor.forward

        def forward(self, prepared, vocabulary=None):
            following = len(waited) + 1
            waited.append(following == len(read) or read[following].wait(SECONDS))
            return original(self, prepared, vocabulary)

        monkeypatch.setattr(GKCPredictor, "forward", forward)
        assert len(list(predictor.predict_batches(images()))) == 4
        assert waited == [True] * 4

    @pytest.mark.parametrize(("batch_size", "ahead"), [(1, 1), (1, 3), (2, 2), (4, 1)])
    def test_endless_iterable_is_read_a_bounded_number_ahead(self, predictor, batch_size, ahead):
        taken = itertools.count()
        given = []

        def images():
            for number in taken:
                given.append(number)
                yield noise(32, 32, number)

        results = predictor.predict_batches(images(), batch_size=batch_size, prefetch_images=ahead)
        for used in range(1, 7):
            next(results)
            batches = -(-used // batch_size)
            assert used <= len(given) <= batches * batch_size + ahead
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
        assert len(threads) == 1
        results.close()
        assert not any(thread.is_alive() for thread in threads)

    def test_no_image_is_read_before_the_first_result_is_requested(self, predictor):
        taken = []
        predictor.predict_batches(taken.append(index) for index in range(3))
        assert taken == []

    @pytest.mark.parametrize("batch_size", [1, 2, 4])
    def test_unreadable_images(self, predictor, tmp_path, transformers_log, batch_size):
        (tmp_path / "broken.png").write_bytes(b"no image")
        images = [noise(32, 32), tmp_path / "broken.png", noise(40, 32, 1), None, noise(32, 40, 2)]
        settings = {"batch_size": batch_size}
        with pytest.raises(ValueError, match=r"broken\.png: cannot be read"):
            for count, _ in enumerate(predictor.predict_batches(images, **settings), 1):
                assert count == 1
        results = list(predictor.predict_batches(images, on_error="yield", **settings))
        assert [isinstance(result, FailedImage) for result in results] == [False, True, False, True, False]
        assert [(result.index, result.image) for result in results[1::2]] == [(1, images[1]), (3, None)]
        assert "broken.png" in str(results[1].error) and str(results[3].error).startswith("image 4 (index 3): ")
        with transformers_log.at_level(logging.WARNING):
            kept = list(predictor.predict_batches(images, on_error="skip", **settings))
        assert all(same(result, other) for result, other in zip(kept, results[::2], strict=True))
        said = [record.getMessage() for record in transformers_log.records]
        assert [line[:25] for line in said] == ["Skipped image 2 (index 1)", "Skipped image 4 (index 3)"]
        assert all(line.count("(index") == 1 for line in said)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_failing_image_does_not_affect_the_others_of_its_batch(self, predictor, monkeypatch, batch_size):
        original = GKCForOpenVocabSegmentation.forward

        def forward(self, pixel_values, **kwargs):
            if pixel_values.shape[-1] > 64:
                raise RuntimeError("out of memory")
            return original(self, pixel_values, **kwargs)

        monkeypatch.setattr(GKCForOpenVocabSegmentation, "forward", forward)
        images = [noise(64, 64, 0), noise(64, 96, 1), noise(64, 64, 2)]
        results = list(predictor.predict_batches(images, on_error="yield", batch_size=batch_size))
        assert [isinstance(result, FailedImage) for result in results] == [False, True, False]
        assert results[1].index == 1 and str(results[1].error) == "out of memory"
        with pytest.raises(RuntimeError) as caught:
            list(predictor.predict_batches(images, batch_size=batch_size))
        assert caught.value.__notes__ == ["The error was raised for image 2 (index 1)."]

    @pytest.mark.parametrize("on_error", ["raise", "yield", "skip"])
    def test_error_of_the_iterable_follows_the_results_before_it(self, predictor, on_error):
        def images():
            yield from [noise(32, 32), noise(32, 32, 1)]
            raise OSError("the camera is gone")

        results, got = predictor.predict_batches(images(), batch_size=8, on_error=on_error), []
        with pytest.raises(OSError, match="the camera is gone"):
            for result in results:
                got.append(result)
        assert len(got) == 2

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"batch_size": 0}, "`batch_size` must be"),
            ({"prefetch_images": -1}, "`prefetch_images` must be"),
            ({"on_error": "ignore"}, "`on_error` must be one of raise, yield, skip, got 'ignore'"),
            ({"task": "video"}, "`task` must be one of"),
            ({"threshold": 0.5}, "`threshold` applies to"),
        ],
    )
    def test_invalid_arguments_raise_at_once(self, predictor, settings, message):
        with pytest.raises(ValueError, match=message):
            predictor.predict_batches([], **settings)

    @pytest.mark.parametrize(
        "images",
        [
            "scene.png",
            Path("scene.png"),
            b"bytes",
            Image.new("RGB", (8, 8)),
            np.zeros((8, 8, 3), np.uint8),
            torch.zeros(3, 8, 8),
            io.BytesIO(b"bytes"),
        ],
        ids=lambda images: type(images).__name__,
    )
    def test_single_images_raise_at_once(self, predictor, images):
        with pytest.raises(TypeError, match=r"got one image \(\w+\): put it into a list, or use `predict`"):
            predictor.predict_batches(images)

    @pytest.mark.parametrize("images", [{"a": "scene.png"}, {"scene.png"}, 7, None])
    def test_collections_without_order_raise_at_once(self, predictor, images):
        with pytest.raises(TypeError, match="`images` must be an iterable of images, such as a list, got a"):
            predictor.predict_batches(images)

    def test_batched_arrays_are_iterables_of_images(self, predictor):
        images = np.stack([np.asarray(noise(32, 32)), np.asarray(noise(32, 32, 1))])
        for result, image in zip(predictor.predict_batches(images, batch_size=2), images, strict=True):
            assert same(result, predictor.predict(image))

    def test_unknown_options_raise_at_once(self, predictor):
        for call in (predictor.predict, predictor.predict_batches):
            with pytest.raises(TypeError, match=r"^Unknown option `score`: the options are return_scores, "):
                call([], score=True)


def test_prefetch_submits_step_by_step():
    """A number of images to read ahead that no memory could hold must not delay the first value."""
    read = []
    values = prefetch(map(read.append, itertools.count()), str, 10**12)
    assert [next(values) for _ in range(3)] == ["None"] * 3
    values.close()
    assert 3 <= len(read) <= 7


def test_prefetch_keeps_order_and_raises_in_place():
    for ahead in (0, 1, 3):
        assert list(prefetch(range(7), str, ahead)) == list("0123456")
        values = prefetch([2, 1, 0, 5], lambda number: 2 // number, ahead)
        assert [next(values), next(values)] == [1, 2]
        with pytest.raises(ZeroDivisionError):
            next(values)
        assert list(values) == []


def test_options_match_post_processing():
    options = PredictionOptions("instance", threshold=0.1, top_k=3, void_threshold=0.2)
    assert options.post_processing_arguments() == {"threshold": 0.1, "top_k": 3, "void_threshold": 0.2}
