"""Fuzzer of configurations and checkpoint folders.

Most inputs are configurations with one value changed, removed or added: they must raise a ValueError or give a model
that computes finite logits. The others are checkpoint folders with one damaged file: loading them must raise an error
of one line, or give a model that computes finite logits and has all weights that were saved.
"""

import copy
import json
import math
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from modeling_gkc import GKCConfig, GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary
from modeling_gkc.cli.common import UserError, load_checkpoint
from tests.conftest import small_config, word_tokenizer

VALUES = ["96", -1, 0, 1, 1.5, None, [], {}, "", "x", True, 10**6, 10**30, math.nan, math.inf, [1, 2], {"a": 1}, [[]]]
VALUES += ["\ud800", "../outside", 1e-30, -0.5, 33]
SECONDS = 20
PARAMETERS_COMPUTED = 3_000_000


@dataclass
class Checkpoint:
    """Intact checkpoint, and the folder for damaged copies of it."""

    source: Path
    folder: Path
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]


def setup(folder: Path) -> Checkpoint:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    source = folder / "whole"
    processor = GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())
    model = GKCForOpenVocabSegmentation(small_config(encoder_layers=1, decoder_layers=1)).eval()
    model.set_vocabulary(Vocabulary([["disc"], ["lawn", "grass"]], is_thing=[True, False]), processor)
    model.save_pretrained(source)
    processor.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    return Checkpoint(source, folder / "damaged", config, load_file(source / "model.safetensors"))


def check(checkpoint: Checkpoint, rng: random.Random) -> str:
    with _limited_time():
        return _check_config(checkpoint, rng) if rng.random() < 0.85 else _check_folder(checkpoint, rng)


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_):
        raise AssertionError(f"the input took more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _check_config(checkpoint: Checkpoint, rng: random.Random) -> str:
    values = copy.deepcopy(checkpoint.config)
    change = _mutate(values, rng)
    try:
        config = GKCConfig.from_dict(values)
    except ValueError as error:
        _assert_one_line(str(error), change)
        return "refused"
    try:
        with torch.device("meta"):
            model = GKCForOpenVocabSegmentation(config)
    except (ValueError, ImportError) as error:  # an attention implementation that is not installed
        assert "attn_implementation" in change and "\n" not in str(error), f"{change}: {error}"
        return "refused"
    if sum(weight.numel() for weight in model.parameters()) < PARAMETERS_COMPUTED and rng.random() < 0.15:
        torch.manual_seed(0)
        _compute(GKCForOpenVocabSegmentation(config).eval(), change)
    return "accepted"


def _compute(model: GKCForOpenVocabSegmentation, change: str) -> None:
    """Check that the model returns finite logits of the right shape for an image and three prompts."""
    ids = torch.tensor([[1, 5, 3], [1, 6, 3], [1, 7, 3]])[:, : model.config.text_config.max_position_embeddings]
    pixels = torch.randn(1, model.config.backbone_config.num_channels, 64, 64)
    with torch.no_grad():
        outputs = model(pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    shape = (1, model.config.num_queries, 4)
    assert outputs.class_queries_logits.shape == shape, f"{change}: {outputs.class_queries_logits.shape}"
    assert outputs.class_queries_logits.isfinite().all(), f"{change}: the logits are not finite"
    assert outputs.masks_queries_logits.isfinite().all(), f"{change}: the masks are not finite"


def _mutate(values: dict[str, Any], rng: random.Random) -> str:
    """Change, remove or add one value at any depth and describe the change."""
    place: Any = values
    path = []
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        path.append(key)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        break
    kind = rng.random()
    if kind < 0.15:
        del place[key]
        return f"{path} removed"
    value = copy.deepcopy(rng.choice(VALUES))
    if kind < 0.2 and isinstance(place, dict):
        key = rng.choice(["auto_map", "num_labels", "quantization_config", "unknown", "_attn_implementation", "dtype"])
    place[key] = value
    return f"{path} -> {key!r}: {value!r}"


def _check_folder(checkpoint: Checkpoint, rng: random.Random) -> str:
    shutil.rmtree(checkpoint.folder, ignore_errors=True)
    shutil.copytree(checkpoint.source, checkpoint.folder)
    change = _damage(checkpoint, rng)
    try:
        model, processor = load_checkpoint(checkpoint.folder)
    except UserError as error:
        assert str(checkpoint.folder) in str(error), f"{change}: {error}"
        _assert_one_line(str(error), change)
        return "refused"
    state = model.state_dict()
    assert state.keys() == checkpoint.weights.keys(), f"{change}: other weights"
    if change.startswith("model.safetensors"):  # its values may have changed
        return "accepted"
    for name, weight in checkpoint.weights.items():
        assert torch.equal(state[name], weight), f"{change}: {name} has changed"
    inputs = processor(images=np.zeros((20, 50, 3), np.uint8), text="red disc; sky", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    assert inputs["pixel_values"].isfinite().all() and outputs.class_queries_logits.isfinite().all(), change
    return "accepted"


def _damage(checkpoint: Checkpoint, rng: random.Random) -> str:
    path = checkpoint.folder / rng.choice(sorted(path.name for path in checkpoint.source.iterdir()))
    kind = rng.choice(["value", "value", "value", "cut", "flip", "gone", "index", "weights"])
    if kind == "index":
        outside = rng.choice(
            ["../whole/model.safetensors", str(checkpoint.source / "model.safetensors"), "a/b", 5, None]
        )
        index = rng.choice([{"metadata": {}, "weight_map": dict.fromkeys(checkpoint.weights, outside)}, {}, [], "x"])
        (checkpoint.folder / "model.safetensors").unlink()
        (checkpoint.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return f"index of {outside}"
    if kind == "value" and path.suffix == ".json":
        values = json.loads(path.read_text())
        change = _mutate(values, rng)
        path.write_text(json.dumps(values))
        return f"{path.name}: {change}"
    if kind == "gone":
        path.unlink()
        return f"{path.name} removed"
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 20_000))] = rng.randrange(256)
    path.write_bytes(data)
    return f"{path.name}: {kind}"


def _assert_one_line(message: str, change: str) -> None:
    assert message and "\n" not in message and len(message) < 20_000, f"{change}: {message!r}"
    message.encode()
