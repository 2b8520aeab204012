"""Tests of `region_tokens`: parity with the image embeddings of image-text models, and the effect of masks."""

import pytest
import torch
import torch.nn.functional as F

from modeling_gkc import region_tokens
from modeling_gkc.modeling_gkc_zero_shot import CLIPTowers
from modeling_gkc.region_tokens import embed_regions

from .zero_shot_toys import make_tower

KINDS = ("clip", "metaclip_2", "siglip", "clip_resnet", "clip_convnext")


def load(kind: str):
    """Return the model as `embed_regions` takes it, and a function that computes its own image embeddings."""
    tower, text_model = make_tower(kind)
    if text_model is None:
        return tower, lambda images: tower.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    towers = CLIPTowers(tower.config, text_model.config).eval()
    towers.vision_model.load_state_dict(tower.state_dict())
    return towers, lambda images: tower(images).image_embeds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
@torch.no_grad()
def test_region_of_the_whole_image_has_the_models_own_embedding(kind, size, within):
    tower, embed = load(kind)
    images = torch.randn(2, 3, *size)
    found, is_empty = embed_regions(tower, images, torch.ones(2, 3, 24, 16))
    assert found.shape == (2, 3, 32) and not is_empty.any()
    within(f"region of the whole image, {kind}, max abs", (found - embed(images)[:, None]).abs().max(), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_regions_do_not_depend_on_each_other(kind, monkeypatch):
    tower, _ = load(kind)
    images, masks = torch.randn(2, 3, 64, 96), (torch.rand(2, 7, 16, 24) > 0.7).float()
    together, _ = embed_regions(tower, images, masks)
    monkeypatch.setattr(region_tokens, "MAX_ATTENTION_WEIGHTS", 1)
    alone, _ = embed_regions(tower, images, masks)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-4, "masks have an effect"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_empty_masks_are_reported_and_finite(kind):
    tower, _ = load(kind)
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 1, 3, 3] = 1  # a part of one patch
    found, is_empty = embed_regions(tower, torch.randn(1, 3, 64, 64), masks)
    assert is_empty.tolist() == [[True, False]] and found.isfinite().all()


@torch.no_grad()
def test_class_token_equals_attention_restricted_by_a_mask():
    """A soft mask is a bias of the attention logits, written here with transformers' own last layer."""
    tower, _ = load("clip")
    images, masks = torch.randn(1, 3, 64, 64), torch.rand(1, 3, 4, 4)
    found, _ = embed_regions(tower, images, masks)
    vision = tower.vision_model
    states = vision(images, output_hidden_states=True).hidden_states[-2]
    for region in range(3):
        bias = torch.zeros(1, 1, 17, 17)
        bias[0, 0, 0, 1:] = masks[0, region].flatten().log()
        last = vision.encoder.layers[-1](states, bias)
        last = last[0] if isinstance(last, tuple) else last
        expected = tower.visual_projection(vision.post_layernorm(last[:, 0]))
        torch.testing.assert_close(found[:, region], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_mean_pooling_weighs_positions_by_their_coverage():
    tower, _ = load("clip_convnext")
    images, masks = torch.randn(1, 3, 64, 96), torch.rand(1, 2, 2, 3)
    found, _ = embed_regions(tower, images, masks)
    features = tower.vision_model.encoder(images)[-1]
    weights = F.normalize(masks.flatten(2), p=1, dim=-1).unflatten(-1, (2, 3))
    expected = tower.vision_model.head(torch.einsum("bqhw,bchw->bqc", weights, features))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_models_without_regions_are_named():
    tower, _ = load("clip")
    with pytest.raises(ValueError, match="A 'clip_vision_model' cannot embed regions: use an image-text model of the"):
        embed_regions(tower.vision_model, torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 4, 4))
