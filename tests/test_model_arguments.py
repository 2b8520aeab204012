"""Tests that invalid arguments of the model raise errors that name the argument."""

import math

import pytest
import torch

from modeling_gkc import GKCImageProcessor, GKCProcessor
from modeling_gkc.class_embeddings import check_class_embeds
from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.vocabulary import Vocabulary

from .conftest import word_tokenizer


@pytest.fixture
def model(config) -> GKCForOpenVocabSegmentation:
    return GKCForOpenVocabSegmentation(config).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.rand(1, 3, 64, 64),
        "class_embeds": torch.nn.functional.normalize(torch.randn(3, 16)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[:, :2], r"shape \(B, 3, H, W\) .*, got \(1, 2, 64, 64\)"),
        (lambda images: images.movedim(1, -1), r"shape \(B, 3, H, W\) .*, got \(1, 64, 64, 3\)"),
        (lambda images: images[0], r"shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        (lambda images: images[None], r"shape \(B, 3, H, W\), got \(1, 1, 3, 64, 64\)"),
        (lambda images: images[:0], r"at least one image and one pixel, got \(0, 3, 64, 64\)"),
        (lambda images: images[..., :0], r"at least one image and one pixel, got \(1, 3, 64, 0\)"),
        (lambda images: (images * 255).byte(), r"of floating-point numbers, got of torch\.uint8"),
        (lambda images: (images * 255).long(), r"of floating-point numbers, got of torch\.int64"),
        (lambda images: images > 0, r"of floating-point numbers, got of torch\.bool"),
        (lambda images: images.numpy(), "got a ndarray"),
        (lambda images: None, "got a NoneType"),
        (lambda images: images.to_sparse(), "a dense tensor"),
    ],
)
def test_invalid_images_raise_errors(model, inputs, change, message):
    images = change(inputs["pixel_values"])
    for call in (lambda: model(images, class_embeds=inputs["class_embeds"]), lambda: model.model(images)):
        with pytest.raises(ValueError, match=f"^`pixel_values` must .*{message}"):
            call()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([torch.tensor([0.5, 1])], r"`class_labels\[0\]` must be a tensor \(N,\) of integers, got of torch.float32"),
        ([torch.tensor([True, False])], r"`class_labels\[0\]` .* got of torch.bool"),
        ([[0.5, 1]], r"`class_labels\[0\]` .* got a list"),
        ([torch.tensor([[0], [1]])], r"`class_labels\[0\]` must have the shape \(N,\), got \(2, 1\)"),
        ([torch.tensor(0)], r"`class_labels\[0\]` must have the shape \(N,\), got \(\)"),
        ([None], r"`class_labels\[0\]` .* got a NoneType"),
        (3, "`class_labels` must be a list with a tensor for each image, got a int"),
    ],
)
def test_class_labels_must_be_integers(model, inputs, classes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        model(**inputs, mask_labels=[torch.ones(2, 64, 64)], class_labels=classes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_class_labels_of_every_integer_dtype(model, inputs, dtype):
    masks, classes = [torch.ones(2, 64, 64)], torch.tensor([0, 2])
    losses = []
    for labels in (classes, classes.to(dtype)):
        torch.manual_seed(0)  # for the points sampled by the losses
        losses.append(model(**inputs, mask_labels=masks, class_labels=[labels]).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            [torch.ones(2, 64, 64).numpy()],
            r"`mask_labels\[0\]` must be a tensor \(N, H, W\) of numbers, got a ndarray",
        ),
        ([torch.ones(2, 64, 64).to_sparse()], r"`mask_labels\[0\]` must be a dense tensor"),
        ([None], r"`mask_labels\[0\]` .* got a NoneType"),
        (3, "`mask_labels` must be a list of tensors"),
    ],
)
def test_invalid_mask_labels_raise_errors(model, inputs, masks, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        model(**inputs, mask_labels=masks, class_labels=[torch.tensor([0, 1])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"class_embeds": torch.ones(3, 16, dtype=torch.long)},
            r"`class_embeds` must be a tensor \(prompts, 16\) of fl",
        ),
        ({"class_embeds": [[0.5] * 16]}, "`class_embeds` .* got a list"),
        ({"class_embeds": torch.ones(16)}, r"`class_embeds` must have the shape \(prompts, 16\), got \(16,\)"),
        ({"class_ids": [0, 1, 1]}, r"`class_ids` must be a tensor \(P,\) of integers, got a list"),
        ({"class_ids": torch.tensor([0.0, 1, 1])}, r"`class_ids` .* got of torch\.float32"),
        ({"class_ids": torch.tensor([0, 1, 1]), "names_per_class": [1, 2]}, "`names_per_class` must .* got a list"),
        ({"pixel_mask": torch.ones(1, 64, 64).tolist()}, r"`pixel_mask` must be a tensor \(1, 64, 64\), got a list"),
    ],
)
def test_invalid_vocabulary_arguments_raise_errors(model, inputs, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        model(**inputs | changes)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_ids": torch.rand(1, 4)}, r"`input_ids` must be a tensor \(P, L\) of integers, got of torch\.float32"),
        ({"input_ids": torch.ones(4).long()}, r"`input_ids` must have the shape \(P, L\), got \(4,\)"),
        ({"input_ids": [[1, 3]]}, "`input_ids` .* got a list"),
        ({"input_ids": torch.ones(0, 4).long()}, "`input_ids` must hold at least one prompt"),
        (
            {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)},
            r"`attention_mask` must have the shape of `input_ids`, \(1, 4\), got \(1, 3\)",
        ),
    ],
)
def test_invalid_prompts_raise_errors(model, inputs, prompts, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        model(inputs["pixel_values"], **prompts)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_must_be_finite(model, inputs, value):
    embeds = inputs["class_embeds"].clone()
    embeds[1, 3] = value
    message = "^`class_embeds` must be finite, but 1 of 3 rows hold NaN or infinity, such as row 1"
    calls = (
        lambda: model(inputs["pixel_values"], class_embeds=embeds),
        lambda: model.classify(torch.rand(1, 4, 16), embeds),
        lambda: EncodedVocabulary(Vocabulary.parse("a; b; c"), embeds, torch.arange(3)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_vocabularies_of_a_non_finite_text_tower_raise_an_error(model):
    processor = GKCProcessor(GKCImageProcessor(), word_tokenizer())
    model.text_model.text_projection.weight.data.fill_(math.nan)
    for encode in (
        lambda words: model.set_vocabulary(words, processor),
        lambda words: EncodedVocabulary.encode(words, model, processor),
    ):
        with pytest.raises(
            ValueError, match=r"^`class_embeds` must be finite, .* check the weights of the text encoder"
        ):
            encode("red disc; sky")


def test_embeddings_on_another_device_are_read_only_on_request():
    embeds = torch.empty(3, 16, device="meta")
    check_class_embeds(embeds)  # values on the meta device cannot be read
    with pytest.raises(ValueError, match=r"`class_embeds` must be \(prompts, 8\), got \(3, 16\)"):
        check_class_embeds(embeds, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": "no"}, "`compile` must be True or False, got 'no'"),
        ({"sizes": [(0, 0)]}, r"`sizes\[0\]` \(height, width\) must be at least 1 x 1, got \(0, 0\)"),
        ({"sizes": [(64, 64), (-3, 5)]}, r"`sizes\[1\]` \(height, width\) must be at least 1 x 1, got \(-3, 5\)"),
        ({"sizes": (512, 512)}, r"`sizes\[0\]` must be a pair of whole numbers \(height, width\), got 512"),
        ({"sizes": [(1.5, 2)]}, r"`sizes\[0\]` must be a pair"),
        (
            {"sizes": "512x512"},
            r"`sizes` must be a list of \(height, width\), such as \[\(512, 512\)\], got '512x512'",
        ),
        ({"sizes": 512}, "`sizes` must be a list"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"dtype": "bfloat16"}, r"`dtype` must be a floating-point type such as torch\.bfloat16, got 'bfloat16'"),
        ({"dtype": torch.int8}, r"`dtype` must .* got torch\.int8"),
    ],
)
def test_optimization_arguments_are_checked_first(model, settings, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        model.optimize_for_inference(**settings)
    assert model.state_dict().keys() == before.keys()
