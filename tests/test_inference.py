"""Tests of `optimize_for_inference`: equal results, compilation, and unsupported uses of an optimized model."""

import pytest
import torch
from transformers.utils import logging

from modeling_gkc import GKCForOpenVocabSegmentation, GKCPredictor, GKCSegmentationPipeline, inference
from modeling_gkc.checkpoint_loading import load_checkpoint_parts
from modeling_gkc.export.exporter import export_segmenter
from modeling_gkc.inference import fold_batch_norms

from .common_models import CASES, SEGMENTERS, Case, tiny_config


@pytest.fixture(params=SEGMENTERS)
def case(request) -> Case:
    return CASES[request.param]


def random_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Set random BatchNorm statistics, because the initial ones have no effect."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for statistic in (module.weight, module.running_var):
                torch.nn.init.uniform_(statistic, 0.5, 2, generator=generator)
            for statistic in (module.bias, module.running_mean):
                torch.nn.init.normal_(statistic, 0, 0.2, generator=generator)
    return model


def outputs(model: GKCForOpenVocabSegmentation, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return output.class_queries_logits.softmax(-1), output.masks_queries_logits


def test_optimization_does_not_change_results(case, within):
    model, inputs = random_statistics(case.model().eval()), case.inputs()
    before = outputs(model, inputs)
    folds = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    optimized = model.optimize_for_inference(compile=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in optimized.modules())
    for what, one, other in zip(("probabilities", "masks"), outputs(optimized, inputs), before, strict=True):
        error = (one - other).abs().max() / other.abs().max().clamp(min=1)
        within(f"{what} of a model optimised for inference, relative", error, 1e-4)
    assert folds or not fold_batch_norms(model)
    for one, other in zip(outputs(model, inputs), before, strict=True):
        assert torch.equal(one, other), "the model itself is as it was"


def test_half_precision_model_accepts_fp32_images(within):
    case = CASES["segmenter"]
    model, inputs = random_statistics(case.model().eval()), case.inputs()
    before = outputs(model, inputs)
    model = model.optimize_for_inference(torch.bfloat16, compile=False)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    probabilities, _ = outputs(model, inputs)
    within("probabilities of a model optimised for bf16, max abs", (probabilities - before[0]).abs().max(), 0.05)


def test_projections_of_earlier_stages_are_removed():
    model = CASES["segmenter"].model()
    optimized = model.optimize_for_inference(compile=False)
    stages, kept = (len(each.classifier.stage_projections) for each in (model, optimized))
    assert stages > 1 and kept == 1


def test_calls_in_all_grad_modes_and_memory_formats_share_one_graph(monkeypatch):
    """Otherwise each grad mode and memory format would be compiled separately."""
    case = CASES["segmenter"]
    model = case.model().eval().optimize_for_inference(compile=False)
    seen = []

    def record(module, args, kwargs):
        (pixel_values,) = args
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                pixel_values.is_inference(),
                pixel_values.is_contiguous(memory_format=torch.channels_last),
                tuple(kwargs.items()),
            )
        )

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    inference.warm_up(model._segment, [(64, 64)], 1, model.device)
    model(**case.inputs())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            inputs = case.inputs()
            model(**inputs | {"pixel_values": inputs["pixel_values"].to(memory_format=torch.channels_last)})
    assert len(seen) == 4 and len(set(seen)) == 1


