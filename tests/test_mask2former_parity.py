"""Tests of parity with transformers' Mask2Former: same weights give the same masks and gradients.

A converted model needs no training: with the source's class names it gives the source's result, with other names
convex combinations of the source's classes.
"""

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary
from modeling_gkc.conversion import from_mask2former
from modeling_gkc.conversion.mask2former import _renamed_weights
from modeling_gkc.modeling_gkc import GKCModelOutput

from .conftest import word_tokenizer

BACKBONES = {
    "resnet": lambda: ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 2, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    "swin": lambda: SwinConfig(
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[2, 2, 4, 4],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
}
# (height, width): square, landscape, portrait, and one that is not a multiple of 32.
SIZES = [(128, 128), (96, 160), (224, 64), (100, 148)]
NAMES = ["red", "blue", "disc", "square", "box", "lawn", "grass", "star", "sky", "air", "dog", "sofa"]


@pytest.fixture(params=BACKBONES)
def source(request) -> Mask2FormerForUniversalSegmentation:
    """Build a Mask2Former whose random weights vary enough that masks contain positive and negative pixels."""
    config = Mask2FormerConfig(
        backbone_config=BACKBONES[request.param](),
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=96,
        dim_feedforward=128,
        encoder_layers=3,
        decoder_layers=7,
        num_attention_heads=4,
        num_queries=20,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                # Some releases initialize these near zero, where every activation lies on the kink of a ReLU.
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture
def text_model() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    return CLIPTextModelWithProjection(config).eval()


@pytest.fixture
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(), word_tokenizer())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def named(source) -> Mask2FormerForUniversalSegmentation:
    """Build the source with a head of named classes."""
    source.config.id2label = dict(enumerate(NAMES))
    source.class_predictor = torch.nn.Linear(64, len(NAMES) + 1)
    return source


@pytest.fixture
def confident(named) -> Mask2FormerForUniversalSegmentation:
    """Build a source whose head is as confident as a trained one: some queries are objects, others are not."""
    generator = torch.Generator().manual_seed(4)
    head = named.class_predictor
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
        logits = named(images()).class_queries_logits.flatten(0, 1)
        spread = 4 / logits.std(dim=0)
        head.weight.mul_(spread[:, None])
        head.bias.copy_(-spread * logits.mean(dim=0))
        logits = spread * logits + head.bias
        head.bias[-1] += (logits[:, :-1].amax(dim=1) - logits[:, -1]).median()
    return named


def all_masks(source_outputs, source) -> list[torch.Tensor]:
    return list(source.model(source_outputs, output_hidden_states=True).masks_queries_logits)


@pytest.mark.parametrize("size", SIZES)
def test_masks_match_mask2former(source, text_model, size, within):
    backbone = source.config.backbone_config.model_type
    converted = from_mask2former(source, text_model=text_model)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = all_masks(pixel_values, source)
        outputs = converted.model(pixel_values, output_stages=True)
        last_only = converted.model(pixel_values, output_stages=False).masks_queries_logits
    assert len(outputs.stages) == len(expected) == 7
    for stage, masks in zip(outputs.stages, expected, strict=True):
        assert 0.01 < (masks > 0).float().mean() < 0.99, "the comparison needs masks with inside and outside"
        error = (stage.masks_queries_logits - masks).abs().max()
        within(f"masks against transformers' Mask2Former, {backbone}, max abs", error, 1e-4)
    assert (last_only - expected[-1]).abs().max() <= 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_gradients_match_mask2former(source, text_model, dtype, bound, within):
    """Also in double precision, where rounding flips no attention bit and no ReLU."""
    source = source.to(dtype)
    converted = from_mask2former(source, text_model=text_model).to(dtype)
    pixel_values = torch.randn(2, 3, 96, 160, dtype=dtype)
    weights = None

    def scalar(stages):
        """Return a fixed, smooth loss of every stage's masks, the same for both models."""
        nonlocal weights
        if weights is None:
            weights = [torch.randn_like(masks) for masks in stages]
        return sum((weight * masks.tanh()).mean() for weight, masks in zip(weights, stages, strict=True))

    scalar(all_masks(pixel_values, source)).backward()
    stages = converted.model(pixel_values, output_stages=True).stages
    scalar([stage.masks_queries_logits for stage in stages]).backward()

    gradients = {name: p.grad for name, p in source.model.named_parameters() if p.grad is not None}
    converted_gradients = {name: p.grad for name, p in converted.model.named_parameters() if p.grad is not None}
    expected = _renamed_weights(gradients)
    assert expected.keys() == converted_gradients.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # Gradients that are only rounding noise (biases before a normalization, key biases) have no relative error.
        if gradient.norm() < 1e-6 * largest:
            continue
        error = (converted_gradients[name] - gradient).norm() / gradient.norm()
        precision = str(dtype).removeprefix("torch.")
        within(f"gradients against transformers' Mask2Former, {precision}, relative", error, bound)


def test_unconvertible_source_is_an_error(source, text_model):
    source.config.pre_norm = True
    with pytest.raises(ValueError, match="pre_norm"):
        from_mask2former(source, text_model=text_model)


@pytest.mark.parametrize("certainty", ["hesitant", "confident"])
@torch.no_grad()
def test_own_names_reproduce_the_source(named, text_model, processor, certainty, request, within):
    if certainty == "confident":
        named = request.getfixturevalue("confident")
    model = from_mask2former(named, text_model, word_tokenizer(), NAMES)
    pixel_values = images()
    expected = named(pixel_values)
    probabilities = expected.class_queries_logits.softmax(-1)
    best = probabilities.topk(2).values
    clear = best[..., 0] - best[..., 1] > 0.1
    for words in ({}, dict(model.get_class_embeddings(**processor(text=NAMES, return_tensors="pt")))):
        outputs = model(pixel_values, **words)
        error = (outputs.class_queries_logits.softmax(-1) - probabilities).abs().max()
        within("class probabilities against transformers' Mask2Former, max abs", error, 1e-3)
        error = (outputs.masks_queries_logits - expected.masks_queries_logits).abs().max()
        within("masks of a model that answers at once, max abs", error, 1e-4)
        answered = outputs.class_queries_logits.argmax(-1)
        assert torch.equal(answered[clear], expected.class_queries_logits.argmax(-1)[clear])
        labels, source_labels = (
            torch.stack(processor.post_process_semantic_segmentation(each, target_sizes=[(96, 160)] * 2))
            for each in (outputs, expected)
        )
        assert (labels == source_labels).float().mean() > 0.999
    if certainty == "confident":
        assert clear.float().mean() > 0.5
        assert {True, False} == set((probabilities.argmax(-1) == len(NAMES))[clear].tolist())


@torch.no_grad()
def test_saved_model_reproduces_the_source(named, text_model, processor, tmp_path, within):
    model = from_mask2former(named, text_model, word_tokenizer())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = GKCForOpenVocabSegmentation.from_pretrained(tmp_path)
    assert loaded.config.classifier == "convex_combination"
    assert loaded.config.vocabulary == loaded.config.source_vocabulary == [[name] for name in NAMES]
    assert loaded.config.id2label == dict(enumerate(NAMES)) and loaded.config.vocabulary_is_thing is None
    pixel_values = torch.randn(1, 3, 64, 96)
    # Names that the conversion did not encode: a stored embedding was computed in a batch of other names, and on some
    # processors rounding depends on the number of rows of a product (by up to 1e-5 in these logits).
    words = processor(text=[["red couch", "blue sofa"], "lawn star", "grass lamp"], return_tensors="pt")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for asked in ({}, words):
        expected, actual = model(pixel_values, **asked), loaded(pixel_values, **asked)
        torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, rtol=0, atol=0)
        torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=0)
    halved = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stage = GKCModelOutput(last_hidden_state=torch.randn(1, 20, 64, dtype=torch.bfloat16))
    expected = halved.classifier.class_predictor(stage.last_hidden_state).float().softmax(-1)
    answered = halved.classify(halved.classifier.embed_queries(stage), halved.vocabulary_embeds).softmax(-1)
    within("class probabilities of a model in bf16, max abs", (answered - expected).abs().max(), 0.01)


