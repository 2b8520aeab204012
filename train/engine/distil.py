"""Command `python -m train distil`: a teacher labels images with the user's words, and a student is trained on them.

Stages: labels, training, report. Each continues where an interrupted command left it.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from configuration import load_recipe
from modeling_gkc.atomic_files import atomic_write_json
from modeling_gkc.cli.common import output_folder, pick_device
from modeling_gkc.vocabulary import Vocabulary

from ..data.prepared import Prepared
from .command import Command, is_main_process, parse_changes, print_rank0, report_target

if TYPE_CHECKING:
    from modeling_gkc.predictor import GKCPredictor

    from ..teacher.segmenter_labels import LabelOptions

NAME = "distil"
REPORT_NAME = "distillation.json"
_MOST_REPORTED = 200  # images of each dataset in the report
_SHOWN_PROBLEMS = 10
DESCRIPTION = """\
Train a student on unlabeled images that a teacher labels with your words. The student needs no CLIP image encoder.

The teacher is a checkpoint folder of `gkc open`, `gkc convert` or `python -m train`. It labels every image once;
pixels of which it is not confident are void and have no part in the mask losses. Labels are made again only when
teacher, words, images or options change. The student learns the labels, the teacher's embedding of every region, and
the synonyms of the words.
"""
EXAMPLES = """\
examples:
  python -m train distil photos/ --teacher any-words --words "dog; sofa, couch; lamp"
  python -m train distil photos/ --teacher any-words --words words.csv --init my-gkc data.crop_size=384 steps=2000
  python -m train distil photos/ --teacher any-words --words "dog; sofa, couch; lamp" --resume

Fields of the recipe are given as section.field=value; `python -m train --help` explains them. The student starts from
the backbone `model.backbone` with the teacher's text encoder, or from a GKC checkpoint (--init).
"""


@dataclass(frozen=True)
class DistillationCommand(Command):
    """A parsed command line of `python -m train distil`.

    Attributes:
        photos: Folder of the images.
        images: Files of the images by their ids.
        teacher: Folder of the teacher's checkpoint.
        vocabulary: Classes of the labels.
        options: Options of labeling.
        inputs: Hashes of the inputs of the labels.
        judged: Labeled dataset to report on, or None.
        device: Device of the teacher.
        typed: The command without `--resume`.
    """

    photos: Path
    images: Mapping[str, Path]
    teacher: Path
    vocabulary: Vocabulary
    options: "LabelOptions"
    inputs: Mapping[str, str]
    judged: Path | None
    device: str
    typed: str

    def prepare(self) -> None:
        """Check all inputs, and label the images that are not labeled yet."""
        check_inputs(self)
        label_photos(self)

    def summarize(self) -> str:
        """Compare student and teacher."""
        return report(self)


def parse_distillation(argv: Sequence[str]) -> DistillationCommand:
    """Parse a command line, and identify the labels that it needs without loading the teacher.

    Args:
        argv: Arguments after `distil`.

    Raises:
        ValueError: A folder does not exist, an option is impossible, or several processes were launched.
        SystemExit: The arguments cannot be parsed, or `--help` was given.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m train {NAME}",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("photos", type=Path, metavar="PHOTOS", help="folder of images; subfolders are read too")
    add("changes", metavar="section.field=value", nargs="*", help="fields of the recipe to set to another value")
    add("--teacher", type=Path, action="append", required=True, metavar="DIR", help="checkpoint folder of the teacher")
    add(
        "--words",
        required=True,
        help='classes and synonyms, as "dog; sofa, couch; lamp", or a vocabulary file or name',
    )
    add("--init", metavar="DIR", help="GKC checkpoint with the teacher's text encoder that the student starts from")
    add("--out", type=output_folder, metavar="DIR", help=f"output folder (default: runs/{NAME})")
    add("--cache", type=output_folder, metavar="DIR", help="folder of the labels (default: OUT-labels)")
    confidence_help = "least class score times mask probability of a labeled pixel (default: %(default)s)"
    add("--confidence", type=float, default=0.5, metavar="SHARE", help=confidence_help)
    share_help = "fraction of the images that are held out to compare student and teacher (default: %(default)s)"
    add("--val-share", type=float, default=0.1, metavar="SHARE", help=share_help)
    add("--labels", type=Path, metavar="DATASET", help="labeled dataset whose split val is reported on too")
    add(
        "--device", default="auto", help="device of the teacher: cpu, cuda, cuda:1, mps or auto (default: %(default)s)"
    )
    add("--resume", action="store_true", help="continue from the last complete checkpoint in the output folder")
    add("--show", action="store_true", help="print all settings of the training and exit")
    add("--report-to", metavar="NAME", help="where to log metrics, as for `python -m train`")
    options = parser.parse_intermixed_args(argv)

    from ..data.sources import image_files  # with torch, which --help must not need
    from ..teacher.segmenter_labels import LabelOptions, labels_fingerprint

    if len(options.teacher) > 1:
        raise ValueError(f"--teacher was given {len(options.teacher)} times: give one teacher.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{NAME} runs in one process: start it with `python -m train {NAME}`.")
    [teacher] = options.teacher
    if not (teacher / "config.json").is_file():
        raise ValueError(f"--teacher: {teacher} is not a checkpoint; name a folder with a config.json.")
    if not options.photos.is_dir():
        raise ValueError(f"PHOTOS: {options.photos} is not a directory.")
    try:
        vocabulary = Vocabulary.parse(options.words)
    except ValueError as error:
        raise ValueError(f"--words: {error}") from error
    images, labeling = image_files(options.photos), LabelOptions(options.confidence, options.val_share)
    inputs = labels_fingerprint(teacher, vocabulary, images, labeling)
    out = options.out or Path("runs") / NAME
    folder = (options.cache or out.with_name(f"{out.name}-labels")) / _name_of(inputs)
    start = {"model.text_from": str(teacher)}
    if options.init is not None:
        start = {"model.init_from": options.init, "model.backbone": None, "model.config": {}}
    recipe = load_recipe(NAME, {"data.dataset": str(folder), **start})
    changes = parse_changes(recipe, options.changes)
    if clash := sorted({"data.dataset", "data.vocabulary", "model.text_from", "model.init_from"} & changes.keys()):
        raise ValueError(f"`{clash[0]}` is set by the command: use --cache, --words, --teacher or --init.")
    return DistillationCommand(
        name=NAME,
        recipe=recipe.replace(changes),
        changed=frozenset(changes),
        out=out,
        resume=options.resume,
        show=options.show,
        report_to=report_target(options.report_to),
        photos=options.photos,
        images=images,
        teacher=teacher,
        vocabulary=vocabulary,
        options=labeling,
        inputs=inputs,
        judged=options.labels,
        device=options.device,
        typed=shlex.join(["python", "-m", "train", NAME, *(part for part in argv if part != "--resume")]),
    )


