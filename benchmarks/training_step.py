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
"""Measure the time of a training step with cached and online teacher, compared with transformers' Mask2Former.

    python benchmarks/training_step.py                    # about 3 minutes per round on two cores of 2.5 GHz, 9 GB
    python benchmarks/training_step.py --preset toy       # seconds

All variants train on the same batch in interleaved rounds:

* `cached`: GKC, CLIP's embeddings are looked up;
* `online`: GKC, CLIP runs in the step: its image encoder embeds the 224 x 224 crop of every region, which is cut out
  in the step, and its text encoder encodes the names of all classes and the synonyms sampled for the step, each padded
  to 77 tokens as in CLIP's released code. `--text-tokens 8` encodes them at about their real length;
* `mask2former`: CLIP runs in the step as well, and the student is transformers' Mask2Former of the same sizes and with
  the same backbone, trained with its own losses on masks and classes; the additional text losses are not counted.

Weights are random, in fp32. Each image of the batch has 12 regions, about as many as in COCO's panoptic training set
(1,499,785 regions in 118,287 images).

Times are medians over rounds with minimum and maximum: wall-clock time, and processor time summed over all cores. On
a busy machine only the processor time is reliable.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.utils.logging import disable_progress_bar

from modeling_gkc.cli.common import non_negative, positive

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.harness import load_average, memory_mb, spread  # noqa: E402
from configuration import Recipe  # noqa: E402
from modeling_gkc import Vocabulary  # noqa: E402
from modeling_gkc.configuration_gkc import CLIPResNetConfig, GKCConfig  # noqa: E402
from modeling_gkc.image_processing_gkc import GKCImageProcessor  # noqa: E402
from modeling_gkc.modeling_clip_resnet import CLIPResNetVisionModel  # noqa: E402
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation  # noqa: E402
from modeling_gkc.processing_gkc import GKCProcessor  # noqa: E402
from train.data import dataset_features, encode_ids, expand_masks  # noqa: E402
from train.engine.trainer import GKCTrainer  # noqa: E402
from train.losses.base import LossContext  # noqa: E402
from train.losses.region_sampling import StepRegions  # noqa: E402
from train.losses.registry import make_losses  # noqa: E402
from train.miniworld.tokenizer import build_tokenizer  # noqa: E402
from train.teacher.region_teacher import OnlineTeacher, RegionTeacher  # noqa: E402
from train.teacher.text_bank import TextBank  # noqa: E402

VARIANTS = ("cached", "online", "mask2former")
PARTS = ("CLIP", "forward", "matching", "losses", "backward", "optimizer")


@dataclass(frozen=True)
class Preset:
    """Sizes of a measurement; `backbone`, `text` and `student` are fields of their configurations."""

    batch_size: int
    image_size: int
    regions: int
    text_tokens: int
    vocabulary: str
    backbone: dict[str, Any]
    text: dict[str, int]
    student: dict[str, int]


PRESETS = {
    "coco": Preset(  # student with CLIP RN50 as backbone, CLIP RN50's two towers
        batch_size=4,
        image_size=512,
        regions=12,
        text_tokens=77,
        vocabulary="coco_panoptic_133",
        backbone={
            "width": 64,
            "depths": [3, 4, 6, 3],
            "num_attention_heads": 32,
            "image_size": 224,
            "projection_dim": 1024,
        },
        text={
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "projection_dim": 1024,
        },
        student={},
    ),
    "toy": Preset(
        batch_size=2,
        image_size=64,
        regions=3,
        text_tokens=16,
        vocabulary="pascal_voc_20",
        backbone={
            "width": 8,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": 4,
            "image_size": 64,
            "projection_dim": 16,
        },
        text={
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        student={
            "hidden_size": 32,
            "mask_feature_size": 32,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "num_attention_heads": 4,
            "num_queries": 10,
        },
    ),
}


def random_row(index: int, size: int, regions: int, num_classes: int) -> dict:
    """Return a dataset row: an image of noise with `regions` segments, the Voronoi cells of random points."""
    generator = np.random.default_rng(index)
    y, x = np.mgrid[:size, :size]
    seeds = generator.uniform(0, size, (regions, 2))
    nearest = np.stack([(y - row) ** 2 + (x - column) ** 2 for row, column in seeds]).argmin(axis=0)
    return {
        "image": Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)),
        "segmentation": Image.fromarray(encode_ids((nearest + 1).astype(np.int32))),
        "segments": [
            {"id": number + 1, "category_id": int(generator.integers(num_classes)), "iscrowd": False}
            for number in np.unique(nearest).tolist()
        ],
        "captions": [],
        "image_id": f"noise-{index}",
        "video_id": "",
        "frame": 0,
    }


def make_recipe(preset: Preset) -> Recipe:
    """Return the default recipe, which is the paper's, with teacher `online`, so that batches keep their images."""
    return Recipe().replace(
        batch_size=preset.batch_size,
        crop_size=preset.image_size,
        scale_range=(1.0, 1.0),
        teacher="online",
        train_num_points=min(12544, (preset.image_size // 4) ** 2),
        distillation_embedding="query",
        num_workers=0,
    )


def make_student(preset: Preset, recipe: Recipe) -> GKCForOpenVocabSegmentation:
    """Return GKC with random weights."""
    return GKCForOpenVocabSegmentation(
        GKCConfig(
            backbone_config=CLIPResNetConfig(**preset.backbone),
            text_config=CLIPTextConfig(**preset.text),
            **preset.student,
            **recipe.model_settings(),
        )
    )


def make_mask2former(preset: Preset, recipe: Recipe, num_classes: int) -> Mask2FormerForUniversalSegmentation:
    """Return transformers' Mask2Former of the same sizes with random weights."""
    sizes = GKCConfig(**preset.student)
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=CLIPResNetConfig(**preset.backbone),
            feature_size=sizes.hidden_size,
            mask_feature_size=sizes.mask_feature_size,
            hidden_dim=sizes.hidden_size,
            encoder_feedforward_dim=sizes.encoder_ffn_dim,
            encoder_layers=sizes.encoder_layers,
            decoder_layers=sizes.decoder_layers + 1,
            num_attention_heads=sizes.num_attention_heads,
            dim_feedforward=sizes.decoder_ffn_dim,
            num_queries=sizes.num_queries,
            num_labels=num_classes,
            train_num_points=recipe.matching.train_num_points,
        )
    )


