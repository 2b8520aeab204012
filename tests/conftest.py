"""Shared fixtures and settings: small random models, one thread, no network, and a table of measured errors."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Results on CPU and GPU differ by rounding, and forked processes cannot use CUDA: the suite runs on the CPU even if
# there is a GPU. `GKC_TEST_CUDA=1` enables the tests that need one (tests/test_cuda.py and the Triton kernels).
if os.environ.get("GKC_TEST_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Programs started by tests use one thread like the tests: sums split among threads differ by rounding.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, PreTrainedTokenizerFast

from modeling_gkc.configuration_gkc import CLIPResNetConfig, GKCConfig

torch.set_num_threads(1)

ERRORS: pytest.StashKey[dict[str, tuple[float, float]]] = pytest.StashKey()


def small_config(**overrides) -> GKCConfig:
    """Return a configuration with every part of the model, small enough for a test."""
    values = {
        "backbone_config": CLIPResNetConfig(
            width=8, depths=[1, 1, 1, 1], num_attention_heads=4, image_size=64, projection_dim=16
        ),
        "text_config": CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        ),
        "hidden_size": 32,
        "mask_feature_size": 32,
        "encoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_layers": 4,
        "decoder_ffn_dim": 64,
        "num_attention_heads": 4,
        "num_queries": 10,
        "train_num_points": 64,
    }
    return GKCConfig(**(values | overrides))


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """Copy all weights of a loaded model to new memory, in place, and return the model.

    `from_pretrained` maps weights from their file, where they start at any multiple of 4 bytes; torch aligns its own
    memory to 64 bytes. MKL chooses the order of summation by alignment, above all for products of a matrix and a
    vector, such as the projection of a single prompt: equal weights give results that differ by rounding (4e-7 for
    unit embeddings, never with MKL_CBWR=COMPATIBLE). Results are bit-equal once both models are aligned.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _record_error(config: pytest.Config, what: str, error: float, bound: float) -> None:
    errors = config.stash.setdefault(ERRORS, {})
    largest, _ = errors.get(what, (0.0, bound))
    errors[what] = (max(largest, error), bound)


def pytest_sessionfinish(session):
    """Pass the errors measured by `within` to the main process of pytest-xdist."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured errors"] = list(session.config.stash.get(ERRORS, {}).items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Collect the errors measured by the workers of pytest-xdist."""
    for what, (error, bound) in getattr(node, "workeroutput", {}).get("measured errors", []):
        _record_error(node.config, what, error, bound)


@pytest.fixture
def within(request):
    """Return a function that asserts an error bound; the largest error of each name is listed after the run."""

    def check(what: str, error: torch.Tensor | float, bound: float) -> None:
        _record_error(request.config, what, float(error), bound)
        assert float(error) <= bound, f"{what}: {float(error):.3g} exceeds the bound {bound:g}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    """Print the errors measured by `within`."""
    errors = config.stash.get(ERRORS, {})
    if errors:
        terminalreporter.section("measured errors")
    for what, (error, bound) in errors.items():
        terminalreporter.line(f"{what:<75} {error:9.2g}   (bound {bound:g})")


@pytest.fixture
def transformers_log(caplog):
    """Capture the log of transformers, which does not propagate to pytest's handler."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch before every test."""
    torch.manual_seed(0)


@pytest.fixture
def config() -> GKCConfig:
    return small_config()


def word_tokenizer(words: str = "red blue disc square box lawn grass star sky air dog sofa couch lamp"):
    """Return a word-level tokenizer that fits `small_config`."""
    special = ["<pad>", "<start>", "<unknown>", "<end>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*special, *words.split()])}, unk_token="<unknown>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=16,
        pad_token="<pad>",
        bos_token="<start>",
        unk_token="<unknown>",
        eos_token="<end>",
    )
