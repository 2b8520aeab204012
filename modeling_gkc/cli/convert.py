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
"""`gkc convert`: convert published weights to checkpoints of this library."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ..atomic_files import atomic_folder
from ..checkpoint_loading import check_shard_paths
from ..conversion.clip import clip_resnet_from_openai, clip_text_from_openai, read_weights
from ..conversion.fc_clip import (
    CLIP_PREFIX,
    TRAINING_NAMES,
    clip_towers,
    clip_weights,
    fc_clip_processor,
    from_fc_clip,
)
from ..conversion.mask2former import (
    CONVERSION_TEMPLATES,
    from_mask2former,
    image_processor_from_mask2former,
    source_vocabulary,
)
from ..image_processing_gkc import GKCImageProcessor
from ..label_text import error_line
from ..processing_gkc import GKCProcessor
from ..vocabulary import Vocabulary
from .common import UserError, parse_vocabulary, user_errors, warnings_as_lines, without_progress_bars
from .parsers import CLIP_TOKENIZER, TEXT_FOLDER

MAX_LISTED_NAMES = 6


def convert_mask2former(arguments: argparse.Namespace) -> int:
    """Run `gkc convert mask2former` and return the exit code."""
    class_names = parse_vocabulary("--class-names", arguments.class_names)
    folder = Path(arguments.out)
    with quiet_transformers():
        source = load_model(
            Mask2FormerForUniversalSegmentation, arguments.source, "MASK2FORMER", ("mask2former",), arguments
        )
        text_model = load_model(
            CLIPTextModelWithProjection, arguments.text_model, "--text-model", ("clip", "clip_text_model"), arguments
        )
        image_processor = _load_image_processor(arguments.source)
        tokenizer = load_tokenizer(arguments.tokenizer, "--text-model", arguments.text_model)
    with user_errors("--class-names"), warnings_as_lines():
        vocabulary = source_vocabulary(source, class_names)
    with user_errors("MASK2FORMER"), warnings_as_lines():
        model = from_mask2former(source, text_model, tokenizer, vocabulary)
    with quiet_transformers(), user_errors("--out"), atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        GKCProcessor(image_processor, tokenizer, CONVERSION_TEMPLATES).save_pretrained(unfinished)
    _report_mask2former(folder, source, vocabulary)
    return 0


def load_model(
    model_class: type[PreTrainedModel],
    path: str,
    option: str,
    model_types: tuple[str, ...],
    arguments: argparse.Namespace,
) -> Any:
    """Load a model from a folder or a Hub repository and check that no weight is missing."""
    check_folder(path, option)
    try:
        model_type = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        if model_type not in model_types:
            raise UserError(f"{option}: {path} is a {model_type}, not a {' or '.join(model_types)}")
        check_shard_paths(path)
        safetensors = None if arguments.allow_pickle else True
        model, info = model_class.from_pretrained(path, use_safetensors=safetensors, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        reason = error_line(error)
        if "safetensors" in reason and not arguments.allow_pickle:
            reason += " If it has a pytorch_model.bin, use --allow-pickle."
        raise UserError(f"{option}: cannot load {path}: {reason}") from error
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise UserError(f"{option}: {path} lacks weights of a {model_type}: {', '.join(missing)}")
    return model.eval()


def check_folder(path: str, option: str) -> None:
    """Check that a path is a directory, unless it can be the name of a repository."""
    if Path(path).is_file():
        raise UserError(f"{option}: {path} is a file: give the folder of the checkpoint")
    is_repository = path.count("/") <= 1 and not path.endswith("/") and not path.startswith((".", "/", "~"))
    if not is_repository and not Path(path).is_dir():
        raise UserError(f"{option}: {path} is not a directory")


def _load_image_processor(path: str) -> GKCImageProcessor:
    """Load the image processor of a Mask2Former as one of this library."""
    with user_errors("MASK2FORMER"):
        settings, _ = GKCImageProcessor.get_image_processor_dict(path)
        return image_processor_from_mask2former(settings)


def load_tokenizer(given: str | None, option: str = "--tokenizer", path: str | None = None) -> Any:
    """Load the tokenizer that --tokenizer gives, or else that of another option's checkpoint."""
    if given:
        option, path = "--tokenizer", given
    check_folder(path, option)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file can make transformers raise errors of any type
        hint = "" if given else f"; name one with --tokenizer, such as {CLIP_TOKENIZER}"
        raise UserError(f"{option}: {path} has no tokenizer{hint}: {error_line(error)}") from error