def random_units(preset: Preset, count: int) -> Tensor:
    """Return random unit vectors (count, D) in place of embeddings."""
    return F.normalize(torch.randn(count, preset.text["projection_dim"]), dim=-1)


class RandomEmbeddings:
    """Replacement for the teacher cache: random embeddings in fp16."""

    def __init__(self, embeds: dict[str, Tensor]):
        self.embeds = embeds

    def lookup(self, image_ids: Sequence[str], segment_ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings of each image's segments, whose ids start at 1."""
        return [self.embeds[image][ids.cpu() - 1].float() for image, ids in zip(image_ids, segment_ids, strict=True)]


def make_step_regions(recipe: Recipe, text_bank: TextBank, teacher: RandomEmbeddings) -> StepRegions:
    """Return the region sampling of a recipe with a teacher of its own."""
    losses = make_losses(recipe)
    for loss in losses:
        loss.setup(LossContext(recipe, text_bank=text_bank, teacher=teacher))
    return StepRegions(losses, text_bank, recipe.data.region_dropout)


class Workload:
    """Trainer, teacher and cached embeddings with random weights and images.

    Args:
        preset: Sizes to use.
        output_dir: Folder that the trainer may write to.
        images: Number of rows of the dataset (default: one batch).
        training_arguments: Further training arguments.
    """

    def __init__(self, preset: Preset, output_dir: Path, images: int | None = None, **training_arguments):
        torch.manual_seed(0)
        self.preset, recipe = preset, make_recipe(preset)
        vocabulary = Vocabulary.named(preset.vocabulary)
        rows = [
            random_row(index, preset.image_size, preset.regions, len(vocabulary.names))
            for index in range(images or preset.batch_size)
        ]
        words = tuple(vocabulary.flat_names)
        bank = TextBank(words, torch.tensor(vocabulary.class_ids), random_units(preset, len(words)))
        online = OnlineTeacher(RegionTeacher(CLIPResNetVisionModel(CLIPResNetConfig(**preset.backbone))))
        embeddings = RandomEmbeddings({row["image_id"]: random_units(preset, preset.regions).half() for row in rows})
        self.trainer = GKCTrainer(
            make_student(preset, recipe),
            recipe,
            recipe.to_training_arguments(output_dir, disable_tqdm=True, save_strategy="no", **training_arguments),
            Dataset.from_list(rows, features=dataset_features()),
            vocabulary,
            GKCProcessor(GKCImageProcessor(), build_tokenizer()),
            text_bank=bank,
            online_teacher=online,
        )
        bank = self.trainer.text_bank
        self.mask2former = make_mask2former(preset, recipe, len(vocabulary.names))
        self.step_regions = {
            "online": self.trainer.step_regions,
            "cached": make_step_regions(recipe.replace({"teacher.source": "cached"}), bank, embeddings),
        }

    @torch.no_grad()
    def encode_words(self, count: int) -> Tensor:
        """Encode `count` random token sequences with the text encoder."""
        preset = self.preset
        device = self.trainer.args.device
        tokens = torch.randint(1, preset.text["vocab_size"], (count, preset.text_tokens), device=device)
        return self.trainer.student.text_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).text_embeds


