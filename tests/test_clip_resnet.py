"""Tests of CLIP's ResNet against recorded outputs of the published image encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoModel

from modeling_gkc.configuration_gkc import CLIPResNetConfig
from modeling_gkc.conversion import clip_resnet_from_openai
from modeling_gkc.modeling_clip_resnet import CLIPResNetBackbone, CLIPResNetConvLayer, CLIPResNetVisionModel

GOLDEN = Path(__file__).parent / "golden" / "clip_resnet.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def model(golden) -> CLIPResNetVisionModel:
    return clip_resnet_from_openai({name: value for name, value in golden.items() if name.startswith("visual.")})


@pytest.fixture
def assert_golden(within):
    def check(actual, expected):
        assert actual.shape == expected.shape
        within("CLIP ResNet against recorded outputs, max abs", (actual - expected).abs().max(), 1e-5)

    return check


def test_configuration_is_derived_from_the_weights(model, golden):
    width, *depths, image_size, projection_dim = golden["meta"].tolist()
    config = model.config
    assert (config.width, config.depths, config.image_size, config.projection_dim) == (
        width,
        depths,
        image_size,
        projection_dim,
    )


@torch.no_grad()
def test_stages_and_embeddings(model, golden, assert_golden):
    outputs = model(golden["input"], output_dense_embeds=True, output_hidden_states=True)
    for stage in range(1, 5):
        assert_golden(outputs.hidden_states[stage], golden[f"stage{stage}"])
    assert_golden(outputs.image_embeds, golden["out_attn_g"])
    assert_golden(outputs.dense_embeds, golden["out_attn_l"])


@torch.no_grad()
def test_position_embeddings_are_resized_for_other_sizes(model, golden, assert_golden):
    outputs = model(golden["input_large"], output_dense_embeds=True)
    assert_golden(outputs.last_hidden_state, golden["large_res5"])
    assert_golden(outputs.image_embeds, golden["large_attn_g"])
    assert_golden(outputs.dense_embeds, golden["large_attn_l"])


@torch.no_grad()
def test_dense_embeddings_do_not_change_the_image_embedding(model, golden, assert_golden):
    assert_golden(model(golden["input"]).image_embeds, golden["out_attn_g"])


@torch.no_grad()
def test_backbone_returns_the_feature_maps_of_the_stages(model, golden, assert_golden):
    backbone = AutoBackbone.from_config(model.config).eval()
    assert isinstance(backbone, CLIPResNetBackbone)
    backbone.encoder.load_state_dict(model.encoder.state_dict())
    feature_maps = backbone(golden["input"]).feature_maps
    strides = [64 // feature_map.shape[-1] for feature_map in feature_maps]
    assert strides == [4, 8, 16, 32]
    assert backbone.channels == [feature_map.shape[1] for feature_map in feature_maps]
    for stage, feature_map in enumerate(feature_maps, start=1):
        assert_golden(feature_map, golden[f"stage{stage}"])


def test_save_and_load(model, tmp_path, golden):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(golden["input"]).image_embeds, model(golden["input"]).image_embeds, rtol=0, atol=0
        )


def test_published_parameter_counts():
    """OpenAI's image encoders have 38.3 M (RN50) and 56.3 M (RN101) parameters, without BatchNorm statistics."""
    published = {(3, 4, 6, 3, 1024): 38_316_896, (3, 4, 23, 3, 512): 56_259_936}
    for (*depths, projection_dim), count in published.items():
        with torch.device("meta"):
            tower = CLIPResNetVisionModel(CLIPResNetConfig(depths=depths, projection_dim=projection_dim))
        assert sum(parameter.numel() for parameter in tower.parameters()) == count


def test_weights_of_other_models_raise_an_error(golden):
    with pytest.raises(ValueError, match="not the weights of a CLIP ResNet"):
        clip_resnet_from_openai({"visual.conv1.weight": golden["visual.conv1.weight"]})
    weights = {name: value for name, value in golden.items() if name.startswith("visual.")}
    weights.pop("visual.layer2.0.conv2.weight")
    weights["visual.layer2.0.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"spatial\.convolution\.weight.*extra"):
        clip_resnet_from_openai(weights)


class TestFolding:
    """Tests of folding BatchNorm with fixed statistics into convolutions during training."""

    @pytest.fixture
    def layer(self) -> CLIPResNetConvLayer:
        layer = CLIPResNetConvLayer(4, 6, 3, stride=2)
        normalization = layer.normalization.eval()
        for statistic in (normalization.weight, normalization.running_var):
            nn.init.uniform_(statistic, 0.5, 2)
        for statistic in (normalization.bias, normalization.running_mean):
            nn.init.normal_(statistic)
        return layer.double()

    def test_folding_changes_neither_values_nor_gradients(self, layer, monkeypatch):
        pixels = torch.randn(2, 4, 32, 32, dtype=torch.float64, requires_grad=True)
        leaves = [pixels, *layer.parameters()]
        results = []
        for folds in (True, False):
            monkeypatch.setattr(layer, "_is_cheaper_folded", lambda hidden_states, folds=folds: folds, raising=False)
            output = layer(pixels)
            results.append([output, *torch.autograd.grad((output**2).sum(), leaves)])
        for folded, apart in zip(*results, strict=True):
            torch.testing.assert_close(folded, apart, rtol=1e-10, atol=1e-10)

    def test_folding_is_used_only_where_it_is_cheaper(self, layer):
        large, small = torch.zeros(1, 4, 32, 32), torch.zeros(8, 4, 6, 6)
        assert layer._is_cheaper_folded(large) and not layer._is_cheaper_folded(small)
        with torch.autocast("cpu", torch.bfloat16):
            assert not layer._is_cheaper_folded(large)
        assert not layer.train()._is_cheaper_folded(large), "the statistics are learned"
        assert not layer.eval()._is_cheaper_folded(large), "results are the same wherever the weights are kept"

    def test_modules_with_hooks_are_called(self, layer):
        large = torch.zeros(1, 4, 32, 32, dtype=torch.float64)
        called = []
        hook = layer.convolution.register_forward_hook(lambda *args: called.append(args))
        layer(large)
        assert called and not layer._is_cheaper_folded(large)
        hook.remove()
        layer.convolution = nn.Sequential(layer.convolution)
        assert not layer._is_cheaper_folded(large)
