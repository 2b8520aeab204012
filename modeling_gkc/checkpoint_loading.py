# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Safe loading of untrusted checkpoints: run no code, read no files outside of them, and require all weights."""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from .argument_checks import check_whole_number, shown
from .configuration_gkc import GKCConfig
from .configuration_gkc_zero_shot import GKCZeroShotConfig
from .label_text import error_line
from .modeling_gkc import GKCForOpenVocabSegmentation
from .modeling_gkc_zero_shot import GKCForZeroShotSegmentation
from .processing_gkc import GKCProcessor

MAX_LISTED_WEIGHTS = 100
MODEL_CLASSES = {
    GKCConfig.model_type: GKCForOpenVocabSegmentation,
    GKCZeroShotConfig.model_type: GKCForZeroShotSegmentation,
}
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_JSON_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")


def load_checkpoint_parts(
    path: str | Path, **settings
) -> tuple[GKCForOpenVocabSegmentation | GKCForZeroShotSegmentation, GKCProcessor]:
    """Load the model, in evaluation mode, and the processor of a checkpoint.

    Args:
        path: Folder of the checkpoint, or repository `owner/name` of the Hub.
        settings: Fields of the configuration to override.

    Returns:
        The model and the processor.

    Raises:
        ValueError: If it is not a checkpoint of gkc, is damaged, has missing or unexpected weights, or needs custom
            code. The message is one line without the path. No errors of other types are raised.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of wrong weights: the error lists them
    try:
        _check_json_files(path)
        stored = _stored_config(path)
        model_type = stored.get("model_type") if isinstance(stored, dict) else None
        if model_type not in MODEL_CLASSES:
            raise ValueError(f"its model_type is {shown(model_type)}, not {' or '.join(map(repr, MODEL_CLASSES))}.")
        unknown = sorted(set(settings) - set(MODEL_CLASSES[model_type].config_class.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"it is a {model_type!r}, which has no setting `{unknown[0]}` and is not trained: train a student of "
                "it by `python -m train distil`."
            )
        check_shard_paths(path)
        model, info = MODEL_CLASSES[model_type].from_pretrained(
            path,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the error below can name them
            **settings,
        )
        check_loading_info(info)
        processor = GKCProcessor.from_pretrained(path, trust_remote_code=False)
        _check_tokenizer(model, processor)
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise ValueError(error_line(error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model.eval(), processor


def _check_json_files(path: str | Path) -> None:
    """Check that the JSON files of a folder can be read; unlike transformers' errors, this one names the file."""
    folder = Path(path)
    if not folder.is_dir():  # a repository of the Hub
        return
    if not (folder / "config.json").is_file():
        raise ValueError("it has no file config.json.")
    for name in _JSON_FILES:
        if not (folder / name).is_file():
            continue
        try:
            content = json.loads((folder / name).read_text("utf-8"))
        except (ValueError, RecursionError) as error:  # no UTF-8 too
            raise ValueError(f"its {name} cannot be read: {error_line(error)}") from error
        if not isinstance(content, dict):
            raise ValueError(f"its {name} cannot be read: it must hold an object, got {shown(content)}.")


def _stored_config(path: str | Path) -> Any:
    try:
        return GKCConfig.get_config_dict(path)[0]
    except OSError:
        raise
    except Exception as error:  # a number of thousands of digits, lists nested too deep, no object
        raise ValueError(f"its config.json cannot be read: {error_line(error)}") from error


def check_shard_paths(path: str | Path, subfolder: str = "") -> None:
    """Check that the index of sharded weights only names files beside it, since transformers would read any file.

    Args:
        path: Folder of the checkpoint, or repository of the Hub.
        subfolder: Folder inside it.

    Raises:
        ValueError: If the index is damaged, or names anything but a file beside it.
    """
    for name in _INDEX_FILES:
        index = cached_file(
            path,
            name,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if index is None:
            continue
        try:
            shards = json.loads(Path(index).read_bytes())["weight_map"].values()
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{name} is not an index of weights: {error_line(error)}") from error
        for shard in shards:
            parts = (PurePosixPath(shard).parts, PureWindowsPath(shard).parts) if isinstance(shard, str) else ((),)
            if any(len(names) != 1 or names[0] in ("..", ".") for names in parts):
                raise ValueError(f"{name} names {shown(shard)}, which is not a file beside it: it was not read.")


def check_loading_info(info: dict[str, Any]) -> None:
    """Check that the loaded weights fit the configuration.

    Args:
        info: Loading info of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ValueError: If weights are missing, unexpected or of another shape; the message lists them.
    """
    reasons = []
    for key, what in (
        ("missing_keys", "it lacks weights"),
        ("unexpected_keys", "it has weights that its config.json has no place for"),
    ):
        names = sorted(info[key])
        if names:
            more = f" and {len(names) - MAX_LISTED_WEIGHTS} more" if len(names) > MAX_LISTED_WEIGHTS else ""
            reasons.append(f"{what}: {', '.join(names[:MAX_LISTED_WEIGHTS])}{more}")
    shapes = [f"{name} {tuple(found)} for {tuple(asked)}" for name, found, asked in sorted(info["mismatched_keys"])]
    if shapes:
        more = f" and {len(shapes) - MAX_LISTED_WEIGHTS} more" if len(shapes) > MAX_LISTED_WEIGHTS else ""
        listed = ", ".join(shapes[:MAX_LISTED_WEIGHTS])
        reasons.append(f"it has weights of another shape than its config.json says: {listed}{more}")
    if reasons:
        raise ValueError("; ".join(reasons) + ".")


def _check_tokenizer(model: GKCForOpenVocabSegmentation | GKCForZeroShotSegmentation, processor: GKCProcessor) -> None:
    """Check that the text encoder has the tokenizer's tokens and its end token, and limit `model_max_length`."""
    tokenizer, text = processor.tokenizer, model.config.text_config
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= text.vocab_size:
        raise ValueError(
            f"its tokenizer has the token {largest}, but its text encoder has the tokens 0..{text.vocab_size - 1}: "
            "they do not belong together."
        )
    if text.model_type.startswith("siglip"):  # pools at the last token, whichever it is
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        return
    if text.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: the largest token of the text is its end
        raise ValueError(
            f"its tokenizer ends texts with the token {tokenizer.eos_token_id}, but its text encoder expects "
            f"{text.eos_token_id}: they do not belong together."
        )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in tokenizer("a")["input_ids"]:
        raise ValueError(
            f"its tokenizer does not append the end token {tokenizer.eos_token_id}, at which the text encoder pools: "
            "its tokenizer.json lacks the `post_processor` that appends it."
        )
    # At least a start token, an end token, and one token between them.
    if (
        check_whole_number("the tokenizer's model_max_length", tokenizer.model_max_length, 3)
        > text.max_position_embeddings
    ):
        tokenizer.model_max_length = text.max_position_embeddings


__all__ = [
    "check_loading_info",
    "check_shard_paths",
    "load_checkpoint_parts",
]
