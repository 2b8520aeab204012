"""Compare segmenters that are opened for any words with segmenters that are trained for them, on the drawn world.

    python -m train.miniworld --ablations baseline both --seeds 0 1 2 --out runs/miniworld
    python -m train.miniworld.zero_shot runs/miniworld

The closed-vocabulary segmenter is the baseline of each seed with the ten training labels as its classes; the
image-text model is the tiny CLIP of the same seed. `open_segmenter` combines both, and every weight of the regions is
scored. The other columns are the trained segmenters: with labels alone, and with the paper's two losses. Results are
written to `zero_shot.json` of each seed and, as a table, to `zero_shot.md` of the run.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm

from modeling_gkc.atomic_files import atomic_write, atomic_write_json
from modeling_gkc.cli.common import interruptible, without_progress_bars
from modeling_gkc.conversion.zero_shot import open_segmenter
from modeling_gkc.label_text import error_line
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor

from ..data.drawn_world.words import COARSE
from .clip import load_clip
from .evaluate import ProtocolScore, SegmentedImage, best_queries_of, score_protocol
from .protocols import all_protocols
from .summary import ROW_TITLES, markdown, mean_and_spread

REGION_WEIGHTS = {"segmenter": 0.0, "both, 0.3": 0.3, "both, 0.5": 0.5, "both, 0.7": 0.7, "regions": 1.0}
TRAINED = {"baseline": "trained on labels alone", "both": "trained with both losses"}
ROWS = ("seen", "seen by 5th word", "seen by 6th word", "colour", "fill", "sub", "void", "never")
NAME, TABLE = "zero_shot.json", "zero_shot.md"


def opened_model(seed_folder: Path):
    """Combine the baseline of a seed, as a segmenter of the training labels, with the tiny CLIP of the seed.

    Returns:
        The model and its processor.
    """
    model_folder = seed_folder / "baseline" / "model"
    segmenter = GKCForOpenVocabSegmentation.from_pretrained(model_folder)
    processor = GKCProcessor.from_pretrained(model_folder)
    segmenter.set_vocabulary(list(COARSE), processor)
    clip = load_clip(seed_folder / "clip")
    opened, processor = open_segmenter(
        segmenter.eval(), clip.vision, clip.tokenizer, processor.image_processor.to_dict(), text_model=clip.text
    )
    temperature = json.loads((seed_folder / "clip" / "clip.json").read_text())["logit_scale"]
    opened.classifier.region_scale.fill_(temperature)
    return opened, processor


@torch.no_grad()
def score_opened(model, processor, dataset: Dataset, show_progress: bool = True) -> dict[str, dict[str, float | None]]:
    """Score an opened model with every weight of its regions, with one pass per image.

    Args:
        model: A `GKCForZeroShotSegmentation`.
        processor: Its processor.
        dataset: Test set of the mini-world.
        show_progress: Whether to show a progress bar.

    Returns:
        mIoU in 0..1 of each group of classes, for each name of `REGION_WEIGHTS`.
    """
    encoded = [score_protocol(model, processor, protocol) for protocol in all_protocols()]
    prompts = [model.resolve_vocabulary(class_embeds=each.class_embeds, class_ids=each.class_ids) for each in encoded]
    scores = {
        name: [ProtocolScore(each.protocol, each.class_embeds, each.class_ids) for each in encoded]
        for name in REGION_WEIGHTS
    }
    for row in tqdm(dataset, "opened", unit="image", disable=not show_progress):
        pixel_values = processor(images=row["image"], return_tensors="pt")["pixel_values"]
        model.classifier.region_weight = 1.0
        segments = model.segment(pixel_values)
        image = SegmentedImage.from_row(row, segments.region_embeds[0], segments.masks_queries_logits[0], None)
        best_queries = best_queries_of(image)
        for name, weight in REGION_WEIGHTS.items():
            model.classifier.region_weight = weight
            for score, words in zip(scores[name], prompts, strict=True):
                logits, _ = model.classifier(segments, words)
                score.update(image, logits[0].softmax(dim=-1)[:, :-1], best_queries)
    return {
        name: {group: values["miou"] for each in found for group, values in each.result().items()}
        for name, found in scores.items()
    }


def run(folder: Path) -> dict[int, dict[str, dict[str, float | None]]]:
    """Score all finished seeds of an experiment.

    Args:
        folder: Output folder of `python -m train.miniworld` with the ablations baseline and both.

    Returns:
        mIoU in 0..1 by seed, column of the table and group of classes.

    Raises:
        ValueError: No seed has finished, or an ablation is missing.
    """
    seeds = {}
    for results in sorted(folder.glob("seed-*/results.json")):
        seed_folder = results.parent
        trained = json.loads(results.read_text())["arms"]
        missing = [name for name in TRAINED if name not in trained]
        if missing:
            raise ValueError(
                f"{seed_folder} has no ablation {missing[0]}: run `python -m train.miniworld --ablations baseline "
                "both`."
            )
        path = seed_folder / NAME
        if not path.exists():
            with without_progress_bars():
                model, processor = opened_model(seed_folder)
            scores = score_opened(model, processor, load_from_disk(str(seed_folder / "data" / "test")))
            for name, title in TRAINED.items():
                scores[title] = {group: values["miou"] for group, values in trained[name]["scores"].items()}
            atomic_write_json(path, scores)
        seeds[int(seed_folder.name.removeprefix("seed-"))] = json.loads(path.read_text())
    if not seeds:
        raise ValueError(f"{folder} has no finished seed: run `python -m train.miniworld --out {folder}` first.")
    return seeds


def table(seeds: Mapping[int, Mapping[str, Mapping[str, float | None]]]) -> str:
    """Return the scores in percent, mean and standard deviation over the seeds, as a Markdown table."""
    columns = [*REGION_WEIGHTS, *TRAINED.values()]
    rows = [["vocabulary", *columns], ["---", *["---:"] * len(columns)]]
    for row in ROWS:
        cells = (mean_and_spread([scores[column][row] for scores in seeds.values()]) for column in columns)
        rows.append([ROW_TITLES.get(row, row), *cells])
    return markdown(rows)


@interruptible("train.miniworld.zero_shot", "Repeat the command to resume.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.miniworld.zero_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="output folder of `python -m train.miniworld`")
    options = parser.parse_args(arguments)
    try:
        found = table(run(options.folder))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"python -m train.miniworld.zero_shot: error: {error_line(error)}\n")
        return 2
    atomic_write(options.folder / TABLE, f"{found}\n")
    sys.stdout.write(f"{found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
