"""Tests of the segmentation model: vocabularies, frozen modules, stages, saving and loading, batches and padding."""

import copy
import gc
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    CLIPTextConfig,
    ResNetConfig,
    SwinConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_gkc import CLIPResNetConfig, GKCConfig, GKCImageProcessor, GKCModel, GKCProcessor
from modeling_gkc.modeling_gkc import (
    GKCForOpenVocabSegmentation,
    average_class_embeds,
    pool_under_masks,
    reduce_prompt_logits,
)
from modeling_gkc.pixel_decoder import MAX_CACHED_SHAPES, CachedByShape

from .conftest import aligned, small_config, word_tokenizer

NUM_PROMPTS = 5
CLASS_IDS = torch.tensor([0, 0, 1, 2, 2])


@pytest.fixture
def model(config) -> GKCForOpenVocabSegmentation:
    return GKCForOpenVocabSegmentation(config).eval()


@pytest.fixture
def tokens() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(4, 64, (NUM_PROMPTS, 6))
    input_ids[:, 0], input_ids[:, -1] = 1, 3
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "class_ids": CLASS_IDS}


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96)


def test_output_shapes(model, tokens, pixel_values):
    with torch.no_grad():
        outputs = model(pixel_values, **tokens)
    assert outputs.class_queries_logits.shape == (2, 10, 3 + 1)
    assert outputs.masks_queries_logits.shape == (2, 10, 16, 24)
    assert outputs.query_embeds.shape == (2, 10, 16)
    torch.testing.assert_close(outputs.query_embeds.norm(dim=-1), torch.ones(2, 10))
    assert outputs.loss is None and outputs.stages is None and outputs.matches is None


def test_cached_class_embeds_equal_tokens(model, tokens, pixel_values):
    embeds = model.get_class_embeddings(**tokens)
    with torch.no_grad():
        from_tokens = model(pixel_values, **tokens)
        cached = model(pixel_values, class_embeds=embeds.class_embeds, class_ids=embeds.class_ids)
    torch.testing.assert_close(cached.class_queries_logits, from_tokens.class_queries_logits, rtol=0, atol=0)


def test_many_prompts_are_encoded_in_passes(model, tokens, monkeypatch):
    expected = model.embed_prompts(tokens["input_ids"], tokens["attention_mask"])
    monkeypatch.setattr("modeling_gkc.open_vocabulary.PROMPTS_PER_PASS", 2)
    for mask in (tokens["attention_mask"], None):
        model.text_cache.clear()
        torch.testing.assert_close(model.embed_prompts(tokens["input_ids"], mask), expected)


def test_vocabulary_must_be_given_in_one_form(model, tokens, pixel_values):
    embeds = model.get_class_embeddings(**tokens).class_embeds
    with pytest.raises(ValueError, match="not both"):
        model(pixel_values, class_embeds=embeds, **tokens)
    with pytest.raises(ValueError, match="There is no vocabulary"):
        model(pixel_values)
    with pytest.raises(ValueError, match=r"\(prompts, 16\)"):
        model(pixel_values, class_embeds=embeds[:, :8])


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_prompt_logits_are_reduced_per_class(reduction):
    logits = torch.randn(2, 3, NUM_PROMPTS + 1, requires_grad=True)
    reduced = reduce_prompt_logits(logits, CLASS_IDS, reduction)
    reduce = {"mean": lambda x: x.mean(-1), "max": lambda x: x.amax(-1)}[reduction]
    expected = [reduce(logits[..., :-1][..., torch.eq(CLASS_IDS, index)]) for index in range(3)]
    torch.testing.assert_close(reduced, torch.stack([*expected, logits[..., -1]], dim=-1))
    reduced.sum().backward()
    assert logits.grad.isfinite().all()


def test_reduction_of_unordered_and_single_prompts():
    logits = torch.randn(4, 4)
    torch.testing.assert_close(reduce_prompt_logits(logits, torch.arange(3), "mean"), logits)
    swapped = reduce_prompt_logits(logits, torch.tensor([2, 0, 1]), "max")
    torch.testing.assert_close(swapped, logits[:, [1, 2, 0, 3]])


