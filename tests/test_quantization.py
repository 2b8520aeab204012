"""Tests with layers and weights of other libraries: quantized, with adapters, and of other data types."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.class_embeddings import weights_state

from .common_models import CASES, largest_difference, run, tensors_of, tiny_config

ADAPTED = r".*\.mask_decoder\..*\.(q_proj|v_proj)"  # as in the README


class ForbidsInPlace(torch.autograd.Function):
    """Layer that returns a view made inside a function, as bitsandbytes does, which forbids in-place changes."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(inputs.flatten(0, -2), weight, bias).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ ctx.saved_tensors[0], None, None


class FrozenLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return ForbidsInPlace.apply(inputs, self.weight, self.bias)


class Int8Weight(Tensor):
    """Stand-in for a weight of torchao: wraps numbers and factors, and supports only linear layers."""

    @staticmethod
    def __new__(cls, values, factors):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=factors.dtype)

    def __init__(self, values, factors):
        self.values, self.factors = values, factors

    @classmethod
    def from_float(cls, weight: Tensor) -> "Int8Weight":
        factors = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / factors).round().to(torch.int8), factors)

    def __tensor_flatten__(self):
        return ["values", "factors"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(**parts)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            inputs, weight, *bias = args
            return F.linear(inputs, weight.values * weight.factors, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].factors)
        raise NotImplementedError(f"There is no {func} of an int8 weight.")


class Opaque(Int8Weight):
    """Weight whose storage and version cannot be read."""

    __tensor_flatten__ = None


def adapted(linear: type[nn.Linear]) -> nn.Module:
    """Return a model whose linear layers are of the given kind, with adapters as documented in the README."""
    torch.manual_seed(0)
    model = GKCForOpenVocabSegmentation(tiny_config())
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = linear
    return get_peft_model(model, LoraConfig(target_modules=ADAPTED, init_lora_weights=False)).train()


def test_adapters_train_on_layers_that_forbid_inplace_operations(within):
    gradients = []
    inputs, labels = CASES["segmenter"].inputs(), CASES["segmenter"].labels()
    for linear in (nn.Linear, FrozenLinear):
        model = adapted(linear)
        torch.manual_seed(0)
        loss = model(**inputs, **labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all("lora_" in name for name in gradients[0]) and len(gradients[0]) == 3 * 2 * 2 * 2
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    within("gradients of adapters on layers of another kind", largest_difference(*gradients), 1e-4)


# The ResNet of transformers itself adds in place.
OURS = {name: case for name, case in CASES.items() if name != "segmenter, ResNet"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", OURS.values(), ids=OURS)
def test_no_inplace_operations_on_outputs_of_other_modules(case, training):
    model = case.model().train(training)
    kept = []

    def keep(module, args, output):
        kept.extend((type(module).__name__, value, value.detach().clone()) for _, value in tensors_of(output))

    for module in model.modules():
        module.register_forward_hook(keep)
    model(**case.inputs())
    assert len(kept) > 20
    assert [name for name, value, copy in kept if not torch.equal(value, copy)] == []


@pytest.fixture
def segmenter() -> GKCForOpenVocabSegmentation:
    return GKCForOpenVocabSegmentation(tiny_config()).eval().requires_grad_(False)


def prompts() -> Tensor:
    return torch.tensor([[1, 5, 6, 3], [1, 7, 8, 3]])


def put(model: GKCForOpenVocabSegmentation, kind: type[Int8Weight]) -> Int8Weight:
    projection = model.text_model.text_projection
    weight = kind.from_float(projection.weight.detach())
    projection.weight = nn.Parameter(weight, requires_grad=False)
    return weight


def test_text_embeddings_are_cached_with_wrapped_weights(segmenter, monkeypatch):
    plain = segmenter.embed_prompts(prompts())
    weight = put(segmenter, Int8Weight)
    passes = []
    encode = type(segmenter)._encode_pass
    monkeypatch.setattr(type(segmenter), "_encode_pass", lambda *args: passes.append(1) or encode(*args))
    first, again = segmenter.embed_prompts(prompts()), segmenter.embed_prompts(prompts())
    assert len(passes) == 1 and torch.equal(first, again)
    torch.testing.assert_close(first, plain, rtol=0, atol=0.02)
    weight.factors.mul_(-1)
    torch.testing.assert_close(segmenter.embed_prompts(prompts()), -first)
    weight.values.data.mul_(-1)
    torch.testing.assert_close(segmenter.embed_prompts(prompts()), first)
    assert len(passes) == 3


def test_text_embeddings_are_not_cached_with_opaque_weights(segmenter):
    weight = put(segmenter, Opaque)
    assert weights_state(segmenter.text_model) is None
    first = segmenter.embed_prompts(prompts())
    weight.factors.mul_(-1)
    torch.testing.assert_close(segmenter.embed_prompts(prompts()), -first)
    assert len(segmenter.text_cache) == 0


def test_packed_weights_are_not_in_the_state_dict(segmenter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(segmenter, {nn.Linear})
    assert weights_state(segmenter.text_model) is not None and weights_state(quantized.text_model) is None
    assert quantized.embed_prompts(prompts()).isfinite().all() and len(quantized.text_cache) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_images_are_cast_to_the_weight_dtype(case, dtype):
    model, inputs = case.model().to(dtype), case.inputs()
    cast = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    assert largest_difference(run(model, inputs), run(model, cast)) == 0


@pytest.mark.parametrize("case", ["segmenter", "segmenter, convex"])
def test_class_embeddings_are_cast_to_the_weight_dtype(case):
    model, inputs = CASES[case].model(), CASES[case].inputs()
    embeds = F.normalize(torch.randn(3, 16), dim=-1)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        words = embeds.to(dtype)
        in_fp32 = model.to(torch.float32)(inputs["pixel_values"], class_embeds=words).class_queries_logits
        assert in_fp32.dtype == torch.float32 and in_fp32.isfinite().all()
        logits = model.to(dtype)(inputs["pixel_values"], class_embeds=embeds).class_queries_logits
        assert logits.dtype == torch.promote_types(dtype, torch.float32) and logits.isfinite().all()
