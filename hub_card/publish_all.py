"""Convert public checkpoints for photographs, evaluate them and publish them on the Hub.

    python -m hub_card.publish_all --list
    python -m hub_card.publish_all --only fc-clip-r50 --source fcclip_cocopan_r50.pth=downloads/r50.pth --dry-run
    python -m hub_card.publish_all --data data --to USER

Each model of the table gets a folder OUT/NAME with `checkpoint` (the converted checkpoint), `results` (one file for
each evaluated benchmark) and `hub` (what is uploaded: weights, code, processor and model card). When the command is
given again, finished conversions and evaluations are not repeated, and `hub` is written with all results.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_gkc.atomic_files import atomic_folder, atomic_write
from modeling_gkc.cli.common import UserError, interruptible, output_folder, without_progress_bars
from modeling_gkc.label_text import error_line

TEMPLATE = Path(__file__).parent / "converted_template.md"
OUT = Path("published")
LAION_CONVNEXT = "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
CLIP_B16, CLIP_L14 = "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14-336"
# Loads a published folder as its users do: with transformers alone, by the code in the folder.
READ_AGAIN = """
import sys
from transformers import pipeline

segmenter = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True)
assert "modeling_gkc" not in sys.modules, "the installed library was used instead of the code in the folder"
print(len(segmenter(sys.argv[2], subtask="semantic")), "segments")
"""


@dataclass(frozen=True)
class PublicModel:
    """Row of the model table.

    Attributes:
        name: Name of the converted checkpoint.
        sources: Public checkpoints: a Hub repository `owner/name`, a file of one `owner/name:file`, or the name of a
            file that must be given by --source.
        command: Arguments of `gkc` without --out; `{0}` is the first source.
        license: License of the converted weights, as the Hub names it.
        license_note: Licenses of the parts.
        published: Published scores of the source, with what they were measured on.
        parameters: Number of parameters in millions.
        speed: Speed class, see `docs/photographs.md`.
        benchmarks: Benchmarks to evaluate on.
    """

    name: str
    sources: tuple[str, ...]
    command: tuple[str, ...]
    license: str
    license_note: str
    published: str
    parameters: int
    speed: str
    benchmarks: tuple[str, ...] = ("ade20k_150", "pascal_context_59", "pascal_voc_20", "coco_panoptic_133")


def _opened(name: str, segmenter: str, tower: str, **facts: Any) -> PublicModel:
    """Return the row of a segmenter of COCO's panoptic classes with an image-text model."""
    command = ("open", "{0}", "--with", "{1}", "--class-names", "coco_panoptic_133")
    return PublicModel(name, (segmenter, tower), command, **facts)


MODELS = (
    _opened(
        "mask2former-swin-s-clip-b16",
        "facebook/mask2former-swin-small-coco-panoptic",
        CLIP_B16,
        license="other",
        license_note="Mask2Former: see its model card; CLIP: MIT",
        published="COCO PQ 54.6 with its own classes",
        parameters=219,
        speed="medium",
    ),
    _opened(
        "mask2former-swin-l-clip-l14",
        "facebook/mask2former-swin-large-coco-panoptic",
        CLIP_L14,
        license="other",
        license_note="Mask2Former: see its model card; CLIP: MIT",
        published="COCO PQ 57.8 with its own classes",
        parameters=644,
        speed="slow",
    ),
    _opened(
        "eomt-l-siglip2-b16",
        "tue-mps/coco_panoptic_eomt_large_640",
        "google/siglip2-base-patch16-224",
        license="apache-2.0",
        license_note="EoMT: MIT; SigLIP 2: Apache-2.0",
        published="COCO PQ 56.0 with its own classes",
        parameters=690,
        speed="slow",
    ),
    PublicModel(
        "fc-clip-r50",
        ("fcclip_cocopan_r50.pth", CLIP_B16),
        ("convert", "fc-clip", "{0}", "--tokenizer", "{1}"),
        license="apache-2.0",
        license_note="FC-CLIP: Apache-2.0; CLIP: MIT",
        published="A-150 23.3, PC-59 50.5 mIoU; COCO PQ 50.7, with the geometric ensemble",
        parameters=122,
        speed="medium",
    ),
    PublicModel(
        "fc-clip-convnext-l",
        ("fcclip_cocopan.pth", f"{LAION_CONVNEXT}:open_clip_model.safetensors", CLIP_B16),
        ("convert", "fc-clip", "{0}", "--clip", "{1}", "--tokenizer", "{2}"),
        license="apache-2.0",
        license_note="FC-CLIP: Apache-2.0; OpenCLIP: MIT",
        published="A-150 34.1, PC-59 58.4 mIoU; COCO PQ 54.4, with the geometric ensemble",
        parameters=372,
        speed="slow",
    ),
)


