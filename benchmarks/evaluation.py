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
"""Measure throughput and memory of `python -m train.evaluate` at 19, 150 and 847 classes.

    python benchmarks/evaluation.py                  # R50 at the usual size (short side 800), a few minutes
    python benchmarks/evaluation.py --images 20      # more images for more stable times

The model has the default sizes and random weights. The images (640 x 480) consist of random squares of random
classes, with the class names of Cityscapes, ADE20K-150 and ADE20K-847. Each evaluation runs in a process of its own,
whose peak resident memory is reported. Times are those of its result file, without loading the model and encoding
the class names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_gkc.cli.common import positive

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from modeling_gkc.configuration_gkc import GKCConfig  # noqa: E402
from modeling_gkc.image_processing_gkc import GKCImageProcessor  # noqa: E402
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation  # noqa: E402
from modeling_gkc.processing_gkc import GKCProcessor  # noqa: E402
from modeling_gkc.vocabulary import Vocabulary  # noqa: E402
from train.data import prepare  # noqa: E402

TOKENIZER = ROOT / "hub_card" / "gkc-mini"
VOCABULARIES = ("cityscapes_19", "ade20k_150", "ade20k_847")
SQUARES, SIDE = (6, 8), 80


def write_model(folder: Path) -> None:
    """Write a checkpoint with the default sizes, random weights and the shipped checkpoint's small text encoder."""
    torch.manual_seed(0)
    text_config = GKCConfig.from_pretrained(TOKENIZER).text_config
    text_config.projection_dim = GKCConfig().text_config.projection_dim
    GKCForOpenVocabSegmentation(GKCConfig(text_config=text_config)).save_pretrained(folder)
    tokenizer = GKCProcessor.from_pretrained(TOKENIZER).tokenizer
    GKCProcessor(GKCImageProcessor(), tokenizer).save_pretrained(folder)


def write_images(folder: Path, vocabulary: str, images: int) -> None:
    """Write images and 16-bit label maps in the layout that `python -m train.data.prepare folder` reads."""
    labels = Vocabulary.named(vocabulary).labels
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind / "val").mkdir(parents=True)
    for number in range(images):
        classes = rng.integers(0, len(labels), SQUARES).repeat(SIDE, 0).repeat(SIDE, 1)
        colors = rng.integers(0, 256, (*SQUARES, 3), dtype=np.uint8).repeat(SIDE, 0).repeat(SIDE, 1)
        Image.fromarray(colors).save(folder / "images" / "val" / f"{number}.jpg")
        Image.fromarray(classes.astype(np.uint16)).save(folder / "masks" / "val" / f"{number}.png")
    (folder / "names.json").write_text(json.dumps(labels))


def evaluate(model: Path, data: Path, result: Path, threads: int) -> dict[str, Any]:
    """Run an evaluation in a process of its own.

    Returns:
        The content of its result file, with that process's peak memory added as `memory_mb`.
    """
    code = (
        "import resource, sys; from train.evaluate.command import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(code)"
    )
    options = ["--model", model, "--benchmark", "folder", "--data", data, "--out", result, "--cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, options)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.read_text()) | {"memory_mb": float(ended.stdout.split()[-1])}


def row(classes: int, found: dict[str, Any]) -> str:
    """Format one row of the table."""
    each = found["times"]["milliseconds_per_image"]
    speed = found["times"]["images_per_second"]
    parts = (each[phase] / 1000 for phase in ("model", "post_processing", "scoring"))
    return f"| {classes} | {speed:.2f} | {' | '.join(f'{part:.3f}' for part in parts)} | {found['memory_mb']:.0f} |"


def print_line(line: str) -> None:
    """Print a line without buffering."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the evaluations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=6, help="images per benchmark (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="number of CPU threads (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        print_line(
            "| classes | images per second | model, s per image | post-processing, s | scoring, s | memory, MB |"
        )
        print_line("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for vocabulary in VOCABULARIES:
            source, data = folder / vocabulary, folder / f"{vocabulary}-data"
            write_images(source, vocabulary, options.images)
            arguments = ["folder", "--source", source, "--out", data, "--split", "val"]
            if prepare.main([str(argument) for argument in arguments]):
                raise SystemExit(f"Cannot prepare the images of {vocabulary}, see the error above")
            found = evaluate(folder / "model", data, folder / f"{vocabulary}.json", options.threads)
            print_line(row(len(Vocabulary.named(vocabulary)), found))


if __name__ == "__main__":
    main()