def test_invalid_reductions_raise_errors(model, pixel_values):
    with pytest.raises(ValueError, match="'sum'"):
        reduce_prompt_logits(torch.zeros(1, 4), torch.arange(3), "sum")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        reduce_prompt_logits(torch.zeros(1, 4), torch.arange(4), "mean")
    with pytest.raises(ValueError, match=r"missing \[1\]"):
        reduce_prompt_logits(torch.zeros(1, 4), torch.tensor([0, 2, 0]), "mean")
    for class_ids in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="contain every number from 0"):
            model(pixel_values, class_embeds=torch.randn(2, 16), class_ids=torch.tensor(class_ids))


def test_cached_queries_can_be_classified_by_another_vocabulary(model, tokens, pixel_values):
    embeds = model.get_class_embeddings(**tokens)
    with torch.no_grad():
        outputs = model(pixel_values, **tokens)
        for reduction in ("mean", "max", "embedding_mean"):
            again = model.classify(outputs.query_embeds, **embeds, prompt_reduction=reduction)
            direct = model(pixel_values, **tokens, prompt_reduction=reduction).class_queries_logits
            torch.testing.assert_close(again, direct, rtol=0, atol=1e-5)


def test_unused_and_misspelled_arguments_raise_errors(model, tokens, pixel_values):
    with pytest.raises(ValueError, match="need `input_ids`"):
        model(pixel_values, class_ids=CLASS_IDS)
    with pytest.raises(TypeError, match="class_embed"):
        model(pixel_values, class_embed=torch.randn(2, 16))
    labels = {"mask_labels": [torch.ones(1, 17, 5)] * 2, "class_labels": [torch.tensor([0])] * 2}
    with pytest.raises(ValueError, match=r"Sample 0.*\(17, 5\)"):
        model(pixel_values, **tokens, **labels)


def test_initial_weights(config):
    """Check the published initialization: rings of offsets, uniform attention, embeddings of unit variance."""
    model = GKCForOpenVocabSegmentation(config)
    attention = model.model.pixel_decoder.layers[0].self_attn
    assert (attention.sampling_offsets.weight == 0).all() and (attention.attention_weights.weight == 0).all()
    offsets = attention.sampling_offsets.bias.view(config.num_attention_heads, 3, config.encoder_num_points, 2)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[2, 1, :2], torch.tensor([[-1.0, 0], [-2, 0]]), atol=1e-6, rtol=0)
    for embedding in (model.model.mask_decoder.query_features.weight, model.classifier.no_object_embedding):
        assert 0.6 < embedding.std() < 1.4


