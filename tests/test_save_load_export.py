"""Tests of loading, saving and converting models: precision, devices, shards, adapters, copies, compilation."""

import copy
import os
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.utils import send_to_device
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import ModelOutput

from modeling_gkc import GKCForOpenVocabSegmentation, GKCModel
from modeling_gkc.mask_decoder import GKCMaskDecoder

from .common_models import (
    CASES,
    Case,
    enable_checkpointing,
    image_inputs,
    largest_difference,
    resnet_config,
    run,
    saved_and_loaded,
    segmenter_inputs,
    segmenter_labels,
    tiny_config,
)

# The projections of the mask decoder only; the text encoder has projections of the same names.
LORA_TARGETS = r".*\.mask_decoder\..*\.(q_proj|v_proj)"


@pytest.fixture(params=["segmenter", "image path", "backbone", "image encoder"])
def case(request) -> Case:
    return CASES[request.param]


def segmenter(**changes) -> GKCForOpenVocabSegmentation:
    return GKCForOpenVocabSegmentation(tiny_config(**changes)).eval()


class TestPrecision:
    """Half precision, and data types at loading."""

    @pytest.mark.parametrize(
        ("dtype", "autocast", "bound"),
        [(torch.float16, False, 1e-2), (torch.bfloat16, False, 5e-2), (torch.bfloat16, True, 5e-2)],
        ids=["float16", "bfloat16", "autocast bfloat16"],
    )
    def test_half_precision_is_close_to_single(self, dtype, autocast, bound, monkeypatch, within):
        """Both use the attention masks of the run in single precision, because rounding may flip their bits."""
        model, inputs = segmenter(), segmenter_inputs()
        masks = recorded_masks(monkeypatch)
        single = run(model, inputs, output_hidden_states=True)
        replayed_masks(monkeypatch, masks)
        if not autocast:
            model = model.to(dtype)
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.autocast("cpu", dtype) if autocast else nullcontext():
            half = run(model, inputs, output_hidden_states=True)
        assert half.masks_queries_logits.dtype == half.encoder_hidden_states[-1].dtype == dtype
        assert half.class_queries_logits.dtype == torch.float32
        name = f"{'autocast ' if autocast else ''}{str(dtype).removeprefix('torch.')}"
        pairs = {"masks": "masks_queries_logits", "class logits": "class_queries_logits"}
        for what, field in pairs.items():
            error = (half[field].float() - single[field]).norm() / single[field].norm()
            within(f"{what}, {name} against float32, relative", error, bound)

    @pytest.mark.parametrize("name", ["segmenter", "image encoder"])
    def test_dtype_at_loading(self, name, tmp_path):
        model = CASES[name].model().to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        asked = {"dtype": "auto"}, {"dtype": "float16"}, {"torch_dtype": torch.float32}
        for kwargs, expected in zip(asked, (torch.bfloat16, torch.float16, torch.float32), strict=True):
            loaded = type(model).from_pretrained(tmp_path, **kwargs)
            assert loaded.dtype == expected and {p.dtype for p in loaded.parameters()} == {expected}
            for parameter, saved in zip(loaded.parameters(), model.parameters(), strict=True):
                assert torch.equal(parameter, saved.to(expected))

    def test_model_is_trainable_after_inference_mode(self):
        model, inputs = segmenter(), segmenter_inputs()
        with torch.inference_mode():
            model(**inputs)
        model.train()(**inputs, **segmenter_labels()).loss.backward()


def recorded_masks(monkeypatch) -> list[Tensor]:
    """Collect the attention masks of the mask decoder, in order."""
    masks, compute = [], GKCMaskDecoder._attention_mask

    def recorded(*args):
        masks.append(compute(*args))
        return masks[-1]

    monkeypatch.setattr(GKCMaskDecoder, "_attention_mask", staticmethod(recorded))
    return masks


def replayed_masks(monkeypatch, masks: list[Tensor]) -> None:
    remaining = iter(masks)
    monkeypatch.setattr(GKCMaskDecoder, "_attention_mask", staticmethod(lambda *args: next(remaining)))