class StepTimer:
    """Timer of training steps and their parts."""

    def __init__(self, workload: Workload):
        self.workload, self.trainer = workload, workload.trainer
        self.model = self.trainer.model.train()
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        self.batch = self.trainer._prepare_inputs(next(iter(self.trainer.get_train_dataloader())))
        self.mask2former = workload.mask2former.train().to(self.trainer.args.device)
        self.mask2former_optimizer = torch.optim.AdamW(self.mask2former.parameters(), lr=1e-4, fused=True)
        self.parts: dict[str, np.ndarray] = {}
        self.model.forward = self._timed("forward", self.model.forward)
        self.mask2former.model.forward = self._timed("forward", self.mask2former.model.forward)
        matcher = self.trainer.criterion.criterion.matcher
        matcher.match_stages = self._timed("matching", matcher.match_stages)
        matcher = self.mask2former.criterion.matcher
        matcher.forward = self._timed("matching", matcher.forward)

    def __call__(self, variant: str) -> dict[str, np.ndarray]:
        """Run one step of a variant and return (wall-clock, processor) seconds of each part and of the whole."""
        self.parts = {}
        is_mask2former = variant == "mask2former"
        model, optimizer = (
            (self.mask2former, self.mask2former_optimizer) if is_mask2former else (self.model, self.trainer.optimizer)
        )
        with self._measure("all"):
            with self._measure("CLIP"):
                regions = self._regions("cached" if variant == "cached" else "online")
            with self._measure("losses"):
                loss = self._mask2former_loss() if is_mask2former else self._loss(regions)
            with self._measure("backward"):
                loss.backward()
            with self._measure("optimizer"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.trainer.args.max_grad_norm)
                optimizer.step()
                model.zero_grad()
        self.parts["losses"] -= self.parts["forward"] + self.parts["matching"]
        return self.parts

    def _regions(self, source: str) -> list:
        regions = self.workload.step_regions[source]([self.batch])
        if source == "online":
            names = self.trainer.text_bank.name_prompts
            self.workload.encode_words(len(torch.cat([names, regions[0].prompts]).unique()))
        return regions

    def _loss(self, regions: list) -> Tensor:
        divisors = self.trainer.criterion.divisors(regions)
        inputs = {**self.batch, "regions": regions[0]}
        return self.trainer.compute_loss(self.model, inputs, num_items_in_batch=divisors)

    def _mask2former_loss(self) -> Tensor:
        batch = self.batch
        masks = expand_masks(batch["segmentation"], batch["segment_ids"])
        return self.mask2former(
            pixel_values=batch["pixel_values"],
            mask_labels=[each.float() for each in masks],
            class_labels=list(batch["class_labels"]),
        ).loss

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = self._clocks()
        yield
        self.parts[name] = self._clocks() - start

    def _clocks(self) -> np.ndarray:
        """Return wall-clock and processor time in seconds after waiting for the device."""
        if self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            before = self.parts.get(name, 0)
            with self._measure(name):
                found = function(*args, **kwargs)
            self.parts[name] = self.parts[name] + before
            return found

        return timed