@torch.no_grad()
def test_source_names_are_encoded_without_templates(confident, text_model, processor, within):
    """Plain names give the source's result; the same names in a template do not."""
    with pytest.warns(UserWarning, match="Prompt templates of `class_names` are ignored"):
        model = from_mask2former(
            confident,
            text_model,
            word_tokenizer(),
            Vocabulary([[name] for name in NAMES], templates=[["dog {}", "red {}"], *[None] * (len(NAMES) - 1)]),
        )
    pixel_values = images()
    expected = confident(pixel_values).class_queries_logits.softmax(-1)
    for asked in ({}, processor(text=NAMES, return_tensors="pt")):
        answered = model(pixel_values, **asked).class_queries_logits.softmax(-1)
        within("class probabilities of plain names, max abs", (answered - expected).abs().max(), 1e-4)
    asked = processor(text=NAMES, prompt_templates="dog {}", return_tensors="pt")
    answered = model(pixel_values, **asked).class_queries_logits.softmax(-1)
    assert (answered - expected).abs().max() > 0.01


@torch.no_grad()
def test_other_vocabularies_are_convex_combinations(confident, text_model, processor):
    """Any names, with synonyms, in all forms of input; no-object keeps the probability that the source gives it."""
    model = from_mask2former(confident, text_model, word_tokenizer())
    pixel_values = images()
    no_object = confident(pixel_values).class_queries_logits.softmax(-1)[..., -1]
    inputs = processor(text=["lamp", ["couch", "sofa"], "red disc"], return_tensors="pt")
    outputs = model(pixel_values, **inputs)
    assert outputs.class_queries_logits.shape == (2, 20, 4) and outputs.query_embeds.shape == (2, 20, 16)
    torch.testing.assert_close(outputs.query_embeds.norm(dim=-1), torch.ones(2, 20))
    probabilities = outputs.class_queries_logits.softmax(-1)
    assert (probabilities[..., -1] >= no_object - 1e-3).all()
    again = model.classify(outputs.query_embeds, **model.get_class_embeddings(**inputs))
    torch.testing.assert_close(again.softmax(-1), probabilities, rtol=0, atol=1e-4)
    sofa = confident(pixel_values).class_queries_logits.softmax(-1)[..., NAMES.index("sofa")]
    torch.testing.assert_close(probabilities[..., 1].clamp(max=1), probabilities[..., 1].maximum(sofa - 1e-3))
    for reduction in ("max", "embedding_mean"):
        assert model(pixel_values, **inputs, prompt_reduction=reduction).class_queries_logits.isfinite().all()