class TestDevices:
    """Offloaded weights and sharded checkpoints."""

    @pytest.mark.parametrize("parity", [0, 1])
    def test_disk_offload_does_not_change_outputs(self, case, parity, tmp_path):
        """Every other part is offloaded to disk, then the others."""
        model, inputs = case.model(), case.inputs()
        model.save_pretrained(tmp_path)
        device_map = {name: ("cpu", "disk")[(index + parity) % 2] for index, name in enumerate(parts_of(model))}
        # accelerate offloads whole modules only, not single parameters.
        device_map |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
        loaded = case.model_class.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
        assert loaded.hf_device_map == device_map and "disk" in device_map.values()
        for part, device in device_map.items():
            if device == "disk":
                assert {weight.device.type for weight in loaded.get_submodule(part).parameters()} <= {"meta"}
        assert largest_difference(run(model, inputs), run(loaded, inputs)) == 0

    def test_automatic_device_map_offloads_to_disk(self, case, tmp_path):
        """Parts that do not fit into the allowed memory are offloaded to disk."""
        model, inputs = case.model(), case.inputs()
        model.save_pretrained(tmp_path)
        memory = {"cpu": int(0.7 * 4 * model.num_parameters())}
        for kwargs in ({}, {"max_memory": memory, "offload_folder": tmp_path / "offload"}):
            loaded = case.model_class.from_pretrained(tmp_path, device_map="auto", **kwargs)
            is_offloaded = any(parameter.device.type == "meta" for parameter in loaded.parameters())
            assert is_offloaded == bool(kwargs)
            assert largest_difference(run(model, inputs), run(loaded, inputs)) == 0

    def test_cpu_offload_does_not_change_outputs(self, case):
        model, inputs = case.model(), case.inputs()
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
        assert largest_difference(run(model, inputs), run(offloaded, inputs)) == 0

    def test_device_map_splits_no_layer(self):
        """A module and the tensors that it uses directly are on the same device for any memory limit."""
        whole = {"GKCPixelDecoder", "GKCMaskDecoder", "CLIPResNetStem", "CLIPResNetBottleneck", "CLIPEncoderLayer"}
        model, numbers = segmenter(), set()
        size = 4 * model.num_parameters()
        for share in range(20, 100, 5):
            memory = {0: share * size // 100, 1: 2 * size}
            device_map = infer_auto_device_map(model, memory, no_split_module_classes=sorted(model._no_split_modules))
            numbers.add(len(set(device_map.values())))
            for name, module in model.named_modules():
                if type(module).__name__ in whole:
                    assert not any(part.startswith(f"{name}.") for part in device_map), name
        assert numbers == {1, 2}

    @pytest.mark.parametrize("elsewhere", [("backbone",), ("pixel_decoder", "words")], ids=" and ".join)
    def test_parts_run_on_different_devices(self, elsewhere):
        """Meta tensors have a device but no values; an operation on tensors of two devices raises an error."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = segmenter(class_feature="query+pooled", decoder_layers=1)
            for name, part in model.model.named_children():
                place(part, "meta" if name in elsewhere else "cpu")
            if "words" in elsewhere:
                for name in ("no_object_embedding", "logit_scale"):
                    moved = getattr(model.classifier, name).detach().to("meta")
                    setattr(model.classifier, name, nn.Parameter(moved))
            for part in (model.model, model.classifier):
                part.register_forward_pre_hook(moved_to("cpu"), with_kwargs=True)
            outputs = run(model, {"pixel_values": torch.randn(1, 3, 64, 64), "class_embeds": torch.randn(5, 16)})
        assert {name: tensor.device.type for name, tensor in outputs.items()} == dict.fromkeys(outputs, "cpu")

    def test_device_context_is_respected(self, case, tmp_path):
        case.model().save_pretrained(tmp_path)
        for context in (torch.device("cpu"), nullcontext()):
            with context:
                loaded = case.model_class.from_pretrained(tmp_path)
            assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}

    def test_sharded_and_low_memory_loading_give_equal_weights(self, case, tmp_path):
        model = case.model()
        loaded = saved_and_loaded(model, tmp_path, low_cpu_mem_usage=True)
        assert largest_difference(model.state_dict(), loaded.state_dict()) == 0
        model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
        assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
        assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
        loaded = case.model_class.from_pretrained(tmp_path / "parts")
        assert largest_difference(model.state_dict(), loaded.state_dict()) == 0

    def test_variants_and_subfolders(self, tmp_path):
        model = segmenter()
        model.save_pretrained(tmp_path / "sub", variant="special")
        assert (tmp_path / "sub" / "model.special.safetensors").exists()
        loaded = GKCForOpenVocabSegmentation.from_pretrained(tmp_path, subfolder="sub", variant="special")
        assert largest_difference(model.state_dict(), loaded.state_dict()) == 0


def place(part: nn.Module, device: str) -> None:
    """Move a part of a model to a device, and its inputs at every call, as accelerate does."""
    for module in part.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: value.detach().to(device) for name, value in tensors.items() if value is not None})
    part.register_forward_pre_hook(moved_to(device), with_kwargs=True)


def moved_to(device: str) -> Callable:
    return lambda module, args, kwargs: (send_to_device(args, device), send_to_device(kwargs, device))


def parts_of(model: PreTrainedModel) -> list[str]:
    """Return the children of a module; for a single child, the child's children."""
    names = list(dict(model.named_children()))
    if len(names) == 1:
        return [f"{names[0]}.{name}" for name, _ in model.get_submodule(names[0]).named_children()]
    return names


class TestCopies:
    """Copies of a model, and one model shared by threads."""

    @pytest.mark.parametrize("name", CASES)
    def test_copies_are_complete_and_independent(self, name):
        model, inputs = CASES[name].model(), CASES[name].inputs()
        expected = run(model, inputs)
        duplicates = [copy.deepcopy(model)]
        if name != "segmenter, Swin":  # transformers records its states by hooks, which cannot be pickled
            duplicates.append(pickle.loads(pickle.dumps(model)))
        for duplicate in duplicates:
            assert largest_difference(expected, run(duplicate, inputs)) == 0
            assert duplicate.config is not model.config and duplicate.config.to_dict() == model.config.to_dict()
            flags = [[p.requires_grad for p in m.parameters()] for m in (model, duplicate)]
            assert flags[0] == flags[1] and not duplicate.training
            with torch.no_grad():
                for parameter in duplicate.parameters():
                    parameter.zero_()
            assert largest_difference(expected, run(model, inputs)) == 0

    def test_model_can_be_shared_by_threads(self):
        model = segmenter()
        calls = [segmenter_inputs() for _ in range(4)]
        expected = [run(copy.deepcopy(model), inputs) for inputs in calls]
        results: dict[int, ModelOutput] = {}

        def work(index: int) -> None:
            results[index] = run(model, calls[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(largest_difference(expected[index], results[index]) == 0 for index in range(len(calls)))


class TestAdapters:
    """LoRA on the mask decoder, by PEFT and by transformers."""

    def test_only_mask_decoder_adapters_are_trained(self):
        """Base, text encoder and BatchNorm statistics do not change, in the training mode that the wrapper sets."""
        base = segmenter(backbone_config=resnet_config().backbone_config)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = with_lora(base).train()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(trained) == 2 * 2 * 2 * base.config.decoder_layers
        assert all("lora_" in name and ".mask_decoder." in name for name in trained)
        assert not any(module.training for module in base.text_model.modules())
        assert not any(module.training for module in base.modules() if isinstance(module, nn.BatchNorm2d))
        losses = train(model, steps=6)
        assert losses[-1] < losses[0]
        after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("name", ["segmenter", "segmenter, Swin", "segmenter, ResNet"])
    def test_lora_trains_under_gradient_checkpointing(self, name, use_reentrant):
        """Re-entrant checkpointing passes gradients on only if an input requires them, which PEFT enables."""
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(1)
            base = CASES[name].model()
            if checkpointing:
                enable_checkpointing(base, use_reentrant=use_reentrant)
            model = with_lora(base, init_lora_weights=False).train()
            model(**segmenter_inputs(), **segmenter_labels()).loss.backward()
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        assert all(gradient.abs().sum() > 0 for gradient in gradients[1].values())
        scale = max(gradient.abs().max() for gradient in gradients[0].values())
        assert largest_difference(*gradients) <= 1e-5 * scale

    def test_lora_is_saved_loaded_and_merged(self, tmp_path, within):
        segmenter().save_pretrained(tmp_path / "base")
        base = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "base")
        model, inputs = with_lora(base), segmenter_inputs()
        untrained = run(model, inputs)
        train(model, steps=3)
        trained = run(model.eval(), inputs)
        assert largest_difference(untrained, trained) > 0.1
        model.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 60_000

        base = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert largest_difference(trained, run(loaded, inputs)) == 0
        direct = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "adapter")
        assert largest_difference(trained, run(direct, inputs)) == 0
        merged = loaded.merge_and_unload()
        assert type(merged) is GKCForOpenVocabSegmentation
        within("merged LoRA against LoRA, max abs", largest_difference(trained, run(merged, inputs)), 1e-5)
        again = saved_and_loaded(merged, tmp_path / "merged")
        assert largest_difference(run(merged, inputs), run(again, inputs)) == 0

    def test_lora_with_fully_trained_head(self):
        base = segmenter()
        head = copy.deepcopy(base.classifier.state_dict())
        model = with_lora(base, modules_to_save=["classifier"]).train()
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all("lora_" in name or ".classifier.modules_to_save." in name for name in trained)
        train(model, steps=2)
        merged = model.merge_and_unload()
        assert largest_difference(head, merged.classifier.state_dict()) > 0
        run(merged.eval(), segmenter_inputs())

    @pytest.mark.skipif(
        Version(peft.__version__) < Version(MIN_PEFT_VERSION),
        reason=f"the adapters of transformers {transformers.__version__} need peft {MIN_PEFT_VERSION} or newer",
    )
    def test_transformers_add_adapter(self):
        model, inputs = segmenter(), segmenter_inputs()
        plain = run(model, inputs)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False))
        assert largest_difference(plain, run(model, inputs)) > 0
        model.disable_adapters()
        assert largest_difference(plain, run(model, inputs)) == 0
        model.enable_adapters()
        assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)

    def test_text_tower_shares_projection_names_with_the_mask_decoder(self):
        """`target_modules` must be a pattern: by bare names, the text encoder would get adapters never trained."""
        model = peft.get_peft_model(segmenter(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any(".text_model." in name for name in trained)


def with_lora(base: PreTrainedModel, **options) -> peft.PeftModel:
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=LORA_TARGETS, **options))


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    inputs, labels, losses = segmenter_inputs(), segmenter_labels(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, **labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestGraphs:
    """Image path as one graph at a fixed size, with few layers so that tracing takes seconds.

    Both sides use the kernel of deformable attention that can be traced: another kernel rounds differently, and where
    a location is the center of a pixel, as all are before training, the other one-sided derivative is equally right.
    """

    @pytest.fixture
    def model(self) -> GKCModel:
        torch._dynamo.reset()
        return GKCModel(tiny_config(decoder_layers=1, deformable_attention="grid_sample")).eval()

    def test_image_path_compiles_without_graph_break(self, model, within):
        """`fullgraph=True` raises an error at a graph break; tested forward and backward."""
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        pixel_values, masks, gradients = torch.randn(1, 3, 64, 64), [], []
        for module in (model, compiled):
            model.zero_grad()
            outputs = module(pixel_values, output_hidden_states=True)
            outputs.masks_queries_logits.square().mean().backward()
            masks.append(outputs)
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        within("compiled against eager, outputs, max abs", largest_difference(*masks), 1e-4)
        scale = max(gradient.abs().max() for gradient in gradients[0].values())
        within("compiled against eager, gradients, relative", largest_difference(*gradients) / scale, 1e-4)

    @pytest.mark.skipif(
        "GKC_TEST_INDUCTOR" not in os.environ,
        reason="compiling the generated C++ takes minutes: set GKC_TEST_INDUCTOR=1 to run it",
    )
    def test_image_path_compiles_with_inductor(self, model, within):
        inputs = image_inputs()
        compiled = torch.compile(model, fullgraph=True)
        error = largest_difference(run(model, inputs), run(compiled, inputs))
        within("compiled by inductor against eager, max abs", error, 1e-4)

    def test_torch_export(self, tmp_path):
        """The whole model with class embeddings is exported; the saved program runs on other images."""
        model = segmenter(decoder_layers=1, deformable_attention="grid_sample")
        words = nn.functional.normalize(torch.randn(5, 16), dim=-1)
        with torch.no_grad():
            program = torch.export.export(model, (torch.randn(1, 3, 64, 64),), {"class_embeds": words})
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        pixel_values, words = torch.randn(1, 3, 64, 64), nn.functional.normalize(torch.randn(5, 16), dim=-1)
        with torch.no_grad():
            expected, exported = (module(pixel_values, class_embeds=words) for module in (model, loaded))
        for name in ("class_queries_logits", "masks_queries_logits", "query_embeds"):
            torch.testing.assert_close(exported[name], expected[name], rtol=0, atol=1e-6)