def _name_of(inputs: Mapping[str, str]) -> str:
    """Return the name of the folder of labels with these inputs."""
    from ..storage.fingerprints import settings_fingerprint

    return settings_fingerprint(dict(inputs))[:16]


def check_inputs(command: DistillationCommand) -> None:
    """Load everything that training and report need, so that mistakes are found before images are labeled.

    Raises:
        ValueError: The student cannot be made, `--init` has another text encoder than the teacher, or `--labels` has
            no class among the words.
    """
    from ..storage.fingerprints import model_fingerprint
    from .builders import load_student, load_text_encoder

    if command.judged is not None:
        _classes_among(_judged(command), command.vocabulary)
    student, _ = load_student(command.recipe, None)
    if command.recipe.model.init_from is None:
        return  # it has the teacher's text encoder
    try:
        text_model, *_ = load_text_encoder(command.teacher)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    if model_fingerprint(student.text_model) != model_fingerprint(text_model):
        raise ValueError(
            f"--init: {command.recipe.model.init_from} has another text encoder than {command.teacher}, so that the "
            "student cannot learn the teacher's embeddings: give a checkpoint with the same one, or leave out --init."
        )


def label_photos(command: DistillationCommand) -> None:
    """Write the labels of a command, or the rest of them, and print how many images they have.

    Raises:
        ValueError: The teacher cannot be used, or no image can be labeled.
    """
    from ..teacher.segmenter_labels import write_labels

    folder = Path(command.recipe.data.dataset)
    splits = write_labels(
        folder,
        command.photos,
        command.images,
        command.inputs,
        command.options,
        lambda: _load_teacher(command),
        command.typed,
        progress=is_main_process(),
    )
    train, val = splits["train"], splits["val"]
    left_out, problems = train["left_out"] + val["left_out"], train["problems"] + val["problems"]
    lines = [f"Labels in {folder}: {train['images']} images to train on, {val['images']} held out"]
    if left_out:
        confidence = command.options.confidence
        lines.append(f"  {left_out} images without a pixel of confidence {confidence} or more are left out")
    if problems:
        lines.append(f"  {len(problems)} images cannot be read and are left out:")
        lines += [f"    {line}" for line in problems[:_SHOWN_PROBLEMS]]
    absent = [label for label in train["classes"] if not train["classes"][label]["images"]]
    if absent:
        lines.append(f"  The teacher found in no image to train on: {', '.join(absent)}")
    print_rank0("\n".join(lines))


def _load_teacher(command: DistillationCommand) -> "GKCPredictor":
    """Load the teacher and set its vocabulary."""
    from modeling_gkc.predictor import GKCPredictor

    try:
        device = pick_device(command.device)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--device: {error}.") from error
    try:
        teacher = GKCPredictor.from_pretrained(command.teacher, device=device)
    except ValueError as error:
        raise ValueError(f"--teacher: {command.teacher} cannot be loaded: {error}") from error
    try:
        teacher.set_vocabulary(command.vocabulary)
    except ValueError as error:
        raise ValueError(f"--words: {error}") from error
    return teacher