def machine(threads: int) -> str:
    """Describe processor, cores, threads and torch version."""
    found = harness.machine(threads)
    return f"{found['processor']}, {found['cores']} cores, {threads} threads, torch {found['torch']}"


def measure(preset: Preset, rounds: int, variants: tuple[str, ...] = VARIANTS, warm_up: int = 1) -> dict:
    """Time the steps of each variant and their parts.

    Each timed step follows `warm_up` steps of the same variant: the first step after another variant waits for
    memory to be reallocated, which does not happen in training.
    """
    with tempfile.TemporaryDirectory() as folder:
        timer = StepTimer(Workload(preset, Path(folder)))
    steps: dict[str, list[dict[str, np.ndarray]]] = {variant: [] for variant in variants}
    load = load_average()
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            *_, parts = [timer(variant) for _ in range(warm_up + 1)]
            steps[variant].append(parts)
    found = {
        variant: {
            clock: {part: spread([float(step[part][index]) for step in taken]) for part in ("all", *PARTS)}
            for index, clock in enumerate(("clock", "processor"))
        }
        for variant, taken in steps.items()
    }
    return {
        "rounds": rounds,
        "load_average": [load, load_average()],
        "regions": sum(map(len, timer.batch["segment_ids"])),
        "peak_mb": memory_mb("VmHWM"),
        "seconds": found,
        "ratios": {
            variant: {
                clock: spread(ratios(steps, variant, index)) for index, clock in enumerate(("clock", "processor"))
            }
            for variant in variants[1:]
        },
    }


def ratios(steps: dict[str, list[dict[str, np.ndarray]]], variant: str, clock: int) -> list[float]:
    """Return, for each round, the time of a variant's step over that of the first variant."""
    first = next(iter(steps.values()))
    return [float(one["all"][clock] / other["all"][clock]) for one, other in zip(steps[variant], first, strict=True)]


def table(found: dict) -> str:
    """Format a Markdown table with a row for each variant and clock; parts are percentages of the step."""
    lines = ["| step | seconds | median (minimum - maximum) | " + " | ".join(PARTS) + " |"]
    lines.append("| --- | --- | ---: | " + " | ".join(["---:"] * len(PARTS)) + " |")
    for variant, clocks in found["seconds"].items():
        for clock, parts in clocks.items():
            whole = parts["all"]
            shares = [f"{100 * parts[part]['median'] / whole['median']:.0f} %" for part in PARTS]
            seconds = f"{whole['median']:.2f} ({whole['min']:.2f} - {whole['max']:.2f})"
            lines.append(f"| {variant} | {clock} | {seconds} | " + " | ".join(shares) + " |")
    first = next(iter(found["seconds"]))
    for variant, clocks in found["ratios"].items():
        for clock, ratio in clocks.items():
            times = f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})"
            lines.append(f"\n{variant} step over {first} step, {clock} seconds: {times}")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="coco", help="sizes to use (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, help="images per batch (default: from the preset)")
    parser.add_argument("--regions", type=positive, help="regions per image (default: from the preset)")
    parser.add_argument(
        "--text-tokens", type=positive, help="tokens per text for the text encoder (default: from the preset)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=2, help="timed steps of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--warm-up", type=non_negative, default=1, help="untimed steps before each timed one (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=2, help="number of CPU threads (default: %(default)s)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to measure (default: all)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the measurement and print one line of JSON and the table."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    changes = {name: getattr(options, name) for name in ("batch_size", "regions", "text_tokens")}
    preset = replace(PRESETS[options.preset], **{name: value for name, value in changes.items() if value})
    found = measure(preset, options.rounds, tuple(options.variants), options.warm_up)
    sizes = {name: value for name, value in asdict(preset).items() if name not in ("backbone", "text", "student")}
    sys.stdout.write(json.dumps({"machine": machine(options.threads), "sizes": sizes, **found}) + "\n\n")
    sys.stdout.write(f"{machine(options.threads)}, fp32, {sizes}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
