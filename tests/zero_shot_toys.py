"""Small segmenters and image-text models with random weights for tests of `GKCForZeroShotSegmentation`."""

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    DetrConfig,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MetaClip2Config,
    MetaClip2Model,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    PreTrainedModel,
    ResNetConfig,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
)

from modeling_gkc import (
    CLIPConvNextConfig,
    CLIPConvNextVisionModel,
    CLIPResNetConfig,
    CLIPResNetVisionModel,
    GKCForOpenVocabSegmentation,
    GKCImageProcessor,
    GKCProcessor,
)

from .conftest import small_config, word_tokenizer

CLASSES = ("dog", "sofa", "lamp", "sky", "grass")
SETTINGS = {"size": {"shortest_edge": 64, "longest_edge": 96}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3}
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
WIDTH = 32
TEXT = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": WIDTH,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "projection_dim": WIDTH,
}
EOMT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 16,
    "num_blocks": 1,
    "num_queries": 8,
    "intermediate_size": 48,
    **LABELS,
}


def resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def swin() -> SwinConfig:
    return SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def make_segmenter(kind: str) -> PreTrainedModel:
    """Return a segmenter of five classes in evaluation mode."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_queries": 8, **LABELS}
    if kind == "mask2former":
        widths = dict.fromkeys(
            ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32
        )
        config = Mask2FormerConfig(backbone_config=resnet(), encoder_layers=1, decoder_layers=3, **widths, **sizes)
        model = Mask2FormerForUniversalSegmentation(config)
    elif kind == "maskformer":
        decoder = DetrConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=8,
        )
        config = MaskFormerConfig(
            backbone_config=swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **LABELS
        )
        model = MaskFormerForInstanceSegmentation(config)
    elif kind == "oneformer":
        config = OneFormerConfig(
            backbone_config=swin(),
            hidden_dim=32,
            conv_dim=32,
            mask_dim=32,
            text_encoder_width=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            query_dec_layers=1,
            task_seq_len=16,
            max_seq_len=16,
            is_training=False,
            **sizes,
        )
        model = OneFormerForUniversalSegmentation(config)
    elif kind == "eomt":
        model = EomtForUniversalSegmentation(EomtConfig(mlp_ratio=1, **EOMT))
    elif kind == "eomt_dinov3":
        model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**EOMT))
    else:
        model = GKCForOpenVocabSegmentation(small_config())
        model.set_vocabulary(list(CLASSES), GKCProcessor(GKCImageProcessor(**SETTINGS), word_tokenizer()))
    return model.eval()


def make_tower(kind: str) -> tuple[PreTrainedModel, CLIPTextModelWithProjection | None]:
    """Return an image-text model in evaluation mode, and a text encoder if it has none."""
    torch.manual_seed(1)
    text_model = None
    if kind in ("clip", "metaclip_2"):
        config_class, model_class = {"clip": (CLIPConfig, CLIPModel), "metaclip_2": (MetaClip2Config, MetaClip2Model)}[
            kind
        ]
        model = model_class(config_class(text_config=TEXT, vision_config=VISION, projection_dim=WIDTH))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": WIDTH}, vision_config=VISION))
    else:
        text_model = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).eval()
        if kind == "clip_resnet":
            config = CLIPResNetConfig(depths=[1, 1, 1, 1], width=8, image_size=64, projection_dim=WIDTH)
            model = CLIPResNetVisionModel(config)
        else:
            config = CLIPConvNextConfig(
                depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], image_size=64, projection_dim=WIDTH
            )
            model = CLIPConvNextVisionModel(config)
    return model.eval(), text_model
