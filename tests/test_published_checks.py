"""Tests that run transformers' published test mixins of the installed version on small models and processors.

`tests/published_suites.py` downloads and imports them. `EXCEPTIONS` lists the checks that do not run here, with
reasons; `tests/common_checks.py` names the tests of this project that cover them where they apply.
"""

import copy
import itertools
import re
import unittest
from typing import Any, ClassVar

import pytest
import torch
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from modeling_gkc import (
    CLIPResNetBackbone,
    CLIPResNetConfig,
    CLIPResNetVisionModel,
    GKCConfig,
    GKCForOpenVocabSegmentation,
    GKCImageProcessor,
    GKCModel,
    GKCProcessor,
)
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentationOutput

from . import common_checks, published_suites
from .common_models import image_inputs, segmenter_inputs, segmenter_labels, tiny_config, tower_config
from .conftest import word_tokenizer

backbones = published_suites.load("test_backbone_common")
image_processors = published_suites.load("test_image_processing_common")
models = published_suites.load("test_modeling_common")
processors = published_suites.load("test_processing_common")


def without(mixin: type, reasons: dict[str, str]) -> type:
    """Return a mixin without the checks that have a reason, each of which it must have."""
    left_out = {check: [name for name in dir(mixin) if re.fullmatch(rf"{check}(_\d.*)?", name)] for check in reasons}
    assert all(left_out.values()), f"{mixin.__name__} lacks checks that are left out: {left_out}"
    hidden = {"__test__": False}  # from pytest, which would run them again
    return type(mixin.__name__, (mixin,), hidden | dict.fromkeys(itertools.chain(*left_out.values())))


class Tester:
    """Model tester of the mixins for one small model."""

    __test__ = False

    batch_size, seq_length, num_attention_heads, num_hidden_layers, hidden_size = 2, 6, 4, 1, 32

    def __init__(self, config: Any, inputs: Any, is_training: bool):
        self.get_config, self.inputs, self.is_training = config, inputs, is_training

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict]:
        return self.get_config(), self.inputs()


class OfModels(without(models.ModelTesterMixin, common_checks.NOT_RUN_OF_MODELS)):
    test_resize_embeddings = False
    config, inputs, labels, is_training = None, None, None, False

    def setUp(self):
        self.model_tester = Tester(type(self).config, type(self).inputs, self.is_training)

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        return copy.deepcopy(inputs) | (type(self).labels() if return_labels and self.is_training else {})


class SegmenterChecks(OfModels, unittest.TestCase):
    all_model_classes = (GKCForOpenVocabSegmentation,)
    config, inputs, labels, is_training = tiny_config, segmenter_inputs, segmenter_labels, True
    _is_composite = True


class ImagePathChecks(OfModels, unittest.TestCase):
    all_model_classes = (GKCModel,)
    config, inputs = tiny_config, image_inputs
    _is_composite = True


class TowerChecks(OfModels, unittest.TestCase):
    all_model_classes = (CLIPResNetVisionModel, CLIPResNetBackbone)
    config, inputs = tower_config, image_inputs


class BackboneChecks(without(backbones.BackboneTesterMixin, common_checks.NOT_RUN_OF_BACKBONES), unittest.TestCase):
    all_model_classes, config_class, has_attentions = (CLIPResNetBackbone,), CLIPResNetConfig, False

    def setUp(self):
        self.model_tester = Tester(tower_config, image_inputs, False)


class ImageProcessorTester(image_processors.ImageProcessingTester):
    def __init__(self, parent, **settings):
        # Padding to multiples of 32 is disabled: the mixin computes the shapes of unpadded images.
        super().__init__(
            parent, 3, size={"shortest_edge": 32, "longest_edge": 64}, size_divisor=1, num_labels=5, **settings
        )

    def _get_image_processing_classes(self) -> dict[str, type]:
        return IMAGE_PROCESSOR_MAPPING[GKCConfig]

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict, dict]:
        outputs = GKCForOpenVocabSegmentationOutput(
            class_queries_logits=torch.randn(3, 4, 6), masks_queries_logits=torch.randn(3, 4, 8, 12)
        )
        return {"outputs": outputs}, {"num_labels": 5, "height": 8, "width": 12}


