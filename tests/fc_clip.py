"""Recorded numbers of FC-CLIP, read for the tests that compare with them; see `golden/README.md`."""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "golden" / "fc_clip"
CLIP_PREFIX = "backbone.clip_model."


class Recording:
    """Arrays of one small model: `meta`, `weights` under the published names, and the other arrays by name.

    Large arrays are stored as every third row and column, under their name with `.every3rd`; `expected` cuts what is
    compared with them in the same way.
    """

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
            self.meta: dict[str, Any] = json.loads(str(arrays["meta_json"]))
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "meta_json"}
        self.weights = {key[2:]: value for key, value in self.arrays.items() if key.startswith("w.")}

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def error(self, name: str, actual: Tensor) -> Tensor:
        """Largest absolute difference from a recorded array."""
        if name not in self.arrays:
            name, actual = f"{name}.every3rd", actual[..., ::3, ::3]
        expected = self.arrays[name]
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        return (actual.double() - expected.double()).abs().max()

    def clip_weights(self) -> dict[str, Tensor]:
        """Weights of the CLIP model, by OpenCLIP's names."""
        return {
            name.removeprefix(CLIP_PREFIX): weight
            for name, weight in self.weights.items()
            if name.startswith(CLIP_PREFIX)
        }


@functools.cache
def recording(name: str) -> Recording:
    """Return the recording `rn` or `convnext`."""
    return Recording(name)


@functools.cache
def published_keys() -> dict[str, dict[str, Any]]:
    """Return the `keys` (name: shape) and the settings of each of the six published configurations."""
    return json.loads(gzip.decompress((FOLDER / "keys.json.gz").read_bytes()))


def empty_weights(config: str) -> dict[str, Tensor]:
    """Weights of a published configuration, of its names and shapes, that take no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in published_keys()[config]["keys"].items()}


def tokenizer_of_recording() -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer whose end token is the largest, 95, as in the recorded text encoders."""
    words = "a the is in there this photo of scene small medium large . cat kitten couch road street sofa umbrella sky"
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<start>", "<unknown>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"<end>": 95}, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 95)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        unk_token="<unknown>",
        eos_token="<end>",
        model_max_length=16,
    )