def model_table(models: Sequence[PublicModel] = MODELS) -> str:
    """Return the models as a Markdown table."""
    rows = ["| name | from | license | published scores of the source | parameters | speed |", "| --- " * 6 + "|"]
    for model in models:
        sources = " + ".join(f"`{source}`" for source in model.sources[: 1 + (model.command[0] == "open")])
        cells = (model.name, sources, model.license_note, model.published, f"{model.parameters} M", model.speed)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def publish(model: PublicModel, options: argparse.Namespace, copies: Mapping[str, str]) -> Path:
    """Convert, evaluate and publish one model.

    Args:
        model: Row of the table.
        options: Arguments of the command.
        copies: Local path of a source, by its name.

    Returns:
        The folder that was, or with `--dry-run` would be, uploaded.

    Raises:
        UserError: A source is missing, or a step failed.
    """
    folder = options.out / model.name
    checkpoint, hub = folder / "checkpoint", folder / "hub"
    folder.mkdir(parents=True, exist_ok=True)
    if not checkpoint.is_dir():
        sources = [_resolve(source, copies) for source in model.sources]
        arguments = [argument.format(*sources) for argument in model.command]
        _run("-m", "modeling_gkc", *arguments, "--out", str(checkpoint))
    results = []
    for benchmark in model.benchmarks if options.data else ():
        data, result = options.data / benchmark, folder / "results" / f"{benchmark}.json"
        if not data.is_dir():
            sys.stdout.write(f"{model.name}: not evaluated on {benchmark}: {data} is not a directory\n")
            continue
        if not result.exists():
            result.parent.mkdir(exist_ok=True)
            evaluation = ("--model", str(checkpoint), "--benchmark", benchmark, "--data", str(data))
            _run("-m", "train.evaluate", *evaluation, "--out", str(result))
        results.append(str(result))
    metadata = {}
    if results:
        metadata = yaml.safe_load(_run("-m", "train.evaluate", "report", *results, "--model-index", capture=True))
    _write_hub_folder(model, checkpoint, hub, metadata)
    with tempfile.TemporaryDirectory(dir=folder) as modules:
        _run("-c", READ_AGAIN, str(hub), str(options.image), HF_MODULES_CACHE=modules)
    target = f"{options.to or 'USER'}/{model.name}"
    files = sorted(path for path in hub.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    if options.dry_run:
        sys.stdout.write(f"{model.name}: would upload {len(files)} files ({size:.1f} MB) of {hub} to {target}\n")
    else:
        from huggingface_hub import HfApi

        HfApi().create_repo(target, exist_ok=True)
        HfApi().upload_folder(repo_id=target, folder_path=hub, commit_message="Upload the converted checkpoint")
        sys.stdout.write(f"{model.name}: uploaded {len(files)} files ({size:.1f} MB) to {target}\n")
    return hub


def _resolve(source: str, copies: Mapping[str, str]) -> str:
    """Return the path or Hub repository of a source, after downloading a single file of a repository."""
    if source in copies:
        return copies[source]
    repository, _, file = source.partition(":")
    if "/" not in source:
        raise UserError(f"{source} is not on the Hub: download it and give it by --source {source}=PATH")
    if not file:
        return source
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, file)
    except Exception as error:  # network, authorization and absent files have different errors
        raise UserError(f"{source}: cannot be downloaded: {error_line(error)}") from error


def _run(*arguments: str, capture: bool = False, **environment: str) -> str:
    """Run Python with arguments, and return its output if `capture`.

    Raises:
        UserError: The process failed; its last line of errors is the message.
    """
    command = [sys.executable, *arguments]
    process = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"{' '.join(arguments[:3])}: {lines[-1]}")
    return process.stdout or ""


