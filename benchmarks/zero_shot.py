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
"""Measure what an image-text model adds to the time of a segmenter, and print a Markdown table.

    python benchmarks/zero_shot.py                   # a ResNet-50 Mask2Former at 512 x 512 with ViT-B/16 at 224 x 224
    python benchmarks/zero_shot.py --preset toy

The weights are random. The segmenter alone distributes its probabilities over the classes, as with
`class_scores="segmenter"`; with the regions, the image-text model runs too. Both run in turn in every round, in the
opposite order in every other round; the ratio is the median of those of the rounds.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from modeling_gkc.cli.common import positive
from modeling_gkc.configuration_gkc_zero_shot import GKCZeroShotConfig
from modeling_gkc.modeling_gkc_zero_shot import GKCForZeroShotSegmentation

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.models import random_class_embeds, random_pixels

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def make_model(toy: bool) -> GKCForZeroShotSegmentation:
    """Return a model of random weights: a Mask2Former of 133 classes, or of 9, and a CLIP."""
    torch.manual_seed(0)
    num_classes = 9 if toy else 133
    labels = {"id2label": {index: f"class {index}" for index in range(num_classes)}}
    if toy:
        backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=STAGES)
        widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4}
        segmenter = Mask2FormerConfig(backbone_config=backbone, encoder_layers=1, decoder_layers=2, **widths, **labels)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        tower = CLIPConfig(
            text_config=sizes | {"vocab_size": 99}, vision_config=sizes | {"image_size": 64}, projection_dim=32
        )
    else:
        segmenter = Mask2FormerConfig(backbone_config=ResNetConfig(out_features=STAGES), **labels)
        tower = CLIPConfig(vision_config={"patch_size": 16, "image_size": 224})
    names = [[f"class {index}"] for index in range(num_classes)]
    config = GKCZeroShotConfig(segmenter_config=segmenter, tower_config=tower, source_vocabulary=names)
    model = GKCForZeroShotSegmentation(config)
    model.segmenter.load_state_dict(Mask2FormerForUniversalSegmentation(segmenter).state_dict())
    model.tower.load_state_dict(CLIPModel(tower).state_dict())
    embeds = random_class_embeds(num_classes, config.projection_dim)
    model.classifier.set_source(torch.nn.Identity(), embeds, torch.arange(num_classes))
    return model


@torch.no_grad()
def measure(model: GKCForZeroShotSegmentation, size: int, num_classes: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round, by the name of the class scores."""
    pixels = random_pixels(size)
    embeds = random_class_embeds(num_classes, model.config.projection_dim)
    seconds: dict[str, list[float]] = {"segmenter": [], "both": []}
    weights = {"segmenter": 0.0, "both": 0.5}
    for round_number in range(-1, rounds):  # the first round is not counted
        for name in sorted(weights, reverse=bool(round_number % 2)):
            model.classifier.region_weight = weights[name]
            start = time.perf_counter()
            model(pixels, class_embeds=embeds)
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Return the median seconds and their ratio as a Markdown table."""
    ratio = median(both / alone for both, alone in zip(seconds["both"], seconds["segmenter"], strict=True))
    return (
        "| segmenter alone, s | with regions, s | ratio |\n| ---: | ---: | ---: |\n"
        f"| {median(seconds['segmenter']):.3f} | {median(seconds['both']):.3f} | {ratio:.2f} |"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("r50", "toy"), default="r50", help="sizes (default: %(default)s)")
    parser.add_argument("--classes", type=positive, default=150, help="number of classes (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=7, help="number of timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="number of CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    toy = options.preset == "toy"
    seconds = measure(make_model(toy), 64 if toy else 512, options.classes, options.rounds)
    sys.stdout.write(f"{table(seconds)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