def test_each_size_is_compiled_once(monkeypatch):
    """Only the front end of the compiler is used, because compilation takes a minute."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(example_inputs)
        return graph

    monkeypatch.setattr(
        "modeling_gkc.inference.compile_image_path",
        lambda image_path: image_path.compile(dynamic=False, backend=count),
    )
    case = CASES["segmenter"]
    model, inputs = case.model().eval(), case.inputs()
    expected = outputs(model, inputs)
    batch_size, _, *size = inputs["pixel_values"].shape
    model = model.optimize_for_inference(sizes=[size], batch_size=batch_size)
    assert len(graphs) == 1, "in one graph"
    for one, other in zip(outputs(model, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("sizes", [[(64, 64)], []], ids=["found when warming up", "found at the first call"])
def test_without_a_compiler_the_model_runs_uncompiled(sizes, monkeypatch, transformers_log):
    def fail(graph, example_inputs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(
        "modeling_gkc.inference.compile_image_path", lambda image_path: image_path.compile(backend=fail)
    )
    logging.set_verbosity_warning()
    case = CASES["segmenter"]
    model, inputs = case.model().eval(), case.inputs()
    expected = outputs(model, inputs)
    model = model.optimize_for_inference(sizes=sizes)
    outputs(model, inputs)
    assert "The model runs uncompiled, because torch.compile failed (no C++ compiler found)" in transformers_log.text
    for one, other in zip(outputs(model, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("purpose", "use"),
    [
        ("train", lambda model, folder: model.train()),
        ("train", lambda model, folder: model.requires_grad_()),
        ("train", lambda model, folder: model.gradient_checkpointing_enable()),
        ("optimize", lambda model, folder: model.optimize_for_inference()),
        ("save", lambda model, folder: model.save_pretrained(folder)),
        ("export", lambda model, folder: export_segmenter(model, None, folder / "graph")),
    ],
)
def test_optimized_models_cannot_be_trained_saved_or_exported(purpose, use, tmp_path):
    model = CASES["segmenter"].model().optimize_for_inference(compile=False)
    with pytest.raises(ValueError, match=f"{purpose} the original model"):
        use(model, tmp_path)
    assert not any(tmp_path.iterdir())
    assert not model.eval().training
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())


@pytest.mark.parametrize(
    "arguments", [{"output_stages": True}, {"mask_labels": [torch.ones(1, 64, 64)]}, {"labels": "dog"}]
)
def test_optimized_models_accept_neither_stages_nor_labels(arguments):
    model = CASES["segmenter"].model().optimize_for_inference(compile=False)
    with pytest.raises(TypeError, match=f"An optimized model takes no `{next(iter(arguments))}`: call the original"):
        model(**CASES["segmenter"].inputs(), **arguments)


def test_images_of_several_sizes_and_other_vocabularies(within):
    """Compare in double precision, because rounding errors depend on the batch size."""
    model = random_statistics(CASES["segmenter"].model().double())
    optimized = model.optimize_for_inference(compile=False)
    pixel_values, pixel_mask = torch.randn(2, 3, 64, 96, dtype=torch.float64), torch.ones(2, 64, 96)
    pixel_mask[1, 33:], pixel_mask[1, :, 20:] = 0, 0
    inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "class_embeds": torch.eye(3, 16)}
    inputs["class_ids"] = torch.tensor([0, 1, 1])
    with torch.no_grad():
        expected, found = model(**inputs), optimized(**inputs)
        assert torch.equal(expected.content_sizes, found.content_sizes)
        again = optimized.classify(found.query_embeds, torch.eye(2, 16).double())
        assert torch.equal(again, optimized.class_logits(found.query_embeds, torch.eye(2, 16).double()))
    for name in ("class_queries_logits", "masks_queries_logits", "query_embeds"):
        within(f"optimized, two sizes, {name}, max abs", (found[name] - expected[name]).abs().max(), 1e-4)


def test_predictor_and_pipelines_accept_an_optimized_model():
    folder = "hub_card/gkc-mini"
    model, processor = load_checkpoint_parts(folder)
    optimized = model.optimize_for_inference(compile=False)
    image = "examples/scene-1.png"
    maps = []
    for each in (model, optimized):
        predictor = GKCPredictor(each, processor)
        predictor.set_vocabulary("red disc; lawn, grass; sky")
        maps.append(predictor.predict(image).segmentation)
    assert (maps[0] != maps[1]).float().mean() < 1e-3
    segmenter = GKCSegmentationPipeline(model=optimized, processor=processor)
    assert [found["label"] for found in segmenter(image)]
    assert segmenter(image, labels="red disc; sky")


def test_optimization_does_not_change_the_original_model():
    """Folding changes neither the original model nor others of its configuration."""
    config = tiny_config()
    one, other = (GKCForOpenVocabSegmentation(config).eval() for _ in range(2))
    one.optimize_for_inference(compile=False)
    for model in (one, other):
        assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
