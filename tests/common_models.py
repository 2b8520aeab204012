"""Small models for tests that apply to all of them, and comparison of model outputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig, SwinConfig
from transformers.utils import ModelOutput

from modeling_gkc import (
    CLIPResNetBackbone,
    CLIPResNetConfig,
    CLIPResNetVisionModel,
    GKCConfig,
    GKCForOpenVocabSegmentation,
    GKCModel,
)

from .conftest import small_config

STAGES = ["stage1", "stage2", "stage3", "stage4"]
HIDDEN_STATES = {
    GKCModel: ("encoder_hidden_states", "pixel_decoder_hidden_states", "transformer_decoder_hidden_states"),
    CLIPResNetBackbone: ("hidden_states",),
}
HIDDEN_STATES[GKCForOpenVocabSegmentation] = HIDDEN_STATES[GKCModel]
HIDDEN_STATES[CLIPResNetVisionModel] = HIDDEN_STATES[CLIPResNetBackbone]


def tiny_config(**changes) -> GKCConfig:
    """Return a small configuration with one decoder layer per feature level."""
    return small_config(**{"encoder_layers": 1, "decoder_layers": 3} | changes)


def swin_config() -> GKCConfig:
    backbone = SwinConfig(
        embed_dim=16, depths=[1] * 4, num_heads=[2] * 4, window_size=4, drop_path_rate=0.0, out_features=STAGES
    )
    return tiny_config(backbone_config=backbone)


def resnet_config() -> GKCConfig:
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, out_features=STAGES)
    return tiny_config(backbone_config=backbone)


def convex_config() -> GKCConfig:
    return tiny_config(classifier="convex_combination", source_vocabulary=[["dog"], ["sofa", "couch"], ["lamp"]])


def fc_clip_config() -> GKCConfig:
    return tiny_config(
        classifier="fc_clip",
        class_feature="query+mask_features",
        ensemble="geometric",
        source_vocabulary=[["dog"], ["sofa", "couch"], ["lamp"]],
    )


def tower_config() -> CLIPResNetConfig:
    return small_config().backbone_config


def image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 64, 96)}


def segmenter_inputs() -> dict[str, Tensor]:
    input_ids = torch.randint(4, 64, (5, 6))
    input_ids[:, 0], input_ids[:, -1] = 1, 3
    words = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return image_inputs() | words | {"class_ids": torch.tensor([0, 0, 1, 2, 2])}


def segmenter_labels() -> dict[str, list[Tensor]]:
    masks = (torch.rand(2, 64, 96) > 0.5).float()
    return {"mask_labels": [masks] * 2, "class_labels": [torch.tensor([0, 2])] * 2}


@dataclass(frozen=True)
class Case:
    """Model to test, with the inputs of a call."""

    model_class: type[PreTrainedModel]
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]] = image_inputs
    labels: Callable[[], dict[str, list[Tensor]]] = dict

    def model(self, config: Any = None) -> PreTrainedModel:
        return self.model_class(self.config() if config is None else config).eval()


CASES = {
    "segmenter": Case(GKCForOpenVocabSegmentation, tiny_config, segmenter_inputs, segmenter_labels),
    "segmenter, Swin": Case(GKCForOpenVocabSegmentation, swin_config, segmenter_inputs, segmenter_labels),
    "segmenter, ResNet": Case(GKCForOpenVocabSegmentation, resnet_config, segmenter_inputs, segmenter_labels),
    "segmenter, FC-CLIP": Case(GKCForOpenVocabSegmentation, fc_clip_config, segmenter_inputs, segmenter_labels),
    "segmenter, convex": Case(GKCForOpenVocabSegmentation, convex_config, segmenter_inputs, segmenter_labels),
    "image path": Case(GKCModel, tiny_config),
    "backbone": Case(CLIPResNetBackbone, tower_config),
    "image encoder": Case(CLIPResNetVisionModel, tower_config),
}
# Where the kind of backbone does not matter, one of this library and one of transformers are enough.
COMMON = {name: case for name, case in CASES.items() if name != "segmenter, ResNet"}
SEGMENTERS = ["segmenter", "segmenter, Swin", "segmenter, ResNet"]
WITH_ATTENTION = [name for name in CASES if name != "backbone"]


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor in an output."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{name}.{index}")


def largest_difference(first: Any, second: Any) -> float:
    """Return the largest absolute difference between two outputs, which must have the same tensors."""
    first, second = dict(tensors_of(first)), dict(tensors_of(second))
    assert first.keys() == second.keys() and first
    differences = []
    for name, value in first.items():
        assert value.shape == second[name].shape and value.dtype == second[name].dtype, name
        assert value.isfinite().all(), name
        differences.append((value.double() - second[name].double()).abs().max().item() if value.numel() else 0.0)
    return max(differences)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], **kwargs) -> ModelOutput:
    return model(**inputs, **kwargs)


def saved_and_loaded(model: PreTrainedModel, path, **kwargs) -> PreTrainedModel:
    model.save_pretrained(path)
    return type(model).from_pretrained(path, **kwargs)


def enable_checkpointing(model: PreTrainedModel, **kwargs) -> None:
    """Enable gradient checkpointing under its name in transformers 5.23 or before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None)


def recomputes(model: PreTrainedModel) -> bool:
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")


def result(outputs: ModelOutput) -> Tensor:
    """Return the output tensor that depends on all parts of the model."""
    for name in ("masks_queries_logits", "image_embeds"):
        if name in outputs:
            return outputs[name]
    return outputs.feature_maps[-1]