def _report_mask2former(folder: Path, source: Any, vocabulary: Vocabulary) -> None:
    """Print a summary of the converted checkpoint and commands to try."""
    old_names = [str(source.config.id2label.get(index, "")) for index in range(len(vocabulary))]
    renamed = [
        f"{old!r} is {new!r}" for old, new in zip(old_names, vocabulary.labels, strict=True) if old and old != new
    ]
    print(f"{folder}: {len(vocabulary)} classes, {source.config.num_queries} queries: {listed(vocabulary.labels)}")
    if renamed:
        print(f"names that replace those of the source; check that they are in its order: {listed(renamed)}")
    quoted = shlex.quote(str(folder))
    print("try it:")
    print(f"  gkc segment photo.jpg --model {quoted}")
    print(f'  gkc segment photo.jpg --model {quoted} --labels "cat; sofa, couch; lamp" --task panoptic')


def listed(items: list[str]) -> str:
    """Join the first items, followed by the number of the others."""
    rest = len(items) - MAX_LISTED_NAMES
    return "; ".join(items[:MAX_LISTED_NAMES]) + (f"; and {rest} more" if rest > 0 else "")


def convert_clip_resnet(arguments: argparse.Namespace) -> int:
    """Run `gkc convert clip-resnet` and return the exit code."""
    folder = Path(arguments.out)
    weights = _read_weights(arguments.weights, "WEIGHTS", allow_jit=arguments.allow_jit)
    with user_errors(f"WEIGHTS: {arguments.weights}"):
        image_tower = clip_resnet_from_openai(weights)
        text_tower = clip_text_from_openai(weights) if arguments.text else None
    with quiet_transformers(), user_errors("--out"), atomic_folder(folder) as unfinished:
        image_tower.save_pretrained(unfinished)
        if text_tower is not None:
            text_tower.save_pretrained(unfinished / TEXT_FOLDER)
    config = image_tower.config
    blocks = "-".join(map(str, config.depths))
    print(
        f"{folder}: image encoder, width {config.width}, blocks {blocks}, {config.image_size} x {config.image_size} "
        f"pixels, D = {config.projection_dim}"
    )
    if text_tower is not None:
        print(f"{folder / TEXT_FOLDER}: text encoder; its tokenizer is that of {CLIP_TOKENIZER}")
    return 0


def convert_fc_clip(arguments: argparse.Namespace) -> int:
    """Run `gkc convert fc-clip` and return the exit code."""
    folder = Path(arguments.out)
    with user_errors("--class-names"), warnings_as_lines():
        # FC-CLIP's list of names does not say what is stuff, whose segments a panoptic result merges.
        vocabulary = Vocabulary.parse(arguments.class_names).with_is_thing_from(Vocabulary.named(TRAINING_NAMES))
    weights = _read_weights(arguments.checkpoint, "CHECKPOINT")
    clip = clip_weights(weights) if arguments.clip is None else _read_weights(arguments.clip, "--clip")
    if not clip:
        raise UserError(
            f"CHECKPOINT: {arguments.checkpoint} holds no CLIP weights: give those that it was trained on with "
            "--clip, such as OpenCLIP's open_clip_model.safetensors of convnext_large_d_320, or OpenAI's RN50.pt"
        )
    if "logit_scale" in clip:
        weights[f"{CLIP_PREFIX}logit_scale"] = clip["logit_scale"]
    with quiet_transformers():
        tokenizer = load_tokenizer(arguments.tokenizer)
    with user_errors("CHECKPOINT" if arguments.clip is None else f"--clip: {arguments.clip}"):
        towers = clip_towers(clip)
    with user_errors(f"CHECKPOINT: {arguments.checkpoint}"), warnings_as_lines():
        model = from_fc_clip(weights, *towers, tokenizer, vocabulary, arguments.ensemble)
    with quiet_transformers(), user_errors("--out"), atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        fc_clip_processor(tokenizer).save_pretrained(unfinished)
    config = model.config
    print(f"{folder}: {config.backbone_config.model_type}, {config.num_queries} queries, ensemble {config.ensemble}")
    print(f"{folder}: {len(vocabulary)} seen classes: {listed(vocabulary.labels)}")
    return 0


def _read_weights(path: str, option: str, allow_jit: bool = False) -> dict[str, Any]:
    """Read a file of weights; errors name the option."""
    try:
        with warnings_as_lines():
            return read_weights(path, allow_jit=allow_jit)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error_line(error)
        raise UserError(f"{option}: {reason if path in reason else f'{path}: {reason}'}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports, which list weights that are not used on purpose."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


__all__ = [
    "check_folder",
    "convert_clip_resnet",
    "convert_fc_clip",
    "convert_mask2former",
    "listed",
    "load_model",
    "load_tokenizer",
    "quiet_transformers",
]