class ImageProcessorChecks(
    image_processors.PostProcessSemanticSegmentationTestMixin,
    without(image_processors.ImageProcessingTestMixin, common_checks.NOT_RUN_OF_IMAGE_PROCESSORS),
    unittest.TestCase,
):
    image_processor_tester_class, test_cast_dtype = ImageProcessorTester, True


class ProcessorChecks(
    without(processors.ProcessorTesterMixin, common_checks.NOT_RUN_OF_PROCESSORS), unittest.TestCase
):
    processor_class: ClassVar[type] = GKCProcessor

    @classmethod
    def _setup_image_processor(cls) -> GKCImageProcessor:
        return GKCImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = word_tokenizer("lower newer upper older longer string")
        tokenizer.model_max_length = 512
        return tokenizer

    def prepare_text_inputs(self, batch_size: int | None = None, modalities: Any = None) -> str | list[str]:
        """Return labels, all of them different."""
        if batch_size is None:
            return "lower newer"
        return ["lower newer", "upper older longer string", "older", "newer string"][:batch_size]


@pytest.fixture(autouse=True)
def positive_rescale_factor(monkeypatch):
    """Replace the mixin's rescale factor of -1, which this library rejects; the values are negative all the same."""
    specification = processors.MODALITY_TEST_SPECS["images"]
    monkeypatch.setitem(specification["init_time_kwargs"], "rescale_factor", 1e-9)


SUITES = {
    "Models": (SegmenterChecks, ImagePathChecks, TowerChecks),
    "Backbones": (BackboneChecks,),
    "Image processors": (ImageProcessorChecks,),
    "Post-processing": (ImageProcessorChecks,),
    "Processors": (ProcessorChecks,),
}


def passed(cases: tuple[type, ...], checks: tuple[str, ...]) -> set[str]:
    """Run checks on all of `cases`.

    Returns:
        The checks that passed at least once; the others were skipped or do not run.

    Raises:
        AssertionError: A check failed; all failures are listed.
    """
    result, names = unittest.TestResult(), set()
    result.addSuccess = lambda test: names.add(test._testMethodName)
    for case in cases:
        found = unittest.defaultTestLoader.loadTestsFromTestCase(case)
        chosen = [test for test in found if check_of(test._testMethodName, checks)]
        unittest.TestSuite(chosen).run(result)
    failures = [f"{test}: {trace.strip().splitlines()[-1]}" for test, trace in result.failures + result.errors]
    assert failures == []
    return {check_of(name, checks) for name in names}


def check_of(test: str, checks: tuple[str, ...]) -> str | None:
    """Return the check that a test is, or of which it is one set of parameters."""
    return max((check for check in checks if test == check or test.startswith(f"{check}_")), key=len, default=None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suite", SUITES)
def test_published_checks_pass(suite):
    """Every published check passes, or `common_checks.py` has the reason why it does not run."""
    published = common_checks.PUBLISHED[suite]
    checks = published_suites.checks(published.module, published.mixin)
    assert passed(SUITES[suite], checks) == set(common_checks.RUN_AS_PUBLISHED[suite])


@pytest.mark.parametrize("suite", common_checks.PUBLISHED)
def test_table_lists_every_check(suite):
    """Each check is run as published, covered by tests of this project, or has a reason; none is invented."""
    published, entries = common_checks.PUBLISHED[suite], common_checks.SUITES[suite]
    checks = published_suites.checks(published.module, published.mixin)
    run = common_checks.RUN_AS_PUBLISHED.get(suite, frozenset())
    assert set(entries) <= set(checks) and set(run) <= set(checks)
    assert [check for check in checks if check not in entries and check not in run] == []