def _write_hub_folder(model: PublicModel, checkpoint: Path, hub: Path, metadata: Mapping[str, Any]) -> None:
    """Write weights, code, processor and model card of a converted checkpoint."""
    from modeling_gkc.checkpoint_loading import load_checkpoint_parts
    from modeling_gkc.remote_code import save_with_code

    front_matter = {
        "license": model.license,
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["gkc", "open-vocabulary-segmentation", "semantic-segmentation", "panoptic-segmentation"],
        "base_model": [source.partition(":")[0] for source in model.sources if "/" in source],
        **metadata,
    }
    values = {
        "metadata": yaml.safe_dump(front_matter, sort_keys=False).strip(),
        "name": model.name,
        "command": shlex.join(("gkc", *(word.format(*model.sources) for word in model.command), "--out", model.name)),
        "license_note": model.license_note,
        "published": model.published,
        "measured": "The scores are in this card's metadata."
        if metadata
        else "This converted checkpoint has not been evaluated on a benchmark.",
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"<<{name}>>", value)
    with without_progress_bars():
        network, processor = load_checkpoint_parts(checkpoint)
    with without_progress_bars(), atomic_folder(hub, overwrite=True) as unfinished:
        save_with_code(network, processor, unfinished)
        atomic_write(unfinished / "README.md", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub_card.publish_all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [model.name for model in MODELS]
    add("--list", action="store_true", help="print the table of the models and stop")
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help="models to publish (default: all)")
    add(
        "--out",
        type=output_folder,
        default=OUT,
        metavar="DIR",
        help="folder for checkpoints and results (default: %(default)s)",
    )
    data_help = "folder of prepared benchmarks DIR/BENCHMARK to evaluate on (default: no evaluation)"
    add("--data", type=Path, metavar="DIR", help=data_help)
    source_help = "local copy of a public checkpoint of the table; repeatable"
    add("--source", action="append", default=[], metavar="CHECKPOINT=PATH", help=source_help)
    image = Path(__file__).parent.parent / "examples" / "scene-1.png"
    add("--image", type=Path, default=image, metavar="FILE", help="image to try each published folder with")
    add("--to", metavar="USER", help="Hub user or organization to upload to")
    add("--dry-run", action="store_true", help="do everything but the upload, and print what would be uploaded")
    return parser


@interruptible("hub_card.publish_all", "Give the same command again to continue.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 for success, 1 if some models failed, 2 for invalid arguments.
    """
    options = _parser().parse_args(arguments)
    if options.list:
        sys.stdout.write(f"{model_table()}\n")
        return 0
    try:
        copies = _copies(options.source)
        if not options.dry_run:
            _check_upload(options.to)
    except UserError as error:
        sys.stderr.write(f"hub_card.publish_all: error: {error}\n")
        return 2
    failed = 0
    for model in MODELS:
        if model.name not in options.only:
            continue
        try:
            publish(model, options, copies)
        except (UserError, OSError, ValueError) as error:
            failed += 1
            reason = str(error) if isinstance(error, UserError) else error_line(error)
            sys.stderr.write(f"hub_card.publish_all: {model.name}: error: {reason}\n")
    return int(failed > 0)


def _copies(pairs: Sequence[str]) -> dict[str, str]:
    """Parse the values of --source, and check that they exist and belong to a model."""
    known = {source for model in MODELS for source in model.sources}
    copies = {}
    for pair in pairs:
        source, separator, path = pair.rpartition("=")
        if not separator or source not in known:
            raise UserError(f"--source: {pair}: expected CHECKPOINT=PATH with one of {', '.join(sorted(known))}")
        if not Path(path).exists():
            raise UserError(f"--source: {path} does not exist")
        copies[source] = path
    return copies


def _check_upload(user: str | None) -> None:
    """Check before hours of work that the results can be uploaded."""
    from huggingface_hub import get_token

    if not user:
        raise UserError("--to: name the Hub user or organization to upload to, or use --dry-run")
    if not get_token():
        raise UserError("no Hub token: log in by `hf auth login` or set HF_TOKEN, or use --dry-run")


if __name__ == "__main__":
    sys.exit(main())
