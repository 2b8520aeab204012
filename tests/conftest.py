"""What the tests share: small random models, one thread, no network, a table of measured errors."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Results of the two devices differ in their last bits, and forked processes cannot use CUDA: the suite runs on the CPU
# of a machine with a GPU too. `GKC_TEST_CUDA=1` runs what needs a GPU (tests/test_cuda.py and the Triton kernels).
if os.environ.get("GKC_TEST_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Programs that tests start compute on one thread as the tests do: a sum split among threads has other last bits.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, PreTrainedTokenizerFast

from modeling_gkc.configuration_gkc import CLIPResNetConfig, GKCConfig

torch.set_num_threads(1)

ERRORS: pytest.StashKey[dict[str, tuple[float, float]]] = pytest.StashKey()


def small_config(**overrides) -> GKCConfig:
    """A configuration with every part, small enough for a test."""
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
    """
    Copy all weights of a loaded model to new memory, and return the model.

    `from_pretrained` maps weights from their file, where they begin at any multiple of 4 bytes; torch aligns its own
    memory to 64. MKL sums a product in another order by that, above all of a matrix and a vector, which the projection
    of a single word is: equal weights give other last bits (4e-7 of unit embeddings, in no case with
    MKL_CBWR=COMPATIBLE). Bits can be compared once both models' weights are aligned.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _note(config: pytest.Config, what: str, error: float, bound: float) -> None:
    errors = config.stash.setdefault(ERRORS, {})
    largest, _ = errors.get(what, (0.0, bound))
    errors[what] = (max(largest, error), bound)


def pytest_sessionfinish(session):
    """In a worker of pytest-xdist: hand over what `within` measured."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured errors"] = list(session.config.stash.get(ERRORS, {}).items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """In the process that prints: collect what the workers measured."""
    for what, (error, bound) in getattr(node, "workeroutput", {}).get("measured errors", []):
        _note(node.config, what, error, bound)


@pytest.fixture
def within(request):
    """Asserts that an error lies within its bound; the largest of each name is listed at the end of the run."""

    def check(what: str, error: torch.Tensor | float, bound: float) -> None:
        _note(request.config, what, float(error), bound)
        assert float(error) <= bound, f"{what}: {float(error):.3g} is more than {bound:g}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    """Prints the errors that `within` measured."""
    errors = config.stash.get(ERRORS, {})
    if errors:
        terminalreporter.section("measured errors")
    for what, (error, bound) in errors.items():
        terminalreporter.line(f"{what:<75} {error:9.2g}   (bound {bound:g})")


@pytest.fixture
def transformers_log(caplog):
    """What transformers logs, which does not reach pytest by itself."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def config() -> GKCConfig:
    return small_config()


def word_tokenizer(words: str = "red blue disc square box lawn grass star sky air dog sofa couch lamp"):
    """A word-level tokenizer that fits `small_config`."""
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
