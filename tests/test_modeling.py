"""The segmenter as a transformers model: text in every form, freezing, stages, saving, batching."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    SwinConfig,
)

from modeling_gkc.configuration_gkc import CLIPResNetConfig, GKCConfig
from modeling_gkc.modeling_gkc import (
    GKCForOpenVocabSegmentation,
    average_class_embeds,
    pool_under_masks,
    reduce_prompt_logits,
)

from .conftest import small_config

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
    expected = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
    monkeypatch.setattr("modeling_gkc.modeling_gkc.PROMPTS_PER_PASS", 2)
    torch.testing.assert_close(model.get_text_features(tokens["input_ids"], tokens["attention_mask"]), expected)
    torch.testing.assert_close(model.get_text_features(tokens["input_ids"]), expected)


def test_text_must_come_in_exactly_one_form(model, tokens, pixel_values):
    embeds = model.get_class_embeddings(**tokens).class_embeds
    with pytest.raises(ValueError, match="not both"):
        model(pixel_values, class_embeds=embeds, **tokens)
    with pytest.raises(ValueError, match="No words"):
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


def test_reduction_errors():
    with pytest.raises(ValueError, match="'sum'"):
        reduce_prompt_logits(torch.zeros(1, 4), torch.arange(3), "sum")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        reduce_prompt_logits(torch.zeros(1, 4), torch.arange(4), "mean")


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
        cosine = F.cosine_similarity(query_embeds, model.no_object_embedding, dim=-1)
        torch.testing.assert_close(logits[..., -1], cosine * np.exp(2.6592), rtol=1e-5, atol=1e-5)
        model.logit_scale.fill_(50.0)
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


def test_batch_norm_trains_when_asked(tokens, pixel_values):
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


def test_last_stage_equals_inference(model, tokens, pixel_values):
    with torch.no_grad():
        stages = model(pixel_values, **tokens, output_stages=True).stages
        outputs = model(pixel_values, **tokens)
    torch.testing.assert_close(stages[-1].class_queries_logits, outputs.class_queries_logits, rtol=0, atol=0)
    torch.testing.assert_close(stages[-1].masks_queries_logits, outputs.masks_queries_logits, rtol=0, atol=0)


def test_padding_and_neighbours_do_not_change_a_result(model, tokens):
    sizes = [(64, 96), (50, 90), (96, 64), (33, 20)]
    images = [torch.randn(3, *size) for size in sizes]
    pixel_values, pixel_mask = torch.zeros(4, 3, 96, 96), torch.zeros(4, 96, 96, dtype=torch.long)
    for index, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        pixel_values[index, :, :height, :width] = image
        pixel_mask[index, :height, :width] = 1
    with torch.no_grad():
        together = model(pixel_values, pixel_mask=pixel_mask, **tokens)
        for index, (height, width) in enumerate(sizes):
            padded = [-(-length // 32) * 32 for length in (height, width)]
            alone = model(
                pixel_values[index : index + 1, :, : padded[0], : padded[1]],
                pixel_mask=pixel_mask[index : index + 1, : padded[0], : padded[1]],
                **tokens,
            )
            assert together.content_sizes[index].tolist() == alone.content_sizes[0].tolist() == [height, width]
            masks = together.masks_queries_logits[index, :, : padded[0] // 4, : padded[1] // 4]
            for actual, expected in (
                (together.class_queries_logits[index], alone.class_queries_logits[0]),
                (masks, alone.masks_queries_logits[0]),
            ):
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_feature", ["query", "pooled", "query+pooled"])
def test_class_features(class_feature, tokens, pixel_values):
    model = GKCForOpenVocabSegmentation(small_config(class_feature=class_feature)).eval()
    with torch.no_grad():
        outputs = model(pixel_values, **tokens)
    assert outputs.query_embeds.isfinite().all()


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
    fallback = model.class_embedder(stage)
    model.class_embedder.pooled_projection = None
    torch.testing.assert_close(fallback, model.class_embedder(stage))


def test_eager_and_sdpa_attention_agree(config, tokens, pixel_values, tmp_path):
    GKCForOpenVocabSegmentation(config).save_pretrained(tmp_path)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs.append(model(pixel_values, **tokens))
    torch.testing.assert_close(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits, rtol=0, atol=1e-5)


def test_save_and_load_every_door(model, tokens, pixel_values, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with torch.no_grad():
        expected = model(pixel_values, **tokens)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GKCConfig)
    doors = (GKCForOpenVocabSegmentation, AutoModel, AutoModelForUniversalSegmentation, AutoModelForImageSegmentation)
    with caplog.at_level(logging.WARNING):
        for door in doors:
            loaded = door.from_pretrained(tmp_path)
            assert isinstance(loaded, GKCForOpenVocabSegmentation) and not loaded.training
            assert not any(p.requires_grad for p in loaded.text_model.parameters())
            with torch.no_grad():
                outputs = loaded(pixel_values, **tokens)
            torch.testing.assert_close(outputs.class_queries_logits, expected.class_queries_logits, rtol=0, atol=0)
            torch.testing.assert_close(outputs.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_loading_reports_every_weight_that_does_not_fit(model, tmp_path, caplog):
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


def test_default_configuration_is_the_papers_r50_row():
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
        ({"backbone_config": {"model_type": "resnot"}}, "unknown model_type 'resnot'"),
        ({"text_config": GKCConfig()}, "CLIPTextConfig"),
        ({"vocabulary": [["dog"]]}, "set_vocabulary"),
    ],
)
def test_configuration_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        small_config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"depths": [1, 1, 1]}, "four positive"), ({"width": 7}, "even"), ({"num_attention_heads": 7}, "divisible")],
)
def test_clip_resnet_configuration_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CLIPResNetConfig(**values)


def test_configuration_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict() | {
        "_name_or_path": "",
        "transformers_version": AutoConfig.from_pretrained(tmp_path).transformers_version,
    }