def test_converted_model_can_be_fine_tuned(confident, text_model, processor):
    """All weights except the class embeddings have gradients; the head alone learns to classify under other names."""
    model = from_mask2former(confident, text_model, word_tokenizer()).train()
    words = processor(text=["couch", "star", "lamp"], return_tensors="pt")
    labels = {
        "mask_labels": [torch.zeros(2, 64, 96).index_fill_(1, torch.arange(32), 1.0)],
        "class_labels": [torch.tensor([0, 2])],
    }
    pixel_values = torch.randn(1, 3, 64, 96)
    frozen = {name: buffer.clone() for name, buffer in model.classifier.named_buffers()}
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = model(pixel_values, **words, **labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Some backbones of transformers have a final normalization that affects no feature map.
    assert [name for name, p in trainable.items() if p.grad is None and "backbone" not in name] == []
    assert not any("text_model" in name for name in trainable)
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.classifier.named_buffers())


def test_class_names_come_from_source_or_argument(named, text_model):
    kinds = [index % 2 == 0 for index in range(len(NAMES))]
    names = [["sofa", "couch"] if name == "sofa" else [name] for name in NAMES]
    model = from_mask2former(named, text_model, word_tokenizer(), Vocabulary(names, is_thing=kinds))
    assert model.config.source_vocabulary == model.config.vocabulary == names
    assert model.config.vocabulary_is_thing == kinds
    named.config.id2label = {index: f"LABEL_{index}" for index in range(len(NAMES))}
    with pytest.raises(ValueError, match="no names for its 12 classes: give them as `class_names`"):
        from_mask2former(named, text_model, word_tokenizer())
    for names in (NAMES[:-1], [*NAMES, "lamp"]):
        with pytest.raises(ValueError, match=f"`class_names` has {len(names)} classes, but the source has 12"):
            from_mask2former(named, text_model, word_tokenizer(), names)
    with pytest.raises(ValueError, match="`class_names` need the `tokenizer`"):
        from_mask2former(named, text_model, class_names=NAMES)
    with pytest.raises(ValueError, match="tokenizer has 40 tokens, but the text encoder has 32"):
        from_mask2former(named, text_model, word_tokenizer(" ".join(f"word{index}" for index in range(36))), NAMES)


def test_conversion_without_tokenizer_has_random_projection(named, text_model):
    model = from_mask2former(named, text_model)
    assert model.config.classifier == "projection" and model.config.vocabulary is None
    assert model.classifier.no_object_embedding.requires_grad