def test_pickled_weights_are_loaded_only_on_request(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        GKCForOpenVocabSegmentation.from_pretrained(tmp_path)
    loaded = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(loaded.classifier.no_object_embedding, model.classifier.no_object_embedding)


def test_missing_weights_are_initialized(config, tmp_path):
    GKCForOpenVocabSegmentation(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "mask_decoder" not in name and "text" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.6 < model.model.mask_decoder.query_features.weight.std() < 1.4
    for name, weight in kept.items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_models_of_one_configuration_do_not_share_vocabularies(config, tmp_path):
    processor = GKCProcessor(GKCImageProcessor(), word_tokenizer())
    first, second = GKCForOpenVocabSegmentation(config), GKCForOpenVocabSegmentation(config)
    first.set_vocabulary("red disc; lawn, grass", processor)
    assert second.config.vocabulary is None and config.vocabulary is None
    second.save_pretrained(tmp_path)
    assert GKCForOpenVocabSegmentation.from_pretrained(tmp_path).vocabulary_embeds is None


def test_reference_points_keep_their_precision_in_bf16(tokens):
    model = GKCForOpenVocabSegmentation(small_config()).eval()
    seen = []
    layer = model.model.pixel_decoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    with torch.no_grad():
        model.bfloat16()(torch.randn(1, 3, 64, 96, dtype=torch.bfloat16), class_embeds=torch.randn(2, 16))
    assert seen[0].dtype == torch.float32


def test_backbone_of_other_strides_raises_an_error(tokens, pixel_values):
    flat = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic")
    flat.downsample_in_first_stage = True
    flat.out_features = ["stage1", "stage2", "stage3", "stage4"]
    model = GKCForOpenVocabSegmentation(small_config(backbone_config=flat)).eval()
    with pytest.raises(ValueError, match="strides 4, 8, 16 and 32"):
        model(pixel_values, **tokens)


def test_embedding_mean_averages_embeddings(model, tokens, pixel_values):
    embeds = model.get_class_embeddings(**tokens)
    averaged = torch.stack([F.normalize(embeds.class_embeds[torch.eq(CLASS_IDS, k)].sum(0), dim=-1) for k in range(3)])
    torch.testing.assert_close(average_class_embeds(embeds.class_embeds, CLASS_IDS), averaged)
    with torch.no_grad():
        by_option = model(pixel_values, prompt_reduction="embedding_mean", **tokens).class_queries_logits
        by_hand = model(pixel_values, class_embeds=averaged).class_queries_logits
    torch.testing.assert_close(by_option, by_hand)
    with pytest.raises(ValueError, match="median"):
        model(pixel_values, prompt_reduction="median", **tokens)


def test_logits_are_scaled_cosines_and_the_temperature_is_clamped(model, tokens, pixel_values):
    embeds = model.get_class_embeddings(**tokens).class_embeds
    query_embeds = F.normalize(torch.randn(1, 2, 16), dim=-1)
    with torch.no_grad():
        logits = model.class_logits(query_embeds, embeds)
        torch.testing.assert_close(logits[..., :-1], query_embeds @ embeds.T * np.exp(2.6592), rtol=1e-5, atol=1e-5)
        cosine = F.cosine_similarity(query_embeds, model.classifier.no_object_embedding, dim=-1)
        torch.testing.assert_close(logits[..., -1], cosine * np.exp(2.6592), rtol=1e-5, atol=1e-5)
        model.classifier.logit_scale.fill_(50.0)
        assert model.temperature == 100.0
        assert model.class_logits(query_embeds, embeds).abs().max() <= 100.001


def test_training_freezes_the_text_tower_and_batch_norm(model, tokens, pixel_values):
    model.train()
    assert model.training and not any(module.training for module in model.text_model.modules())
    assert not any(p.requires_grad for p in model.text_model.parameters())
    norms = [m for m in model.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    statistics = [norm.running_mean.clone() for norm in norms]
    text_before = {name: p.clone() for name, p in model.text_model.named_parameters()}
    labels = {"mask_labels": [torch.ones(1, 64, 96)] * 2, "class_labels": [torch.tensor([1])] * 2}
    model(pixel_values, **tokens, **labels).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.1).step()
    assert all(p.grad is None for p in model.text_model.parameters())
    assert all(torch.equal(p, text_before[name]) for name, p in model.text_model.named_parameters())
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, statistics, strict=True))


def test_frozen_modules_are_frozen_after_construction(config):
    for model in (GKCForOpenVocabSegmentation(config), GKCModel(config).train()):
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert model.training and norms and not any(norm.training for norm in norms)
    assert not any(m.training for m in GKCForOpenVocabSegmentation(config).text_model.modules())
    trained = GKCModel(small_config(freeze_backbone_batch_norm=False))
    assert all(m.training for m in trained.modules())


