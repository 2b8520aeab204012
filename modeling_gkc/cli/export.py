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
"""`gkc export`: export a checkpoint to ONNX or torch.export."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from ..encoded_vocabulary import EncodedVocabulary
from ..export.exporter import (
    CLASS_EMBEDS_FILE,
    FORMATS,
    RUNNER_FILE,
    ExportedSegmenter,
    check_packages,
    check_size,
    export_segmenter,
)
from ..prompt_templates import resolve_templates
from ..vocabulary import Vocabulary
from .common import (
    UserError,
    default_model_path,
    load_checkpoint,
    user_errors,
    warnings_as_lines,
)

ENCODED_SUFFIX = ".safetensors"


def export(arguments: argparse.Namespace) -> int:
    """Run `gkc export` and return the exit code."""
    # Check the arguments before the model is loaded, so that errors appear at once.
    folder = Path(arguments.out)
    with user_errors("--size"):
        size = check_size(_parse_size(arguments.size))
    vocabulary = _parse_vocabulary(arguments)
    try:
        compares = check_packages(arguments.format, arguments.check)
    except ImportError as error:
        raise UserError(f"--format {arguments.format}: {error}") from error
    model, processor = _load(arguments)
    if arguments.templates:
        processor.prompt_templates = resolve_templates(arguments.templates)
    with user_errors("--vocab"):
        if vocabulary is None and arguments.vocab is not None:
            vocabulary = EncodedVocabulary.load(arguments.vocab, model)
        elif vocabulary is None and model.vocabulary is None:
            raise UserError("the checkpoint stores no vocabulary: give one with --vocab")
    with user_errors("export"), warnings_as_lines():
        exported = export_segmenter(
            model,
            processor,
            folder,
            format=arguments.format,
            size=size,
            vocabulary=vocabulary,
            fixed=arguments.fixed,
            opset=arguments.opset,
            check=compares,
            progress=lambda step: print(f"gkc: {step}", file=sys.stderr),
        )
    _report(exported, model)
    return 0


def _parse_size(text: str) -> tuple[int, int]:
    """Parse `SIDE` or `HEIGHTxWIDTH` in pixels."""
    sides = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    if sides is None:
        raise ValueError(f"give one side or HEIGHTxWIDTH in pixels, such as 512 or 480x640, got {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def _parse_vocabulary(arguments: argparse.Namespace) -> Vocabulary | None:
    """Return the typed vocabulary, or None if it is encoded in a file or stored in the checkpoint."""
    is_encoded = (arguments.vocab or "").endswith(ENCODED_SUFFIX)
    if arguments.templates and (arguments.vocab is None or is_encoded):
        raise UserError("--templates needs typed words: give --vocab, or use `gkc embed --templates`")
    if arguments.templates:
        with user_errors("--templates"):
            resolve_templates(arguments.templates)
    if arguments.vocab is None or is_encoded:
        return None
    with user_errors("--vocab"), warnings_as_lines():
        return Vocabulary.parse(arguments.vocab)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load model and processor of the checkpoint."""
    try:
        return load_checkpoint(arguments.model or default_model_path())
    except UserError as error:
        # In this command the checkpoint is a positional argument.
        raise UserError(str(error).replace("--model:", "DIR:", 1)) from error


def _report(exported: ExportedSegmenter, model: Any) -> None:
    """Print a summary of the exported graph and the command or code that runs it."""
    settings, folder = exported.settings, exported.folder
    height, width = settings["size"]
    num_classes = len(settings["classes"])
    where = "stored in the graph" if settings["words"] == "fixed" else f"in {CLASS_EMBEDS_FILE}, any number of classes"
    kind = f"opset {settings['opset']}, " if "opset" in settings else ""
    megabytes = exported.graph.stat().st_size / 1e6
    comparison = "not compared with the model"
    if exported.difference is not None:
        comparison = f"masks within {exported.difference:.1g} of the model's"
    print(
        f"{exported.graph}: {kind}{megabytes:.1f} MB, images of {height} x {width}, {num_classes} classes ({where}), "
        f"{comparison}"
    )
    if (dtype := str(model.dtype).removeprefix("torch.")) != settings["dtype"]:
        print(f"the checkpoint's weights are {dtype}, the graph's {settings['dtype']}")
    print("run it:")
    if settings["graph"] == FORMATS["onnx"]:
        print(f"  python {shlex.quote(str(folder / RUNNER_FILE))} {shlex.quote(str(folder))} photo.jpg labels.png")
    else:
        inputs = ", ".join(f"{name}={name}" for name in settings["inputs"])
        print(f"  torch.export.load({str(exported.graph)!r}).module()({inputs})")


__all__ = ["export"]
