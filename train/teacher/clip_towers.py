"""Loading of CLIP's image and text encoders from folders and Hub repositories."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from modeling_gkc.checkpoint_loading import check_shard_paths
from modeling_gkc.label_text import error_line
from modeling_gkc.modeling_clip_resnet import CLIPResNetVisionModel

CLIP_TOKENIZER = "openai/clip-vit-base-patch16"
CLIP_VOCABULARY_SIZE = 49_408
CLIP_LOGIT_SCALE = 100.0  # the same in all of OpenAI's checkpoints
_VISION_CLASSES = {
    "clip_resnet": CLIPResNetVisionModel,
    "clip_vision_model": CLIPVisionModelWithProjection,
    "clip": CLIPVisionModelWithProjection,
}
_TEXT_CLASSES = {"clip_text_model": CLIPTextModelWithProjection, "clip": CLIPTextModelWithProjection}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class CLIPTowers(NamedTuple):
    """Image and text encoder of a CLIP, in evaluation mode and fp32.

    Attributes:
        vision_model: Image encoder.
        text_model: Text encoder.
        tokenizer: Tokenizer of the text encoder.
        logit_scale: Factor of the cosine similarities of images and texts.
    """

    vision_model: nn.Module
    text_model: CLIPTextModelWithProjection
    tokenizer: PreTrainedTokenizerBase
    logit_scale: float


def load_clip_towers(path: str | Path) -> CLIPTowers:
    """Load the image encoder, text encoder and tokenizer of a CLIP.

    Three layouts are supported: a `CLIPModel` of transformers; a folder that `gkc convert clip-resnet --text` wrote,
    with the image encoder at its top and the text encoder in `text/`; and a folder that `train.miniworld` wrote, with
    `vision/` and `text/`.

    The tokenizer is read from the folder of the text encoder. If it has none and its vocabulary has the size of
    OpenAI's, OpenAI's tokenizer is used. The logit scale is that of the `CLIPModel`, or `logit_scale` in the file
    `clip.json`, or 100.

    Args:
        path: Folder or name of a Hub repository.

    Returns:
        The towers in evaluation mode and fp32.

    Raises:
        ValueError: A part is missing or cannot be used; the message says what to do.
    """
    vision_model = load_vision_tower(path)
    subfolder, kind = _find(path, ("text", ""), _TEXT_CLASSES)
    if kind is None:
        raise ValueError(
            f"{path} has no text encoder: convert it again with `gkc convert clip-resnet WEIGHTS --text`."
        )
    text_model = _load(_TEXT_CLASSES[kind], path, subfolder)
    widths = vision_model.config.projection_dim, text_model.config.projection_dim
    if widths[0] != widths[1]:
        raise ValueError(
            f"The towers of {path} embed in {widths[0]} and {widths[1]} dimensions, which must be equal: "
            "convert both from one CLIP."
        )
    return CLIPTowers(vision_model, text_model, _tokenizer(path, subfolder, text_model), _logit_scale(path, kind))


def load_vision_tower(path: str | Path) -> nn.Module:
    """Load the image encoder of a CLIP, in evaluation mode and fp32.

    Args:
        path: Folder or name of a Hub repository, in a layout of `load_clip_towers`. The text encoder may be missing.

    Raises:
        ValueError: There is no image encoder, or some of its weights are missing.
    """
    subfolder, kind = _find(path, ("", "vision"), _VISION_CLASSES)
    if kind is None:
        raise ValueError(
            f"{path} contains no CLIP: name a folder that `gkc convert clip-resnet` wrote, or a "
            "transformers CLIPModel."
        )
    return _load(_VISION_CLASSES[kind], path, subfolder)


def _find(path: str | Path, subfolders: tuple[str, ...], kinds: dict) -> tuple[str, str | None]:
    """Return the first subfolder that contains a model of one of the kinds, and the kind."""
    for subfolder in subfolders:
        try:
            kind = AutoConfig.from_pretrained(path, subfolder=subfolder, trust_remote_code=False).model_type
        except Exception:  # a damaged file can make transformers raise errors of any type
            continue
        if kind in kinds:
            return subfolder, kind
    return "", None


def _load(model_class: type[PreTrainedModel], path: str | Path, subfolder: str) -> nn.Module:
    """Load a model in evaluation mode; raise a `ValueError` if a file is damaged or a parameter is missing."""
    try:
        check_shard_paths(path, subfolder)
        model, info = model_class.from_pretrained(
            path, subfolder=subfolder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise ValueError(f"{Path(path) / subfolder} cannot be loaded: {error_line(error)}") from error
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ValueError(f"{Path(path) / subfolder} lacks weights: {', '.join(missing[:5])}.")
    return model.eval()


def _tokenizer(path: str | Path, subfolder: str, text_model: nn.Module) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text encoder, or OpenAI's if there is none."""
    vocabulary_size = text_model.config.vocab_size
    if any(_has_file(path, subfolder, name) for name in _TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
    elif vocabulary_size == CLIP_VOCABULARY_SIZE:
        try:
            tokenizer = AutoTokenizer.from_pretrained(CLIP_TOKENIZER, trust_remote_code=False)
        except OSError as error:
            folder = Path(path) / subfolder
            save = f"AutoTokenizer.from_pretrained('{CLIP_TOKENIZER}').save_pretrained('{folder}')"
            raise ValueError(
                f"{folder} has no tokenizer and {CLIP_TOKENIZER} cannot be reached; where it can, run {save} in "
                "Python."
            ) from error
    else:
        raise ValueError(f"{Path(path) / subfolder} has no tokenizer: save it there with `tokenizer.save_pretrained`.")
    if len(tokenizer) > vocabulary_size:
        raise ValueError(
            f"The tokenizer of {path} has {len(tokenizer)} tokens, its text encoder only {vocabulary_size}: save "
            "the tokenizer of this text encoder there."
        )
    return tokenizer


def _logit_scale(path: str | Path, kind: str) -> float:
    """Return the factor of the cosine similarities."""
    if _has_file(path, "", "clip.json"):
        return float(json.loads(Path(cached_file(path, "clip.json")).read_text())["logit_scale"])
    if kind == "clip":
        return math.exp(float(_load(CLIPModel, path, "").logit_scale))
    return CLIP_LOGIT_SCALE


def _has_file(path: str | Path, subfolder: str, name: str) -> bool:
    """Return whether a folder or Hub repository contains a file."""
    found = cached_file(
        path,
        name,
        subfolder=subfolder,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None
