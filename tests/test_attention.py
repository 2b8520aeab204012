"""Tests of attention weights, hidden states and attention implementations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from modeling_gkc import CLIPResNetConfig, GKCForOpenVocabSegmentation, GKCModel
from modeling_gkc.conversion import from_mask2former
from modeling_gkc.mask_decoder import GKCAttention
from modeling_gkc.modeling_clip_resnet import CLIPResNetAttentionPooling
from modeling_gkc.pixel_decoder import sine_position_embedding

from .common_models import (
    CASES,
    SEGMENTERS,
    WITH_ATTENTION,
    Case,
    image_inputs,
    largest_difference,
    resnet_config,
    run,
    segmenter_inputs,
    tiny_config,
)


@pytest.fixture(params=SEGMENTERS)
def segmenter(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=WITH_ATTENTION)
def attentive(request) -> Case:
    return CASES[request.param]


class TestAttention:
    """Tests of attention weights and attention implementations."""

    def test_attention_outputs(self, attentive):
        inputs = attentive.inputs()
        model = attentive.model_class._from_config(attentive.config(), attn_implementation="eager").eval()
        by_argument = run(model, inputs, output_attentions=True)
        config = attentive.config()
        config.output_attentions = True
        by_config = run(attentive.model(config), inputs)
        plain = run(model, inputs)
        for outputs in (by_argument, by_config):
            assert list(outputs)[-1] == list(expected_attentions(attentive))[-1]
            for name, shapes in expected_attentions(attentive).items():
                assert [tuple(weights.shape) for weights in outputs[name]] == shapes
                for weights in outputs[name]:
                    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert set(by_argument) - set(plain) == set(expected_attentions(attentive))
        assert largest_difference(plain, {name: by_argument[name] for name in plain}) == 0

    def test_sdpa_returns_no_attention_weights(self, attentive, transformers_log):
        model, inputs = attentive.model(), attentive.inputs()
        assert model.config._attn_implementation == "sdpa"
        logging.get_logger("transformers").warning_once.cache_clear()
        plain = run(model, inputs)
        requested = run(model, inputs, output_attentions=True)
        assert list(requested) == list(plain) and largest_difference(plain, requested) == 0
        assert "set_attn_implementation('eager')" in transformers_log.text
        model.set_attn_implementation("eager")
        assert "attentions" in run(model, inputs, output_attentions=True)

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    def test_eager_matches_sdpa_inference(self, attentive, dtype, bound, within):
        """Double precision is tested only for layers of this library, because some of transformers compute in fp32."""
        model, inputs = attentive.model().to(dtype), attentive.inputs()
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        sdpa = run(model, inputs, output_hidden_states=True)
        model.set_attn_implementation("eager" if dtype == torch.float32 else {"": "eager"})
        error = largest_difference(sdpa, run(model, inputs, output_hidden_states=True))
        within(f"eager against SDPA, {str(dtype).removeprefix('torch.')}, max abs", error, bound)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_eager_matches_sdpa_inference_in_half_precision(self, dtype, within):
        """Test a single layer: with several, rounding errors would change the binary attention masks."""
        layer = GKCAttention(CASES["segmenter"].model().config).to(dtype)
        query, states = torch.randn(2, 10, 32, dtype=dtype), torch.randn(2, 24, 32, dtype=dtype)
        mask = torch.rand(2, 1, 10, 24) > 0.5
        with torch.no_grad():
            sdpa, _ = layer(query, states, states, mask)
            layer.config._attn_implementation = "eager"
            eager, _ = layer(query, states, states, mask)
        error = (sdpa - eager).float().norm() / sdpa.float().norm()
        within(f"eager against SDPA, one layer, {str(dtype).removeprefix('torch.')}, relative", error, 2e-2)

    def test_eager_matches_sdpa_gradients(self, within):
        model, inputs = CASES["segmenter"].model().double(), CASES["segmenter"].inputs()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        gradients = []
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            model.zero_grad()
            model(**inputs).masks_queries_logits.square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        within("gradients, eager against SDPA, float64, max abs", largest_difference(*gradients), 1e-12)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_query_with_an_empty_mask_attends_to_all_positions(self, implementation):
        """The softmax of a row without any visible position would be undefined."""
        decoder = CASES["segmenter"].model().model.mask_decoder
        decoder.layers[0].cross_attn.config._attn_implementation = implementation
        last = decoder.mask_embedder.layers[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(1.0)
        grids = [(2, 3), (4, 6), (8, 12)]
        levels = tuple(torch.randn(2, 32, *grid) for grid in grids)
        positions = tuple(sine_position_embedding(*grid, 32, torch.device("cpu"), torch.float32) for grid in grids)
        resized = [torch.full_like(level, -1.0) for level in levels]
        with torch.no_grad():
            stages = decoder(levels, resized, positions, output_attentions=implementation == "eager")
        assert all(stage.queries.isfinite().all() for stage in stages)
        if implementation == "eager":
            assert all((stage.cross_attention > 0).all() for stage in stages[1:])

    def test_cross_attention_is_restricted_to_the_previous_mask(self):
        model = GKCModel._from_config(tiny_config(), attn_implementation="eager").eval()
        inputs = image_inputs()
        outputs = run(model, inputs, output_attentions=True, output_stages=True)
        with torch.no_grad():
            features = model.pixel_decoder(model.backbone(**inputs).feature_maps).mask_features
            for index, weights in enumerate(outputs.cross_attentions):
                grid = [(2, 3), (4, 6), (8, 12)][index % 3]
                embeds = model.mask_decoder.mask_embedder(outputs.stages[index].last_hidden_state)
                # Interpolation is linear, so that resizing the full-size mask equals the decoder's computation.
                masks = torch.einsum("bqc,bchw->bqhw", embeds, features)
                logits = nn.functional.interpolate(masks, size=grid, mode="bilinear").flatten(2)
                sure = logits.abs() > 1e-4
                inside = (logits > 0) | ~(logits > 0).any(-1, keepdim=True)
                seen = weights[:, 0] > 0
                assert (seen == inside)[sure].all() and 0.01 < seen.float().mean() < 0.999

    @pytest.mark.parametrize("name", ["segmenter", "image encoder"])
    def test_attn_implementation_at_loading(self, name, tmp_path):
        model, inputs = CASES[name].model(), CASES[name].inputs()
        model.save_pretrained(tmp_path)
        expected = run(model, inputs)
        for implementation in ("eager", None):
            kwargs = {} if implementation is None else {"attn_implementation": implementation}
            loaded = type(model).from_pretrained(tmp_path, **kwargs)
            assert loaded.config._attn_implementation == (implementation or "sdpa")
            assert implementations_in_use(loaded, inputs) == {implementation or "sdpa"}
            assert largest_difference(expected, run(loaded, inputs)) < 1e-5

    def test_attn_implementation_composite_models(self, segmenter, tmp_path):
        """Set one implementation for all parts or one for each part; a backbone without SDPA keeps its own."""
        segmenter.model().save_pretrained(tmp_path)
        backbone = "eager" if segmenter.config is resnet_config else "sdpa"
        for requested, expected in (
            ({"": "eager", "text_config": "sdpa", "backbone_config": "eager"}, ["eager", "eager", "sdpa"]),
            ("eager", ["eager"] * 3),
            ("sdpa", ["sdpa", backbone, "sdpa"]),
        ):
            loaded = segmenter.model_class.from_pretrained(tmp_path, attn_implementation=requested)
            assert implementations_of(loaded.config) == expected

    def test_can_set_attention_dynamically(self, segmenter, transformers_log):
        model = segmenter.model()
        before = implementations_of(model.config)
        model.set_attn_implementation("eager")
        assert implementations_of(model.config) == ["eager"] * 3
        model.set_attn_implementation({"text_config": "sdpa"})
        assert implementations_of(model.config) == ["eager", "eager", "sdpa"]
        model.set_attn_implementation("sdpa")
        assert implementations_of(model.config) == before
        with pytest.raises(ValueError, match='"foo"'):
            model.set_attn_implementation("foo")
        assert implementations_of(model.config) == before
        image_path = GKCModel(segmenter.config())
        image_path.set_attn_implementation("eager")
        assert implementations_of(image_path.config) == ["eager"] * 3
        image_path.set_attn_implementation("sdpa")
        assert implementations_of(image_path.config) == before
        assert transformers_log.records == []

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_config_attn_implementation_setter(self, case):
        values = case.config().to_diff_dict() | {"attn_implementation": "eager"}
        config = type(case.config())(**values)
        for implementation in ("eager", "sdpa", "eager"):
            config._attn_implementation = implementation
            assert set(implementations_of(config)) == {implementation}

    def test_internal_model_config_and_subconfig_are_same(self, segmenter):
        model = segmenter.model()
        assert model.model.config is model.config
        assert model.model.backbone.config is model.config.backbone_config
        assert model.text_model.config is model.config.text_config

    @pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
    def test_attention_implementations_without_masks_raise_errors(self, attentive, implementation):
        with pytest.raises((ValueError, ImportError)):
            attentive.model().set_attn_implementation(implementation)

    def test_registered_attention_is_used(self, attentive):
        """Users add attention implementations with `AttentionInterface.register`."""
        calls = []

        def counted(module, query, key, value, attention_mask, **kwargs):
            calls.append(type(module))
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

        model, inputs = attentive.model(), attentive.inputs()
        expected = run(model, inputs)
        AttentionInterface.register("counted", counted)
        try:
            model.set_attn_implementation({"": "counted"})
            assert largest_difference(expected, run(model, inputs)) == 0
        finally:
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop("counted")
        layers = [type(layer) for layer in model.modules() if isinstance(layer, ATTENTION_LAYERS)]
        assert calls == layers and layers


ATTENTION_LAYERS = (GKCAttention, CLIPResNetAttentionPooling)


def expected_attentions(case: Case) -> dict[str, list[tuple[int, ...]]]:
    config = case.config()
    if isinstance(config, CLIPResNetConfig):
        return {"attentions": [(2, config.num_attention_heads, 1, 1 + 6)]}
    heads, queries, layers = config.num_attention_heads, config.num_queries, range(config.decoder_layers)
    return {
        "attentions": [(2, heads, queries, queries) for _ in layers],
        "cross_attentions": [(2, heads, queries, (6, 24, 96)[index % 3]) for index in layers],
    }


def implementations_of(config: Any) -> list[str]:
    parts = [config] if isinstance(config, CLIPResNetConfig) else [config, config.backbone_config, config.text_config]
    return [part._attn_implementation for part in parts]


def implementations_in_use(model: PreTrainedModel, inputs: dict[str, Tensor]) -> set[str]:
    """Return the implementations that the layers use: only eager attention returns weights."""
    seen, hooks = set(), []
    for layer in model.modules():
        if isinstance(layer, ATTENTION_LAYERS):
            hook = layer.register_forward_hook(lambda module, args, output: seen.add(output[1] is not None))
            hooks.append(hook)
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return {"eager" if has_weights else "sdpa" for has_weights in seen}


class TestHiddenStates:
    """Tests of the hidden states, which have the names and values of transformers' Mask2Former."""

    def test_hidden_states_equal_those_of_mask2former(self, within):
        source = mask2former()
        text = CLIPTextModelWithProjection(tiny_config().text_config)
        model = from_mask2former(source, text_model=text).model.double()
        source.double()
        model.set_attn_implementation({"": "eager"})
        pixel_values = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        requested = {"output_hidden_states": True, "output_attentions": True}
        theirs, ours = (run(module, {"pixel_values": pixel_values}, **requested) for module in (source.model, model))
        for name in ("encoder_hidden_states", "pixel_decoder_hidden_states", "attentions"):
            error = largest_difference(theirs[name], ours[name])
            within(f"{name} against transformers' Mask2Former, float64, max abs", error, 1e-9)
        queries = tuple(state.transpose(0, 1) for state in theirs.transformer_decoder_hidden_states)
        error = largest_difference(queries, ours.transformer_decoder_hidden_states)
        within("transformer_decoder_hidden_states against transformers' Mask2Former, float64, max abs", error, 1e-9)

    def test_segmenter_returns_the_hidden_states_of_the_image_path(self):
        model, inputs = eager_segmenter(), segmenter_inputs()
        requested = {"output_hidden_states": True, "output_attentions": True}
        whole, path = (
            run(model, inputs, **requested),
            run(model.model, {"pixel_values": inputs["pixel_values"]}, **requested),
        )
        names = [name for name in path if name.endswith(("hidden_states", "attentions"))]
        assert len(names) == 5
        assert largest_difference({n: whole[n] for n in names}, {n: path[n] for n in names}) == 0
        features = model.model.mask_decoder.layer_norm(path.transformer_decoder_hidden_states[-1])
        torch.testing.assert_close(features, path.last_hidden_state, rtol=0, atol=0)

    @pytest.mark.parametrize("requested", [{"output_hidden_states": True}, {"output_attentions": True}])
    def test_hidden_states_of_several_image_sizes_raise_errors(self, requested):
        model, inputs = eager_segmenter(), segmenter_inputs()
        pixel_mask = torch.ones(2, 64, 96)
        pixel_mask[1, :, 60:] = 0
        run(model, inputs, pixel_mask=pixel_mask)
        with pytest.raises(ValueError, match=r"\(64, 96\), \(64, 64\).*images of one size"):
            run(model, inputs, pixel_mask=pixel_mask, **requested)

    def test_hidden_states_exclude_the_padding(self):
        model, inputs = eager_segmenter(), segmenter_inputs()
        requested = {"output_hidden_states": True, "output_attentions": True, "output_stages": True}
        pixel_mask = torch.zeros(2, 64, 96)
        pixel_mask[:, :50, :60] = 1
        padded = run(model, inputs, pixel_mask=pixel_mask, **requested)
        alone = inputs | {"pixel_values": inputs["pixel_values"][..., :64]}
        expected = run(model, alone, pixel_mask=pixel_mask[..., :64], **requested)
        names = [name for name in expected if name.endswith(("hidden_states", "attentions"))]
        assert len(names) == 5 and padded.masks_queries_logits.shape[-1] == 24
        assert largest_difference({n: padded[n] for n in names}, {n: expected[n] for n in names}) == 0
        assert largest_difference(padded.class_queries_logits, expected.class_queries_logits) == 0

    def test_hidden_states_include_the_padding_in_training(self):
        model, inputs = eager_segmenter().train(), segmenter_inputs()
        pixel_mask = torch.ones(2, 64, 96)
        pixel_mask[1, :, 60:] = 0
        outputs = run(model, inputs, pixel_mask=pixel_mask, output_hidden_states=True)
        assert [tuple(state.shape[2:]) for state in outputs.encoder_hidden_states] == GRIDS


GRIDS = [(16, 24), (8, 12), (4, 6), (2, 3)]


def eager_segmenter() -> GKCForOpenVocabSegmentation:
    return GKCForOpenVocabSegmentation._from_config(tiny_config(), attn_implementation="eager").eval()


def mask2former() -> Mask2FormerForUniversalSegmentation:
    config = Mask2FormerConfig(
        backbone_config=resnet_config().backbone_config,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        dim_feedforward=64,
        encoder_layers=2,
        decoder_layers=5,
        num_attention_heads=4,
        num_queries=10,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)  # some releases start these near zero
    return model