def test_batch_norm_can_be_trained(tokens, pixel_values):
    model = GKCForOpenVocabSegmentation(small_config(freeze_backbone_batch_norm=False)).train()
    norm = next(m for m in model.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(pixel_values, **tokens)
    assert not torch.equal(norm.running_mean, before)


def test_every_trainable_parameter_gets_a_gradient(tokens, pixel_values):
    for class_feature in ("query", "query+pooled"):
        model = GKCForOpenVocabSegmentation(small_config(class_feature=class_feature)).train()
        masks = (torch.rand(2, 64, 96) > 0.5).float()
        labels = {"mask_labels": [masks] * 2, "class_labels": [torch.tensor([0, 2])] * 2}
        model(pixel_values, **tokens, **labels).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_labels_give_losses_of_every_stage(model, tokens, pixel_values):
    mask_labels = [(torch.rand(3, 64, 96) > 0.5).float(), torch.zeros(0, 64, 96)]
    class_labels = [torch.tensor([0, 1, 2]), torch.zeros(0, dtype=torch.long)]
    outputs = model(pixel_values, **tokens, mask_labels=mask_labels, class_labels=class_labels)
    stages = model.config.decoder_layers + 1
    bases = ("loss_cross_entropy", "loss_mask", "loss_dice")
    assert set(outputs.loss_dict) == {b + s for b in bases for s in ["", *(f"_{i}" for i in range(stages - 1))]}
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    total = sum(
        weights[name if name in weights else name.rsplit("_", 1)[0]] * loss for name, loss in outputs.loss_dict.items()
    )
    torch.testing.assert_close(outputs.loss, total)
    assert len(outputs.stages) == len(outputs.matches) == stages
    assert [len(queries) for queries, _ in outputs.matches[0]] == [3, 0]
    with pytest.raises(ValueError, match="together"):
        model(pixel_values, **tokens, mask_labels=mask_labels)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
def test_stacked_labels_equal_lists_of_them(model, tokens, training, size):
    pixel_values = torch.rand(2, 3, *size)
    labels = {"mask_labels": (torch.rand(2, 3, *size) > 0.5).float(), "class_labels": torch.tensor([[0, 1, 2]] * 2)}
    losses = []
    for given in (labels, {name: list(value) for name, value in labels.items()}):
        torch.manual_seed(0)
        losses.append(model.train(training)(pixel_values, **tokens, **given).loss)
    assert torch.equal(*losses)


def test_text_features_equal_the_text_towers_output(model, tokens):
    words = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    features = model.get_text_features(**words, output_hidden_states=True)
    expected = model.text_model(**words, output_hidden_states=True)
    assert isinstance(features, BaseModelOutputWithPooling) and features.attentions is None
    assert torch.equal(features.pooler_output, expected.text_embeds)
    assert torch.equal(features.last_hidden_state, expected.last_hidden_state)
    assert len(features.hidden_states) == len(expected.hidden_states) > 1
    assert torch.equal(model.get_text_features(**words, return_dict=False)[1], features.pooler_output)
    embeds = torch.nn.functional.normalize(features.pooler_output, dim=-1)
    torch.testing.assert_close(model.embed_prompts(**words), embeds)
    model.set_attn_implementation("eager")
    assert len(model.get_text_features(**words, output_attentions=True).attentions) == 1


def test_last_stage_equals_inference(model, tokens, pixel_values):
    with torch.no_grad():
        stages = model(pixel_values, **tokens, output_stages=True).stages
        outputs = model(pixel_values, **tokens)
    torch.testing.assert_close(stages[-1].class_queries_logits, outputs.class_queries_logits, rtol=0, atol=0)
    torch.testing.assert_close(stages[-1].masks_queries_logits, outputs.masks_queries_logits, rtol=0, atol=0)


def padded_batch(sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images of these sizes in one batch of 96 x 96 in double precision, and its pixel mask."""
    pixel_values = torch.zeros(len(sizes), 3, 96, 96, dtype=torch.float64)
    pixel_mask = torch.zeros(len(sizes), 96, 96, dtype=torch.long)
    for index, (height, width) in enumerate(sizes):
        pixel_values[index, :, :height, :width] = torch.randn(3, height, width)
        pixel_mask[index, :height, :width] = 1
    return pixel_values, pixel_mask


@torch.no_grad()
@pytest.mark.parametrize("output_stages", [False, True])
def test_results_do_not_depend_on_padding_and_batch(model, tokens, output_stages, within):
    """Compare in double precision, because rounding errors depend on the batch size."""
    model.double()
    sizes = [(64, 96), (50, 90), (96, 64), (33, 20)]
    pixel_values, pixel_mask = padded_batch(sizes)
    together = model(pixel_values, pixel_mask=pixel_mask, output_stages=output_stages, **tokens)
    for index, (height, width) in enumerate(sizes):
        padded = slice(-(-height // 32) * 32), slice(-(-width // 32) * 32)
        one = pixel_values[index : index + 1, :, padded[0], padded[1]], pixel_mask[index : index + 1, *padded]
        alone = model(one[0], pixel_mask=one[1], output_stages=output_stages, **tokens)
        assert together.content_sizes[index].tolist() == alone.content_sizes[0].tolist() == [height, width]
        pairs = [(together, alone), *zip(together.stages or (), alone.stages or (), strict=True)]
        for batch, single in pairs:
            rows, columns = single.masks_queries_logits.shape[-2:]
            error = (batch.class_queries_logits[index] - single.class_queries_logits[0]).abs().max()
            within("a batch against its single images, double precision, max abs", error, 1e-9)
            masks = batch.masks_queries_logits[index, :, :rows, :columns]
            error = (masks - single.masks_queries_logits[0]).abs().max()
            within("a batch against its single images, double precision, max abs", error, 1e-9)


def test_evaluation_losses_do_not_depend_on_padding(tokens, within):
    """Points are sampled from the padded input, so that the losses are close, but not equal."""
    model = GKCForOpenVocabSegmentation(small_config(train_num_points=200000, oversample_ratio=1.0)).eval()
    image, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    losses = []
    for side in (64, 256):
        padding = (0, side - 64, 0, side - 64)
        pixel_mask = F.pad(torch.ones(1, 64, 64), padding)
        labels = {"mask_labels": [F.pad(mask, padding)], "class_labels": [torch.tensor([1])]}
        with torch.no_grad():
            losses.append(model(F.pad(image, padding), pixel_mask, **tokens, **labels).loss_dict["loss_dice"])
    within("dice loss of an image in 16 times its size, against alone", (losses[0] - losses[1]).abs(), 0.03)


@pytest.mark.parametrize(
    ("pixel_mask", "message"),
    [
        (torch.ones(1, 64, 96), r"must have shape \(2, 64, 96\), as the images, got \(1, 64, 96\)"),
        (torch.ones(2, 32, 32), "must have shape"),
        (torch.cat([torch.ones(2, 64, 40), torch.zeros(2, 64, 16), torch.ones(2, 64, 40)], dim=2), "rectangle"),
        (torch.full((2, 64, 96), 2), "must be 1 inside the image and 0 in the padding"),
        (torch.full((2, 64, 96), 0.5), "must be 1 inside the image and 0 in the padding"),
    ],
)
def test_invalid_pixel_masks_raise_errors(model, tokens, pixel_values, pixel_mask, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values, pixel_mask, **tokens)


def test_empty_images_raise_errors(model, tokens):
    pixel_values, pixel_mask = padded_batch([(64, 96), (32, 32)])
    pixel_mask[1] = 0
    with pytest.raises(ValueError, match="image 1 is empty"):
        model(pixel_values.float(), pixel_mask=pixel_mask, **tokens)


@torch.no_grad()
@pytest.mark.parametrize("size", [(70, 70), (65, 97), (31, 33)])
def test_inputs_of_any_size_are_padded_and_post_processed_at_their_size(model, tokens, size):
    outputs = model(torch.randn(1, 3, *size), **tokens)
    assert outputs.content_sizes.tolist() == [list(size)]
    assert [4 * side for side in outputs.masks_queries_logits.shape[-2:]] == [-(-side // 32) * 32 for side in size]
    for target_size in (size, (40, 50)):
        (labels,) = GKCImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[target_size])
        assert labels.shape == target_size


@torch.no_grad()
def test_padding_by_the_model_equals_padding_by_the_processor(model, tokens):
    image = torch.randn(1, 3, 70, 50)
    padded = F.pad(image, (0, 14, 0, 26))
    mask = F.pad(torch.ones(1, 70, 50), (0, 14, 0, 26))
    here, there = model(image, **tokens), model(padded, pixel_mask=mask, **tokens)
    torch.testing.assert_close(here.masks_queries_logits, there.masks_queries_logits, rtol=0, atol=0)
    assert here.content_sizes.tolist() == there.content_sizes.tolist()


@pytest.mark.parametrize("class_feature", ["query", "pooled", "query+pooled"])
def test_class_features(class_feature, pixel_values):
    """The class logits depend on the query, on the pooled features, or on both."""
    model = GKCForOpenVocabSegmentation(small_config(class_feature=class_feature)).eval()
    stage = model.model(pixel_values, output_stages=False)
    if class_feature != "query":
        stage.mask_is_empty = torch.zeros_like(stage.mask_is_empty)
    assert (stage.pooled_features is None) == (class_feature == "query")
    parts = {"query": "last_hidden_state", "pooled": "pooled_features"}
    before = model.classifier.embed_queries(stage)
    for part, name in parts.items():
        value = getattr(stage, name)
        if value is None:
            continue
        stage[name] = value + torch.randn_like(value)
        changed = not torch.allclose(model.classifier.embed_queries(stage), before, atol=1e-4)
        stage[name] = value
        assert changed == (part in class_feature.split("+"))


def test_pooling_averages_under_the_mask_and_reports_empty_masks():
    masks = torch.full((1, 2, 8, 8), -50.0)
    masks[0, 0, 2:6, 0:4] = 50.0
    features = torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)
    pooled, is_empty = pool_under_masks(masks, features)
    assert is_empty.tolist() == [[False, True]]
    torch.testing.assert_close(pooled[0, 0, :3], features[0][0, :, 2:6, 0:4].mean(dim=(1, 2)))
    torch.testing.assert_close(pooled[0, 0, 3:], features[1][0, :, 1:3, 0:2].mean(dim=(1, 2)))
    assert pooled.isfinite().all()


def test_empty_mask_falls_back_to_the_query(pixel_values):
    model = GKCForOpenVocabSegmentation(small_config(class_feature="query+pooled")).eval()
    stage = model.model(pixel_values, output_stages=False)
    stage.mask_is_empty = torch.ones_like(stage.mask_is_empty)
    fallback = model.classifier.embed_queries(stage)
    model.classifier.pooled_projection = None
    torch.testing.assert_close(fallback, model.classifier.embed_queries(stage))


def test_eager_and_sdpa_attention_agree(config, tokens, pixel_values, tmp_path):
    GKCForOpenVocabSegmentation(config).save_pretrained(tmp_path)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs.append(model(pixel_values, **tokens))
    torch.testing.assert_close(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits, rtol=0, atol=1e-5)


def test_save_and_load_with_auto_classes(model, tokens, pixel_values, tmp_path, transformers_log):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with torch.no_grad():
        expected = model(pixel_values, **tokens)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GKCConfig)
    doors = (GKCForOpenVocabSegmentation, AutoModel, AutoModelForUniversalSegmentation, AutoModelForImageSegmentation)
    with transformers_log.at_level(logging.WARNING):
        for door in doors:
            loaded = aligned(door.from_pretrained(tmp_path))
            assert isinstance(loaded, GKCForOpenVocabSegmentation) and not loaded.training
            assert not any(p.requires_grad for p in loaded.text_model.parameters())
            with torch.no_grad():
                outputs = loaded(pixel_values, **tokens)
            torch.testing.assert_close(outputs.class_queries_logits, expected.class_queries_logits, rtol=0, atol=0)
            torch.testing.assert_close(outputs.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=0)
    assert [record for record in transformers_log.records if record.levelno >= logging.WARNING] == []


def test_text_embeddings_after_loading_differ_only_by_rounding(model, pixel_values, tmp_path, within):
    """A single prompt is a matrix-vector product, whose rounding depends on the memory alignment of the weights."""
    model.save_pretrained(tmp_path)
    mapped, copied = (GKCForOpenVocabSegmentation.from_pretrained(tmp_path).eval() for _ in range(2))
    aligned(copied)
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in mapped.state_dict().items())
    word = {"input_ids": torch.tensor([[1, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected, near, equal = (each(pixel_values, **word) for each in (model, mapped, copied))
    for name in ("query_embeds", "class_queries_logits", "masks_queries_logits"):
        assert torch.equal(equal[name], expected[name])
        within(f"{name} of mapped against aligned weights", (near[name] - expected[name]).abs().max(), 2e-5)


def test_loading_reports_mismatched_weights(model, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    other = small_config(num_queries=12)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GKCForOpenVocabSegmentation.from_pretrained(tmp_path, config=other)
    assert "mask_decoder.query_features.weight" in caplog.text and "mask_decoder.query_positions.weight" in caplog.text


def test_swin_backbone(tokens, pixel_values):
    backbone = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    model = GKCForOpenVocabSegmentation(small_config(backbone_config=backbone)).eval()
    with torch.no_grad():
        assert model(pixel_values, **tokens).masks_queries_logits.shape == (2, 10, 16, 24)


def test_default_configuration_equals_the_papers_r50_model():
    config = GKCConfig()
    assert isinstance(config.backbone_config, CLIPResNetConfig) and config.projection_dim == 1024
    with torch.device("meta"):
        model = GKCForOpenVocabSegmentation(config)
    assert model.model.backbone.channels == [256, 512, 1024, 2048]
    assert len(model.model.pixel_decoder.layers) == 6 and len(model.model.mask_decoder.layers) == 9
    assert (config.num_queries, config.no_object_weight, config.train_num_points) == (100, 0.1, 12544)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 40}, "multiple of 32"),
        ({"num_attention_heads": 5}, "divisible by"),
        ({"num_queries": 0}, "`num_queries` must be positive"),
        ({"class_feature": "mask"}, "query, pooled, query\\+pooled"),
        ({"prompt_reduction": "sum"}, "mean, max, embedding_mean"),
        ({"importance_sample_ratio": 1.5}, "between 0 and 1"),
        ({"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}, "four feature maps"),
        (
            {"backbone_config": {"model_type": "resnet", "out_features": ["stem", "stage1", "stage2", "stage3"]}},
            "stem",
        ),
        ({"backbone_config": {"model_type": "resnot"}}, "unknown model_type 'resnot'"),
        ({"vocabulary_is_thing": [True]}, "vocabulary_is_thing"),
        ({"text_config": GKCConfig()}, "CLIPTextConfig"),
        ({"vocabulary": [["dog"]]}, "set_vocabulary"),
    ],
)
def test_invalid_configurations_raise_errors(values, message):
    with pytest.raises(ValueError, match=message):
        small_config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"depths": [1, 1, 1]}, "four positive"), ({"width": 7}, "even"), ({"num_attention_heads": 7}, "divisible")],
)
def test_invalid_clip_resnet_configurations_raise_errors(values, message):
    with pytest.raises(ValueError, match=message):
        CLIPResNetConfig(**values)


def test_saved_configuration_contains_no_path(tmp_path):
    CLIPResNetConfig(width=8, depths=[1, 1, 1, 1], num_attention_heads=4).save_pretrained(tmp_path / "vision")
    CLIPTextConfig(projection_dim=16, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "text")
    vision, text = AutoConfig.from_pretrained(tmp_path / "vision"), CLIPTextConfig.from_pretrained(tmp_path / "text")
    for backbone_config, text_config in ((vision, text), (vision.to_dict(), text.to_dict())):
        small_config(backbone_config=backbone_config, text_config=text_config).save_pretrained(tmp_path / "model")
        assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_configuration_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict() | {
        "_name_or_path": "",
        "transformers_version": AutoConfig.from_pretrained(tmp_path).transformers_version,
    }


class TestCachedByShape:
    """Tests of the cache of position embeddings and sampling grids."""

    @pytest.fixture
    def made(self) -> list[tuple]:
        return []

    @pytest.fixture
    def ramp(self, made) -> CachedByShape:
        class Ramp(CachedByShape):
            def compute(self, length: int, dtype: torch.dtype) -> torch.Tensor:
                made.append((length, dtype))
                return torch.arange(length, dtype=dtype)

        return Ramp()

    def test_each_shape_and_dtype_is_computed_once(self, ramp, made):
        first = ramp(3, torch.float32)
        assert ramp(3, torch.float32) is first and ramp(3, torch.float64).dtype == torch.float64
        assert ramp(4, torch.float32).tolist() == [0, 1, 2, 3]
        assert made == [(3, torch.float32), (3, torch.float64), (4, torch.float32)]

    def test_only_the_last_shapes_are_cached(self, ramp, made):
        for length in (*range(MAX_CACHED_SHAPES + 1), MAX_CACHED_SHAPES, 0):
            ramp(length, torch.float32)
        assert [length for length, _ in made] == [*range(MAX_CACHED_SHAPES + 1), 0]

    def test_outputs_cached_in_inference_mode_can_be_used_in_training(self, ramp):
        with torch.inference_mode():
            ramp(3, torch.float32)
        weight = torch.ones(3, requires_grad=True)
        (weight * ramp(3, torch.float32)).sum().backward()
        assert weight.grad.tolist() == [0, 1, 2]

    def test_tracing_leaves_no_outputs_in_the_cache(self, ramp, made):
        with FakeTensorMode():
            assert type(ramp(3, torch.float32)) is FakeTensor
        assert type(ramp(3, torch.float32)) is torch.Tensor
        compiled = torch.compile(lambda tensor: tensor + ramp(5, torch.float32), backend="eager", fullgraph=True)
        compiled(torch.zeros(5))
        assert ramp(5, torch.float32).tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        "end",
        [
            lambda model: None,
            lambda model: model.to("meta"),
            lambda model: model.double(),
            lambda model: copy.deepcopy(model),
            lambda model: pickle.loads(pickle.dumps(model)),
        ],
        ids=["deleted", "moved", "cast", "copied", "pickled"],
    )
    def test_cached_outputs_are_freed_with_the_model(self, pixel_values, end):
        model = GKCModel(small_config()).eval()
        with torch.no_grad():
            model(pixel_values)
        caches = [module for module in model.modules() if isinstance(module, CachedByShape)]
        kept = [weakref.ref(tensor) for module in caches for tensor in module._outputs.values()]
        assert len(caches) == len(kept) == 2
        left = end(model)
        if left is not None:
            caches = [module for module in left.modules() if isinstance(module, CachedByShape)]
            assert len(caches) == 2 and not any(module._outputs for module in caches)
        del model, caches, left
        gc.collect()
        assert [reference() for reference in kept] == [None, None]
