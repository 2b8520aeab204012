"""Loading the two towers of a CLIP from the folders in which they come."""

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
CLIP_LOGIT_SCALE = 100.0  # of all that OpenAI published
_VISION_CLASSES = {
    "clip_resnet": CLIPResNetVisionModel,
    "clip_vision_model": CLIPVisionModelWithProjection,
    "clip": CLIPVisionModelWithProjection,
}
_TEXT_CLASSES = {"clip_text_model": CLIPTextModelWithProjection, "clip": CLIPTextModelWithProjection}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class CLIPTowers(NamedTuple):
    """Both towers of a CLIP, in evaluation mode and fp32, its tokenizer, and the factor of its cosines."""

    vision_model: nn.Module
    text_model: CLIPTextModelWithProjection
    tokenizer: PreTrainedTokenizerBase
    logit_scale: float


def load_clip_towers(path: str | Path) -> CLIPTowers:
    """Load both towers of a CLIP.

    Args:
        path: A folder or the name of a Hub repository, in one of three layouts:
            a `CLIPModel` of transformers;
            what `gkc convert clip-resnet --text` writes: the image tower, and the text tower in `text/`;
            what `train.miniworld` writes: `vision/` and `text/`.
            The tokenizer lies beside the text tower; where it does not and the tower is of OpenAI's size, it is taken
            from their repository. The factor of the cosines is that of a `CLIPModel`, or `logit_scale` in a file
            `clip.json`, or else 100.

    Raises:
        ValueError: a part is missing or something else; the message says what to do.
    """
    vision_model = load_vision_tower(path)
    subfolder, kind = _find(path, ("text", ""), _TEXT_CLASSES)
    if kind is None:
        raise ValueError(f"{path} has no text tower: convert it again with `gkc convert clip-resnet WEIGHTS --text`.")
    text_model = _load(_TEXT_CLASSES[kind], path, subfolder)
    widths = vision_model.config.projection_dim, text_model.config.projection_dim
    if widths[0] != widths[1]:
        raise ValueError(f"The towers of {path} do not belong together: they embed in {widths[0]} and {widths[1]}.")
    return CLIPTowers(vision_model, text_model, _tokenizer(path, subfolder, text_model), _logit_scale(path, kind))


def load_vision_tower(path: str | Path) -> nn.Module:
    """Load the image tower of a CLIP, in evaluation mode and fp32; layouts as of `load_clip_towers`, text not needed.

    Raises:
        ValueError: there is none, or its weights are not all there.
    """
    subfolder, kind = _find(path, ("", "vision"), _VISION_CLASSES)
    if kind is None:
        raise ValueError(
            f"{path} holds no CLIP: name a folder that `gkc convert clip-resnet` wrote, or a transformers CLIPModel."
        )
    return _load(_VISION_CLASSES[kind], path, subfolder)


def _find(path: str | Path, subfolders: tuple[str, ...], kinds: dict) -> tuple[str, str | None]:
    """The first subfolder with a model of one of the kinds, and its kind."""
    for subfolder in subfolders:
        try:
            kind = AutoConfig.from_pretrained(path, subfolder=subfolder, trust_remote_code=False).model_type
        except Exception:  # a damaged file can make transformers raise errors of any type
            continue
        if kind in kinds:
            return subfolder, kind
    return "", None


def _load(model_class: type[PreTrainedModel], path: str | Path, subfolder: str) -> nn.Module:
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
    vocabulary_size = text_model.config.vocab_size
    if any(_has_file(path, subfolder, name) for name in _TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
    elif vocabulary_size == CLIP_VOCABULARY_SIZE:
        tokenizer = _openai_tokenizer(Path(path) / subfolder)
    else:
        raise ValueError(f"{Path(path) / subfolder} has no tokenizer: save it there with `tokenizer.save_pretrained`.")
    if len(tokenizer) > vocabulary_size:
        raise ValueError(
            f"The tokenizer of {path} has {len(tokenizer)} tokens, its text tower {vocabulary_size}: they do not "
            "belong together."
        )
    return tokenizer


def _openai_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(CLIP_TOKENIZER, trust_remote_code=False)
    except OSError as error:
        save = f"AutoTokenizer.from_pretrained('{CLIP_TOKENIZER}').save_pretrained('{folder}')"
        raise ValueError(
            f"{folder} has no tokenizer and {CLIP_TOKENIZER} cannot be reached; where it can, run {save} in Python."
        ) from error


def _logit_scale(path: str | Path, kind: str) -> float:
    if _has_file(path, "", "clip.json"):
        return float(json.loads(Path(cached_file(path, "clip.json")).read_text())["logit_scale"])
    if kind == "clip":
        return math.exp(float(_load(CLIPModel, path, "").logit_scale))
    return CLIP_LOGIT_SCALE


def _has_file(path: str | Path, subfolder: str, name: str) -> bool:
    found = cached_file(
        path,
        name,
        subfolder=subfolder,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None
