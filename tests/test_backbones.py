"""Tests of backbones of transformers and timm."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, TimmBackboneConfig
from transformers.models.timm_backbone import modeling_timm_backbone

from modeling_gkc import GKCForOpenVocabSegmentation

from .common_models import saved_and_loaded, tiny_config
from .conftest import aligned

NO_BACKBONES = ("vit", "swiftformer", "clip_vision_model", "mobilenet_v2", "segformer", "bert", "regnet")
FLAT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}


class StubLevels(nn.Module):
    """Replacement of a timm model, which returns selected levels of strides 2 to 32."""

    def __init__(self, out_indices):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3 if level == 0 else 8, 8, 3, 2, 1) for level in range(5))
        self.norm = nn.BatchNorm2d(8)
        info = [{"module": f"layer{level}", "num_chs": 8, "index": level} for level in range(5)]
        self.indices = [index % 5 for index in out_indices]
        chosen = [info[index] for index in self.indices]
        self.feature_info = SimpleNamespace(
            info=info,
            out_indices=self.indices,
            module_name=lambda: [level["module"] for level in chosen],
            get_dicts=lambda: chosen,
        )

    def forward(self, pixel_values):
        maps = [pixel_values]
        for convolution in self.convolutions:
            maps.append(self.norm(convolution(maps[-1])))
        return [maps[1 + index] for index in self.indices]


@pytest.fixture
def stub_timm(monkeypatch):
    """Replace timm, which is not installed for the tests."""
    timm = SimpleNamespace(create_model=lambda name, out_indices, **kwargs: StubLevels(out_indices))
    monkeypatch.setattr(modeling_timm_backbone, "timm", timm, raising=False)
    monkeypatch.setattr(modeling_timm_backbone, "requires_backends", lambda *args: None)


@pytest.mark.parametrize(
    "backbone",
    [
        {"model_type": "timm_backbone", "backbone": "stub"},
        {"model_type": "timm_backbone", "backbone": "stub", "out_indices": [1, 2, 3, 4]},
        TimmBackboneConfig(backbone="stub", out_indices=(1, 2, 3, 4)),
    ],
    ids=["a dict", "a dict with levels", "a configuration"],
)
def test_timm_backbones(stub_timm, backbone, tmp_path):
    model = GKCForOpenVocabSegmentation(tiny_config(backbone_config=backbone)).eval()
    call = {"pixel_values": torch.rand(1, 3, 64, 64), "class_embeds": torch.eye(2, 16)}
    expected = model(**call).masks_queries_logits
    assert expected.shape[-2:] == (16, 16)
    loaded = saved_and_loaded(model, tmp_path)
    torch.testing.assert_close(loaded(**call).masks_queries_logits, expected)
    assert loaded.config.backbone_config.out_indices == [1, 2, 3, 4]


@pytest.fixture
def real_timm():
    pytest.importorskip("timm", reason="timm cannot be imported here; `pip install timm`", exc_type=ImportError)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto"])
def test_timm_models_run_train_and_load(real_timm, name, tmp_path, within):
    """Test a ResNet, a model with fused BatchNorm and activation, and a model of four levels without BatchNorm."""
    config = tiny_config(
        backbone_config={"model_type": "timm_backbone", "backbone": name}, freeze_backbone_batch_norm=True
    )
    model = GKCForOpenVocabSegmentation(config)
    call = {"pixel_values": torch.rand(1, 3, 64, 64), "class_embeds": torch.eye(2, 16)}
    labels = {"mask_labels": [torch.ones(1, 64, 64)], "class_labels": [torch.tensor([0])]}
    statistics = {key: value.clone() for key, value in model.model.backbone.named_buffers()}
    model.train()(**call, **labels).loss.backward()
    unused = [key for key, value in model.model.backbone.named_parameters() if value.grad is None]
    assert unused == []
    torch.testing.assert_close(dict(model.model.backbone.named_buffers()), statistics, rtol=0, atol=0)
    with torch.no_grad():
        expected = model.eval()(**call).masks_queries_logits
        assert expected.shape == (1, config.num_queries, 16, 16)
        loaded = saved_and_loaded(model, tmp_path)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        error = (aligned(loaded)(**call).masks_queries_logits - aligned(model)(**call).masks_queries_logits).abs()
        within("a model of timm, reloaded: masks_queries_logits", error.max(), 0)
        optimized = model.optimize_for_inference(compile=False)(**call).masks_queries_logits
        within("a model of timm, optimised: masks_queries_logits", (optimized - expected).abs().max(), 1e-4)


def test_missing_levels_of_timm_models_raise_an_error(real_timm):
    backbone = TimmBackboneConfig(backbone="convnext_atto", out_indices=(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"model 'convnext_atto' does not have the levels .* \[1, 2, 3, 4\]: set"):
        GKCForOpenVocabSegmentation(tiny_config(backbone_config=backbone))


@pytest.mark.parametrize("levels", [[-1], [0, 1, 2, 3, 4]])
def test_other_timm_levels_raise_errors(levels):
    with pytest.raises(ValueError, match=r"`out_indices` is \[.*\]; set `out_indices` to its last four levels"):
        tiny_config(backbone_config=TimmBackboneConfig(backbone="resnet18", out_indices=levels))


@pytest.mark.parametrize("model_type", NO_BACKBONES)
@pytest.mark.parametrize("as_dict", [True, False])
def test_models_that_are_not_backbones_raise_errors(model_type, as_dict):
    config = {"model_type": model_type} if as_dict else CONFIG_MAPPING[model_type](out_features=["stage1"] * 4)
    with pytest.raises(ValueError, match=f"`backbone_config` of type '{model_type}' is no backbone"):
        tiny_config(backbone_config=config)


def test_the_last_four_stages_are_used_by_default():
    assert tiny_config(backbone_config={"model_type": "resnet"}).backbone_config.out_indices == [1, 2, 3, 4]
    assert tiny_config(backbone_config={"model_type": "pp_lcnet"}).backbone_config.out_indices == [2, 3, 4, 5]


def test_a_backbone_of_one_stride_raises_an_error():
    model = GKCForOpenVocabSegmentation(tiny_config(backbone_config={"model_type": "dinov2", **FLAT})).eval()
    with pytest.raises(ValueError, match="must return feature maps of strides 4, 8, 16 and 32"):
        model(torch.rand(1, 3, 64, 64), class_embeds=torch.eye(2, 16))
