"""Tests of training: losses, gradients with and without checkpointing, and frozen parts."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_gkc import CLIPResNetConfig, GKCModel

from .common_models import (
    CASES,
    COMMON,
    SEGMENTERS,
    Case,
    enable_checkpointing,
    image_inputs,
    largest_difference,
    recomputes,
    result,
    tiny_config,
)


@pytest.fixture(params=COMMON)
def case(request) -> Case:
    return COMMON[request.param]


@pytest.fixture(params=SEGMENTERS)
def segmenter(request) -> Case:
    return CASES[request.param]


class TestTraining:
    """Losses, gradients and frozen parts."""

    def test_training(self, segmenter):
        model = segmenter.model().train()
        loss = model(**segmenter.inputs(), **segmenter.labels()).loss
        loss.backward()
        assert loss.isfinite() and loss > 0
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad or name in unused_in_training(model), name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

    def test_training_overfit(self):
        """Eight steps on one batch decrease the loss."""
        case = CASES["segmenter"]
        model, inputs, labels = case.model().train(), case.inputs(), case.labels()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**inputs, **labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_training_gradient_checkpointing(self, segmenter, use_reentrant, within):
        """Loss and gradients are unchanged, dropout included, although layers are computed a second time."""
        config = segmenter.config()
        config.dropout = 0.1
        model, inputs, labels = segmenter.model(config).double().train(), segmenter.inputs(), segmenter.labels()
        inputs["pixel_values"] = inputs["pixel_values"].double()
        calls = count_calls(model)
        results = []
        for checkpointing in (False, True):
            if checkpointing:
                enable_checkpointing(model, use_reentrant=use_reentrant)
            model.zero_grad()
            torch.manual_seed(1)
            loss = model(**inputs, **labels).loss
            loss.backward()
            results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        (loss, gradients), (loss_again, gradients_again) = results
        assert loss == loss_again
        scale = max(gradient.abs().max() for gradient in gradients.values())
        error = largest_difference(gradients, gradients_again) / scale
        within("gradients with and without checkpointing, float64, relative", error, 1e-12)
        assert set(calls.values()) == {3}  # once before; with checkpointing once forward, once backward

    def test_gradient_checkpointing_enable_disable(self, case):
        model = case.model()
        if isinstance(model.config, CLIPResNetConfig):
            with pytest.raises(ValueError, match="does not support"):
                enable_checkpointing(model)
            return
        assert not recomputes(model)
        model._hf_peft_config_loaded = True  # transformers then asks for gradients of the input, too
        enable_checkpointing(model)
        assert recomputes(model) and result(model.requires_grad_(False)(**case.inputs())).requires_grad
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
        assert not recomputes(model)

    def test_gradient_checkpointing_by_configuration(self, segmenter):
        config = segmenter.config()
        config.gradient_checkpointing = True
        assert recomputes(segmenter.model(config))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_updates_batchnorm_statistics_once(self, use_reentrant):
        """BatchNorm statistics are the same with and without checkpointing."""
        states = []
        for checkpointing in (False, True):
            torch.manual_seed(1)
            model = GKCModel(tiny_config(freeze_backbone_batch_norm=False)).train()
            if checkpointing:
                enable_checkpointing(model, use_reentrant=use_reentrant)
            model(**image_inputs()).masks_queries_logits.square().mean().backward()
            states.append(dict(model.backbone.named_buffers()))
        assert largest_difference(*states) == 0
        assert {int(value) for name, value in states[1].items() if "num_batches" in name} == {1}

    @pytest.mark.parametrize("name", ["segmenter", "segmenter, ResNet"])
    @pytest.mark.parametrize("freeze", [True, False])
    def test_training_mode_does_not_change_frozen_parts(self, name, freeze):
        config = CASES[name].config()
        config.freeze_backbone_batch_norm = freeze
        model = CASES[name].model(config).train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        statistics = [norm.running_mean.clone() for norm in norms]
        model(**CASES[name].inputs())
        assert norms and all(torch.equal(n.running_mean, s) == freeze for n, s in zip(norms, statistics, strict=True))
        assert not any(module.training for module in model.text_model.modules())
        assert not any(parameter.requires_grad for parameter in model.text_model.parameters())
        model.eval()
        assert not any(module.training for module in model.modules())

    def test_training_mode_returns_all_stages(self):
        outputs = CASES["image path"].model().train()(**image_inputs(), output_hidden_states=True)
        assert len(outputs.stages) == len(outputs.transformer_decoder_hidden_states) == 4


def unused_in_training(model: PreTrainedModel) -> set[str]:
    """Return the parameters of transformers' backbones that do not affect feature maps."""
    return {name for name, _ in model.named_parameters() if name.startswith("model.backbone.swin.layernorm.")}


def count_calls(model: PreTrainedModel) -> dict[str, int]:
    """Count the calls of one submodule of every layer of this library that supports checkpointing."""
    counts: dict[str, int] = {}
    for name, layer in model.named_modules():
        if type(layer).__module__.startswith("modeling_gkc.") and isinstance(layer, GradientCheckpointingLayer):
            counts[name] = 0
            inner = next(layer.children())
            inner.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts
