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
"""`gkc open`: make an open-vocabulary segmenter of a closed-vocabulary segmenter and an image-text model."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, CLIPTextModelWithProjection

from ..atomic_files import atomic_folder
from ..checkpoint_loading import load_checkpoint_parts
from ..conversion.zero_shot import SEGMENTERS, open_segmenter
from ..image_processing_gkc import GKCImageProcessor
from ..label_text import error_line
from ..region_tokens import REGION_POOLING
from .common import UserError, parse_vocabulary, user_errors, warnings_as_lines
from .convert import check_folder, listed, load_model, load_tokenizer, quiet_transformers
from .parsers import TEXT_FOLDER


def open_command(arguments: argparse.Namespace) -> int:
    """Run `gkc open` and return the exit code."""
    class_names = parse_vocabulary("--class-names", arguments.class_names)
    with quiet_transformers():
        segmenter_type = _model_type(arguments.segmenter, "SEGMENTER", SEGMENTERS)
        tower_type = _model_type(arguments.tower, "--with", tuple(REGION_POOLING))
        if segmenter_type == "gkc":
            with user_errors("SEGMENTER"):
                segmenter, own_processor = load_checkpoint_parts(arguments.segmenter)
            settings = own_processor.image_processor.to_dict()
        else:
            segmenter = load_model(
                AutoModelForUniversalSegmentation, arguments.segmenter, "SEGMENTER", SEGMENTERS, arguments
            )
            settings = _image_settings(arguments.segmenter, "SEGMENTER")
        tower = load_model(AutoModel, arguments.tower, "--with", tuple(REGION_POOLING), arguments)
        text_model = None
        if hasattr(tower.config, "text_config") and arguments.text_model:
            raise UserError(f"--text-model: a {tower_type} has a text encoder of its own: leave the option away")
        if not hasattr(tower.config, "text_config"):
            path = arguments.text_model or str(Path(arguments.tower) / TEXT_FOLDER)
            text_model = load_model(
                CLIPTextModelWithProjection, path, "--text-model", ("clip", "clip_text_model"), arguments
            )
        tokenizer = load_tokenizer(arguments.tokenizer, "--with", arguments.tower)
        task_tokenizer = None
        if segmenter_type == "oneformer":
            task_tokenizer = load_tokenizer(None, "SEGMENTER", arguments.segmenter)
        tower_settings = _image_settings(arguments.tower, "--with", required=False)
    with user_errors("--class-names" if class_names else "SEGMENTER"), warnings_as_lines():
        model, processor = open_segmenter(
            segmenter,
            tower,
            tokenizer,
            settings,
            tower_settings,
            text_model=text_model,
            class_names=class_names,
            class_scores=arguments.class_scores,
            task_tokenizer=task_tokenizer,
        )
    folder = Path(arguments.out)
    with quiet_transformers(), user_errors("--out"), atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    labels = model.vocabulary.labels
    print(f"{folder}: {segmenter_type} with {tower_type}, {len(labels)} classes: {listed(labels)}")
    print(f'try it:\n  gkc segment photo.jpg --model {shlex.quote(str(folder))} --labels "cat; sofa, couch; lamp"')
    return 0


def _model_type(path: str, option: str, supported: tuple[str, ...]) -> str:
    """Return the type of a model, and check that it is supported before any weights are loaded."""
    check_folder(path, option)
    try:
        model_type = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        raise UserError(f"{option}: cannot load {path}: {error_line(error)}") from error
    if model_type not in supported:
        raise UserError(f"{option}: {path} is a {model_type}; supported are {', '.join(supported)}")
    return model_type


def _image_settings(path: str, option: str, required: bool = True) -> dict[str, Any] | None:
    """Read the image preprocessing of a checkpoint; None if there is none and none is required."""
    try:
        return GKCImageProcessor.get_image_processor_dict(path)[0]
    except (OSError, ValueError) as error:
        if required:
            raise UserError(f"{option}: {path} has no preprocessing settings: {error_line(error)}") from error
        return None


__all__ = ["open_command"]
