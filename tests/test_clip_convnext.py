"""CLIP's ConvNeXt against recorded outputs of OpenCLIP's tower."""

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel

from modeling_gkc import CLIPConvNextBackbone, CLIPConvNextConfig, CLIPConvNextVisionModel, GKCConfig, GKCModel
from modeling_gkc.conversion import clip_convnext_from_open_clip, clip_text_from_openai

from .fc_clip import empty_weights, recording


@pytest.fixture(scope="module")
def golden():
    return recording("convnext")


@pytest.fixture(scope="module")
def model(golden) -> CLIPConvNextVisionModel:
    return clip_convnext_from_open_clip(golden.clip_weights())


@torch.no_grad()
def test_stages_and_embeddings(model, golden, within):
    pixel_values = preprocessed(golden, "a")
    outputs = model(pixel_values, output_hidden_states=True, output_dense_embeds=True)
    for stage in range(2, 6):
        error = golden.error(f"a.backbone.res{stage}", outputs.hidden_states[stage - 1])
        within("CLIP ConvNeXt against recorded outputs, max abs", error, 1e-5)
    embeds = model.head(golden["a.clip_pooled_before_head"])
    within("CLIP ConvNeXt's head against recorded outputs, max abs", golden.error("a.clip_embed", embeds), 1e-5)
    mean = outputs.last_hidden_state.mean(dim=(2, 3))
    torch.testing.assert_close(outputs.image_embeds, model.head(mean))
    one = outputs.last_hidden_state[..., 1, 2]
    torch.testing.assert_close(outputs.dense_embeds[..., 1, 2], model.head(one))


def preprocessed(golden, case: str) -> torch.Tensor:
    """Return the recorded image, normalized and padded to multiples of 32."""
    mean, std = (torch.tensor(golden.meta[name])[:, None, None] for name in ("pixel_mean", "pixel_std"))
    pixels = (golden[f"{case}.image0_rgb_u8"] - mean) / std
    height, width = pixels.shape[1:]
    return torch.nn.functional.pad(pixels, (0, -width % 32, 0, -height % 32))[None]


@torch.no_grad()
def test_backbone_gives_the_stages_and_loads_the_whole_towers_weights(model, golden, tmp_path):
    model.save_pretrained(tmp_path)
    backbone, info = CLIPConvNextBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and all(name.startswith("head.") for name in info["unexpected_keys"])
    pixel_values = preprocessed(golden, "a")
    feature_maps = backbone(pixel_values).feature_maps
    states = model(pixel_values, output_hidden_states=True).hidden_states[1:]
    assert [state.shape[1] for state in states] == backbone.channels
    for feature_map, state in zip(feature_maps, states, strict=True):
        torch.testing.assert_close(feature_map, state, rtol=0, atol=0)
    assert isinstance(AutoBackbone.from_config(model.config), CLIPConvNextBackbone)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, CLIPConvNextVisionModel)
    torch.testing.assert_close(loaded(pixel_values).image_embeds, model(pixel_values).image_embeds)


@torch.no_grad()
def test_text_tower(golden, within):
    text = clip_text_from_openai(golden.clip_weights(), hidden_act="gelu", num_attention_heads=2)
    embeds = text(golden["text_tower.tokens"]).text_embeds
    error = golden.error("text_tower.output", embeds)
    within("OpenCLIP's text encoder against recorded outputs, max abs", error, 1e-5)


def test_segmenter_takes_the_backbone(tmp_path):
    backbone = CLIPConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], projection_dim=64)
    config = GKCConfig(
        backbone_config=backbone, hidden_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=1
    )
    segmenter = GKCModel(config).eval()
    assert isinstance(segmenter.backbone, CLIPConvNextBackbone)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).backbone_config.projection_dim == 64
    with torch.no_grad():
        output = segmenter(torch.randn(1, 3, 64, 96))
    assert output.masks_queries_logits.shape == (1, 100, 16, 24)


def test_published_size():
    """Image encoder of `convnext_large_d_320`: the number of parameters of the published key list."""
    weights = {name: weight for name, weight in empty_weights("convnext_large").items() if ".visual." in name}
    with torch.device("meta"):
        tower = CLIPConvNextVisionModel(CLIPConvNextConfig())
    assert sum(parameter.numel() for parameter in tower.parameters()) == sum(map(torch.numel, weights.values()))


def test_single_projection(golden):
    weights = golden.clip_weights()
    weights = {name: weight for name, weight in weights.items() if not name.startswith("visual.head")}
    weights["visual.head.proj.weight"] = torch.randn(48, 128)
    tower = clip_convnext_from_open_clip(weights)
    assert tower.config.projection_hidden_dim is None and tower.config.projection_dim == 48
    with torch.no_grad():
        pooled = torch.randn(3, 128)
        expected = tower.head.layer_norm(pooled) @ weights["visual.head.proj.weight"].T
        torch.testing.assert_close(tower.head(pooled), expected)


def test_weights_of_other_models_raise_an_error(golden):
    weights = golden.clip_weights()
    with pytest.raises(ValueError, match="not the weights of a CLIP ConvNeXt"):
        clip_convnext_from_open_clip(recording("rn").clip_weights())
    del weights["visual.trunk.stages.2.blocks.1.gamma"]
    weights["visual.trunk.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing .*layers\.1\.layer_scale_parameter.*unexpected.*extra"):
        clip_convnext_from_open_clip(weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": [1, 1, 1]}, "`depths` needs four"),
        ({"hidden_sizes": [8, 0, 8, 8]}, "`hidden_sizes` needs four"),
        ({"projection_hidden_dim": 0}, "`projection_hidden_dim` must be positive"),
        ({"projection_dim": "x"}, "`projection_dim` must be of the type int"),
        ({"hidden_act": "nothing"}, "`hidden_act` must be an activation"),
        ({"patch_size": 2}, "`patch_size` must be 4"),
        ({"layer_norm_eps": -1.0}, "`layer_norm_eps` must"),
    ],
)
def test_invalid_configurations_raise_errors(values, message):
    with pytest.raises(ValueError, match=message):
        CLIPConvNextConfig(**values)
