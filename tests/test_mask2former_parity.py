"""The architecture is Mask2Former's: same weights, same masks, same gradients as transformers' implementation."""

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

from modeling_gkc.conversion import _mask2former_weights, from_mask2former

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
# (height, width): square, both orders of non-square, and one that is no multiple of 32.
SIZES = [(128, 128), (96, 160), (224, 64), (100, 148)]


@pytest.fixture(params=BACKBONES)
def source(request) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former whose random weights are spread enough that masks have insides and outsides."""
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
                # Some releases start these near zero, where every activation lies on the kink of a ReLU.
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
    return CLIPTextModelWithProjection(config)


def all_masks(source_outputs, source) -> list[torch.Tensor]:
    return list(source.model(source_outputs, output_hidden_states=True).masks_queries_logits)


@pytest.mark.parametrize("size", SIZES)
def test_masks_equal(source, text_model, size, within):
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
def test_gradients_equal(source, text_model, dtype, bound, within):
    """In double precision too, where no attention bit and no ReLU can flip by rounding."""
    source = source.to(dtype)
    converted = from_mask2former(source, text_model=text_model).to(dtype)
    pixel_values = torch.randn(2, 3, 96, 160, dtype=dtype)
    weights = None

    def scalar(stages):
        """One fixed loss of every stage's masks; smooth, so that both gradients are those of the same function."""
        nonlocal weights
        if weights is None:
            weights = [torch.randn_like(masks) for masks in stages]
        return sum((weight * masks.tanh()).mean() for weight, masks in zip(weights, stages, strict=True))

    scalar(all_masks(pixel_values, source)).backward()
    stages = converted.model(pixel_values, output_stages=True).stages
    scalar([stage.masks_queries_logits for stage in stages]).backward()

    gradients = {name: p.grad for name, p in source.model.named_parameters() if p.grad is not None}
    converted_gradients = {name: p.grad for name, p in converted.model.named_parameters() if p.grad is not None}
    expected = _mask2former_weights(gradients)
    assert expected.keys() == converted_gradients.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # A gradient that is rounding noise (biases before a normalisation, key biases) has no relative error.
        if gradient.norm() < 1e-6 * largest:
            continue
        error = (converted_gradients[name] - gradient).norm() / gradient.norm()
        precision = str(dtype).removeprefix("torch.")
        within(f"gradients against transformers' Mask2Former, {precision}, relative", error, bound)


def test_unconvertible_source_is_refused(source, text_model):
    source.config.pre_norm = True
    with pytest.raises(ValueError, match="pre_norm"):
        from_mask2former(source, text_model=text_model)