def _judged(command: DistillationCommand) -> Prepared:
    """Load the split `val` of the labeled dataset."""
    from ..data.load import load_judged

    try:
        return load_judged(command.judged, "val")
    except ValueError as error:
        raise ValueError(f"--labels: {error}") from error


def _classes_among(judged: Prepared, vocabulary: Vocabulary) -> list[int]:
    """Return for each class of a labeled dataset its position in the vocabulary, or -1."""
    positions = {label.casefold(): index for index, label in enumerate(vocabulary.labels)}
    classes = [positions.get(label.casefold(), -1) for label in judged.vocabulary.labels]
    if max(classes) < 0:
        raise ValueError(
            f"--labels: none of its classes {', '.join(judged.vocabulary.labels[:5])}, ... is among --words: give a "
            "dataset with classes of the same names."
        )
    return classes


def report(command: DistillationCommand) -> str:
    """Compare student and teacher, and write the result to `distillation.json` in the output folder.

    The mean IoU over classes is measured on the held-out images against the teacher's labels, without void pixels, and
    on the split `val` of `--labels`. Before training means the student that training started from. The seconds per
    image are medians of reading, model and post-processing, measured in turn on the same images.

    Returns:
        The lines to print.
    """
    from transformers import set_seed

    from modeling_gkc.predictor import GKCPredictor

    from ..data.prepared import load_prepared
    from .builders import load_student

    set_seed(command.recipe.run.seed)
    before = GKCPredictor(*load_student(command.recipe, None))
    before.set_vocabulary(command.vocabulary)
    teacher, after = _load_teacher(command), GKCPredictor.from_pretrained(command.out)
    for predictor in (before, after):
        predictor.model.to(teacher.model.device)
    held_out = load_prepared(command.recipe.data.dataset, "val").dataset
    same = list(range(len(command.vocabulary)))
    scores, seconds = _compare({"before": before, "after": after, "teacher": teacher}, held_out, same, len(same))
    ratio = seconds["after"] / seconds["teacher"]
    result: dict[str, Any] = {
        "agreement": {name: scores[name] for name in ("before", "after")},
        "images": min(len(held_out), _MOST_REPORTED),
        "seconds_per_image": {"teacher": seconds["teacher"], "student": seconds["after"], "ratio": ratio},
    }
    lines = [
        f"Agreement with the teacher on {result['images']} held-out images (mIoU): "
        f"{_percent(scores['before'])} before, {_percent(scores['after'])} after"
    ]
    if command.judged is not None:
        judged = _judged(command)
        classes = _classes_among(judged, command.vocabulary)
        labeled, _ = _compare(
            {"before": before, "after": after, "teacher": teacher}, judged.dataset, classes, len(same)
        )
        result["labeled"] = labeled
        lines.append(
            f"On {min(len(judged.dataset), _MOST_REPORTED)} images of {command.judged} (mIoU): teacher "
            f"{_percent(labeled['teacher'])}, student {_percent(labeled['before'])} before, "
            f"{_percent(labeled['after'])} after"
        )
    lines.append(
        f"Seconds per image on {teacher.model.device}: teacher {seconds['teacher']:.3f}, student "
        f"{seconds['after']:.3f} ({ratio:.2f} of the teacher's)"
    )
    atomic_write_json(command.out / REPORT_NAME, result)
    return "\n".join(lines)


def _percent(score: float | None) -> str:
    return "no score" if score is None else f"{100 * score:.1f}"


def _compare(
    predictors: Mapping[str, "GKCPredictor"], dataset: Any, classes: Sequence[int], num_classes: int
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Return mean IoU and seconds per image of each predictor on the labels of a dataset.

    Args:
        predictors: Predictors by name.
        dataset: Dataset in the schema of `train.data.schema`, of which at most `_MOST_REPORTED` images are used.
        classes: For each class of the dataset its position in the vocabulary of the predictors, or -1 for void.
        num_classes: Number K of classes of the vocabulary.
    """
    import numpy as np
    from tqdm.auto import tqdm

    from ..data.schema import read_row, semantic_map
    from ..metrics.semantic import SemanticMetric

    metrics = {name: SemanticMetric(num_classes) for name in predictors}
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    positions = np.array([*classes, -1])  # the last one for void, whose class is -1
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _MOST_REPORTED)).astype(int))
    for index in tqdm(chosen.tolist(), "Comparing", unit="image", file=sys.stderr):
        row = dataset[index]
        image, ids = read_row(row)
        truth = positions[semantic_map(row, ids)]
        for name, predictor in predictors.items():
            started = time.perf_counter()
            found = predictor.predict(image).segmentation.cpu().numpy()
            seconds[name].append(time.perf_counter() - started)
            metrics[name].update(found, truth)
    scores = {name: metric.compute()["miou"] for name, metric in metrics.items()}
    return scores, {name: median(times) for name, times in seconds.items()}
