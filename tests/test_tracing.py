"""Tests of torch.compile, torch.export and torch.jit.trace with the outputs of the processor and the model."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor
from modeling_gkc.class_embeddings import count_classes

from .common_models import convex_config
from .conftest import small_config, word_tokenizer

WORDS = [["red", "lawn"], "sky"]
OTHER_WORDS = ["sofa", ["air", "dog"]]
TEMPLATES = ["{}", "red {}"]
IN_ORDER = ("pixel_values", "pixel_mask", "class_ids", "class_embeds", "names_per_class")


@pytest.fixture(scope="module")
def model() -> GKCForOpenVocabSegmentation:
    torch.manual_seed(0)
    config = small_config(encoder_layers=1, decoder_layers=1, num_queries=4)
    return GKCForOpenVocabSegmentation(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"height": 32, "width": 64}), word_tokenizer())


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (32, 64, 3), dtype=np.uint8)


def call(model, processor, form: str, words: list, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return all outputs of the processor for an image and classes, or for an image, with the encoded classes."""
    if form == "tokens":
        return dict(processor(images=image(seed), text=words, prompt_templates=TEMPLATES, return_tensors="pt"))
    cached = model.get_class_embeddings(**processor(text=words, return_tensors="pt"))
    return dict(processor(images=image(seed), return_tensors="pt")) | dict(cached)


def difference(first, second) -> float:
    names = ("class_queries_logits", "masks_queries_logits", "query_embeds")
    assert all(first[name].shape == second[name].shape for name in names)
    return max(float((first[name] - second[name]).abs().max()) for name in names)


def test_call_with_embeddings_compiles_as_one_graph(model, processor, within):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for words, seed in ((WORDS, 0), (OTHER_WORDS, 1)):
        inputs = call(model, processor, "embeddings", words, seed)
        within("compiled whole, max abs", difference(compiled(**inputs), model(**inputs)), 1e-4)


def test_text_encoding_compiles_as_one_graph_with_current_weights(processor):
    torch.compiler.reset()
    model = GKCForOpenVocabSegmentation(small_config()).eval().requires_grad_(False)
    compiled = torch.compile(model.get_class_embeddings, fullgraph=True, backend="eager")
    words = processor(text=WORDS, return_tensors="pt")
    before = compiled(**words).class_embeds
    model.text_model.text_projection.weight.data.mul_(-1)
    torch.testing.assert_close(compiled(**words).class_embeds, -before)


@pytest.fixture(scope="module")
def exported(model, processor):
    exported = DynamoExporter().export(model, call(model, processor, "tokens", WORDS), config=DynamoConfig())
    # transformers 5.17 returns the program, later versions a callable.
    return exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported


def test_exported_program_runs_on_other_images_and_classes(model, processor, exported, within):
    inputs = call(model, processor, "tokens", OTHER_WORDS, seed=1)
    within("exported by transformers, max abs", difference(exported(**inputs), model(**inputs)), 1e-4)


def test_exported_program_rejects_images_of_several_sizes(model, processor, exported):
    inputs = call(model, processor, "tokens", WORDS)
    inputs["pixel_mask"] = inputs["pixel_mask"].clone()
    inputs["pixel_mask"][:, :, 30:] = 0
    with pytest.raises(RuntimeError, match="images of one size at a time"):
        exported(**inputs)


@pytest.mark.parametrize("reduction", ["max", "embedding_mean"])
def test_traced_model_runs_with_other_classes_and_as_onnx(model, processor, reduction, tmp_path, monkeypatch, within):
    monkeypatch.setattr(model.config, "prompt_reduction", reduction)
    monkeypatch.setenv("GKC_DEFORMABLE_ATTENTION", "embedding_bag")  # cannot be traced
    inputs, others = (call(model, processor, "embeddings", words, seed) for seed, words in enumerate((WORDS, WORDS)))
    others["class_ids"] = others["class_ids"].flip(0)
    expected = model(**others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        ordered = {name: inputs[name] for name in IN_ORDER}
        path, options = tmp_path / "model.onnx", {"dynamo": False, "opset_version": 17, "input_names": list(IN_ORDER)}
        torch.onnx.export(model, (), path, kwargs=ordered, **options)
    within("traced, max abs", difference(traced(**others), expected), 1e-4)
    session = onnxruntime.InferenceSession(path)
    taken = {value.name for value in session.get_inputs()}
    assert {"pixel_values", "pixel_mask", "class_embeds", "class_ids"} <= taken
    found = session.run(None, {name: value.numpy() for name, value in others.items() if name in taken})
    within("traced, as ONNX, max abs", np.abs(found[0] - expected.class_queries_logits.numpy()).max(), 1e-4)
    # A traced graph cannot raise errors, so it returns NaN for inputs that it does not support.
    others["pixel_mask"] = others["pixel_mask"].clone()
    others["pixel_mask"][:, :, 30:] = 0
    assert traced(**others)["masks_queries_logits"].isnan().all()


@pytest.mark.parametrize(
    ("classifier", "reduction", "form"),
    [
        ("projection", "mean", "tokens"),
        ("projection", "max", "embeddings"),
        ("convex", "embedding_mean", "tokens"),
        ("convex", "mean", "embeddings"),
    ],
)
def test_forward_reads_no_tensor_values(model, processor, classifier, reduction, form):
    """A fake tensor has no values: reading them raises an error."""
    if classifier == "convex":
        model = GKCForOpenVocabSegmentation(convex_config()).eval()
    inputs = call(model, processor, form, WORDS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        assert model(**fake, prompt_reduction=reduction).class_queries_logits.shape[-1] == 3


def test_unknown_number_of_classes_is_an_error(model, processor):
    torch.compiler.reset()
    inputs = call(model, processor, "embeddings", WORDS)
    del inputs["names_per_class"]
    with pytest.raises(Exception, match="give `names_per_class` too"):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs)


@pytest.mark.parametrize("counts", [[2, 2], [1, 2], [3], [2, 1, 0]])
def test_wrong_counts_of_class_or_name_ids_are_errors(model, processor, counts):
    inputs = call(model, processor, "embeddings", WORDS) | {"names_per_class": torch.tensor(counts)}
    with pytest.raises(ValueError, match="`names_per_class` does not match `class_ids`"):
        model(**inputs)
    tokens = call(model, processor, "tokens", WORDS) | {"prompts_per_name": torch.tensor(counts)}
    with pytest.raises(ValueError, match="`prompts_per_name` does not match `name_ids`"):
        model(**tokens)


def test_number_of_classes_is_trusted_on_accelerators():
    ids, counts = torch.zeros(3, dtype=torch.long, device="meta"), torch.ones(2, dtype=torch.long, device="meta")
    assert count_classes(ids, 3, counts=counts) == 2


def test_class_ids_may_be_permuted(model, processor):
    inputs = call(model, processor, "embeddings", ["red", "sky", "dog"])
    expected = model(**inputs).class_queries_logits
    order = torch.tensor([2, 0, 1])
    inputs |= {"class_embeds": inputs["class_embeds"][order], "class_ids": order}
    assert torch.equal(model(**inputs).class_queries_logits, expected)
