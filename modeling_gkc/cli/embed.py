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
"""`gkc embed`: encode a vocabulary into a file."""

import argparse
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from ..encoded_vocabulary import EncodedVocabulary
from ..prompt_templates import resolve_templates
from ..vocabulary import Vocabulary
from .common import (
    UserError,
    default_model_path,
    load_checkpoint,
    pick_device,
    user_errors,
    warnings_as_lines,
)

PROMPTS_PER_STEP = 256


def embed(arguments: argparse.Namespace) -> int:
    """Run `gkc embed` and return the exit code."""
    # Arguments are checked before the model is loaded, so that a typing error is reported at once.
    with user_errors("--labels"), warnings_as_lines():
        vocabulary = Vocabulary.parse(arguments.labels)
    with user_errors("--templates"):
        templates = resolve_templates(arguments.templates) if arguments.templates else None
    path = _prepare_output(arguments.out)
    model, processor = load_checkpoint(arguments.model or default_model_path())
    with user_errors("--device"):
        model.to(pick_device(arguments.device))
    with user_errors("--labels"), warnings_as_lines():
        prompts = processor(text=vocabulary, prompt_templates=templates, return_tensors="pt").to(model.device)
    steps = [prompts[name].split(PROMPTS_PER_STEP) for name in ("input_ids", "attention_mask")]
    with tqdm(total=len(prompts["input_ids"]), unit="prompt", disable=None) as bar:
        for ids, mask in zip(*steps, strict=True):
            model.embed_prompts(ids, mask)  # fills the prompt cache of the model
            bar.update(len(ids))
    embeddings = model.get_class_embeddings(**prompts)
    encoded = EncodedVocabulary(vocabulary, embeddings.class_embeds, embeddings.class_ids)
    with user_errors("--labels"), warnings_as_lines():
        encoded.check_distinct(processor)
    try:
        encoded.save(path, model)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error
    counts = f"{len(vocabulary)} classes, {len(vocabulary.flat_names)} names, {len(prompts['input_ids'])} prompts"
    print(f"{path}: {counts}, width {encoded.class_embeds.shape[-1]}, text encoder of {model.name_or_path}")
    return 0


def _prepare_output(text: str) -> Path:
    """Return the path of the output file, and create its folder."""
    path = Path(text)
    if path.suffix != ".safetensors":
        raise UserError(f"--out: the file name must end in .safetensors, got {text}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot create the folder {path.parent}: {error.strerror}") from error
    return path


__all__ = ["embed"]
