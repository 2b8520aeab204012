"""Tests that every command shown in README, docs and --help runs as typed, or that its arguments can be parsed.

The commands run in one folder, in the order of the text, on stand-ins under the documented names: drawn images, the
shipped checkpoint, and small random models in place of those of the Hub. Commands that would take hours or need a
download are only parsed by the real parser, for the reason listed in `PARSED`. A command that fails, new ones
included, fails the test.
"""

import argparse
import ast
import configparser
import glob
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from modeling_gkc.cli.main import main as gkc

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "hub_card/gkc-mini/README.md",
]
HELPS = [
    *("gkc", "gkc segment", "gkc vocab", "gkc embed", "gkc open", "gkc export"),
    *("gkc convert", "gkc convert mask2former", "gkc convert fc-clip", "gkc convert clip-resnet"),
    *(
        "python -m train",
        "python -m train distil",
        "python -m train.evaluate",
        "python -m train.evaluate report",
        "python -m train.synonyms",
    ),
    *("python -m train.cache", "python -m train.cache teacher", "python -m train.cache synonyms"),
    *("python -m train.cache nouns", "python -m train.data.from_folder", "python -m train.data.prepare"),
    *("python -m train.data.view", "python -m train.data.benchmarks.miniworld", "python -m train.miniworld"),
    *(
        "python -m train.data.drawn_world.examples",
        "python -m hub_card.publish_mini",
        "python -m hub_card.publish_all",
    ),
    "python -m benchmarks",
]

# Start of a command that is only parsed -> reason why it does not run here.
PARSED = {
    "make test": "runs this suite",
    "make demo": "its labels are tested in tests/test_shipped_checkpoint.py, its command `gkc segment` here",
    "pip install": "needs the package index",
    "gkc convert": "needs published weights; run on toys in tests/test_cli_convert.py",
    "gkc open": "needs published weights; run on toys in tests/test_cli_open.py",
    "gkc segment photo.jpg --model any-words": "needs a checkpoint made of published weights",
    "gkc segment photo.jpg --model mask2former-words": "needs a checkpoint converted from published weights",
    "gkc segment photo.jpg --model fc-clip-l": "needs a checkpoint converted from published weights",
    "gkc embed --labels ade20k_847": "the shipped tokenizer has few of these words and a limit of 16 tokens",
    "gkc export": "takes ten seconds; run in tests/test_cli_export.py",
    "python words-onnx/run.py": "run in tests/test_export.py on the graph that the previous command writes",
    "python -m train coco_": "hours on GPUs, and COCO",
    "gkc segment photo.jpg --model runs/distil": "needs the student of the command before it",
    "python -m train distil photos/": "needs a checkpoint made of published weights; run with the shipped one in docs",
    "python -m train custom dataset=data/my-tools": "run with drawn images by the same command in README",
    "gkc segment photo.jpg --model DIR": "run with a trained model by another command in README",
    "python -m train my_recipe.py": "the file is a placeholder",
    "accelerate launch": "starts processes on GPUs; several are run in tests/test_distributed.py",
    "torchrun": "starts processes; several are run in tests/test_cache.py",
    "python -m train.cache": "needs COCO and CLIP; run on toys in tests/test_cache.py",
    "python -m train.miniworld.zero_shot": "needs the command before it; run in tests/test_miniworld_experiment.py",
    "python -m train.miniworld": "half an hour to hours; run on toys in tests/test_miniworld_experiment.py",
    "python -m hub_card.publish_all --only": "needs published weights; run on toys in tests/test_publish_all.py",
    "python -m hub_card.publish_all --data": "needs published weights; run on toys in tests/test_publish_all.py",
    "python -m hub_card.publish_mini": "overwrites the shipped checkpoint with that of a finished run",
    "python -m train.data.prepare ade20k_150": "needs ADE20K; run on a miniature in tests/test_prepare_benchmarks.py",
    "python -m train.data.prepare coco_panoptic_133": "needs COCO; a miniature is in tests/test_prepare_benchmarks.py",
    "python -m train.evaluate --model gkc-r50": "needs a model trained for hours",
    "python -m train.evaluate --model facebook/": "needs published weights; toys are in tests/test_evaluate_models.py",
    "python -m train.evaluate report results/gkc-mini-miniworld-val.json": "needs the three commands before it",
    "python -m train.evaluate report results/gkc-r50": "needs a model trained for hours",
    "python -m train.data.view data/": "needs published data; run on miniatures in tests/test_view.py",
    "python -m train.data.view my_dataset": "the folder is a placeholder; run on miniatures in tests/test_view.py",
    "python -m train.synonyms": "needs WordNet; run on a miniature in tests/test_synonyms.py",
    "gkc vocab show my-words.json": "written by the previous command, which needs WordNet",
    "make bench": "runs `python -m benchmarks`, see there",
    "python benchmarks/training_step.py": "a quarter of an hour; run on toys in tests/test_benchmarks_training.py",
    "python -m benchmarks": "minutes to an hour; run on toys in tests/test_benchmarks_inference.py",
    "python -m train.data.from_folder my_images": "a placeholder; an example in README runs",
    "python -m train.data.benchmarks.miniworld": "draws 800 scenes, a minute; run in tests/test_evaluate.py",
    "python -m train.data.prepare miniworld": "needs the command before it; run in tests/test_evaluate.py",
    "python -m train.evaluate --model hub_card/gkc-mini --benchmark miniworld": "needs the two previous commands",
    "gkc segment photos/ --vocab words.safetensors": "run by test_segment_with_embeddings_file below",
}
INLINE_PROGRAMS = r"(GKC_\w+=\S+ )?(gkc|python|make|accelerate|torchrun|pip|pytest) "
# Appended so that the command takes seconds; the rest runs as typed.
QUICK = {
    "python -m train custom": (
        "steps=2 batch_size=2 num_workers=0 save_every=1 evaluate_every=2 log_every=1 train_num_points=64"
    ),
    "python -m train distil shapes/images": "num_workers=0 train_num_points=64",
    "python -m train.data.drawn_world.examples --out my-shapes": "--masks 12",
    "python -m train.data.drawn_world.examples --out shapes": "--masks 12",
}


def commands_of(document: str) -> list[str]:
    """Return the lines of a document's bash blocks, without comments; other blocks contain no commands."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    others = [block for language, block in fenced if language != "bash"]
    assert not any(re.search(r"^(gkc|pip|make|python|accelerate) ", block, flags=re.MULTILINE) for block in others)
    blocks = [block for language, block in fenced if language == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [typed for line in lines if (typed := re.sub(r"(^|\s+)# .*", "", line).strip())]


def examples_of(text: str) -> list[str]:
    """Return the commands among the examples of a --help, without the comments beside them."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line.strip() for line in lines if re.match(r"\s+(gkc|python -m|accelerate launch|torchrun) ", line)]
    found = [re.split(r" {3,}(?![ -])|\s+# | > ", line)[0].strip() for line in found]
    return [command for command in found if not command.endswith("...")]


class Parsed(Exception):
    """Exception that ends a program after its arguments were parsed."""


@contextmanager
def parsing_only():
    """Make `parse_args` of every parser end the program once the arguments are parsed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)

            def parsed(self, *args, parse=parse, **kwargs):
                parse(self, *args, **kwargs)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, name, parsed)
        yield


def run(words: list[str]) -> int:
    """Run a program in this process as if its name were typed on the command line."""
    if words[0] == "gkc":
        return gkc(words[1:])
    if words[:2] == ["python", "words-onnx/run.py"]:
        words = ["python", "-m", "modeling_gkc.export.runner", *words[2:]]
    if words[1].endswith(".py"):
        words = ["python", "-m", words[1].removesuffix(".py").replace("/", "."), *words[2:]]
    assert words[:2] == ["python", "-m"], words
    name = words[2]
    is_package = importlib.util.find_spec(name).submodule_search_locations is not None
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words[3:]])
        return module.main() or 0


def parse(command: str) -> None:
    """Parse a command's arguments with the real parser, including those of a launcher."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert {*re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", command)))} <= {
            *setup["options.extras_require"]
        }, command
    elif words[0] in ("accelerate", "torchrun"):
        parser, given = (
            (launch_command_parser(), words[2:]) if words[0] == "accelerate" else (torchrun_parser(), words[1:])
        )
        launched = parser.parse_args(given)
        assert launched.module
        parse(shlex.join(["python", "-m", launched.training_script, *launched.training_script_args]))
    else:
        with parsing_only(), pytest.raises((Parsed, SystemExit)) as ended:
            run(words)
        assert isinstance(ended.value, Parsed) or ended.value.code == 0, command  # --help


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Create a folder with stand-ins under the documented names."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("hub_card", "examples", "configuration"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("photo.jpg", "cat.jpg", "scene.png", "IMAGE.png", "folder/a.png", "photos/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "examples" / "scene-1.png", folder / name)
    shutil.copytree(ROOT / "hub_card" / "gkc-mini", folder / "my-checkpoint")
    (folder / "my-words.csv").write_text("name,synonyms\ncat,\nsofa,couch|settee\n")
    return folder


def starts(command: str, start: str) -> bool:
    """Return whether a command starts with these words."""
    return re.match(re.escape(start) + (r"(?![\w.])" if start[-1].isalnum() else ""), command) is not None


def inline_commands_of(document: str) -> list[str]:
    """Return the commands between backticks in a document's text; "..." and CAPITALS are placeholders."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    found = [code for code in re.findall(r"`([^`]+)`", text) if re.match(INLINE_PROGRAMS, code)]
    return [command for command in found if "..." not in command and not command.startswith("gkc COMMAND")]


def run_all(commands: list[str]) -> None:
    """Run or parse each command in order."""
    for command in commands:
        if any(starts(command, start) for start in PARSED):
            parse(command)
            continue
        quick = next((more for start, more in QUICK.items() if command.startswith(start)), "")
        typed = shlex.split(command)
        words = [name for word in typed for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        assert run([*words, *quick.split()]) == 0, command


@cache
def run_document(document: str) -> None:
    """Run the commands of a document in the folder of `place`, once."""
    run_all(commands_of(document))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_run(document, place, monkeypatch):
    monkeypatch.chdir(place)
    run_document(document)


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_inline_commands_can_be_parsed(document, place, monkeypatch):
    monkeypatch.chdir(place)
    for command in inline_commands_of(document):
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        if "pytest" in words:
            files = [word for word in words if word.startswith("tests/")]
            assert files and all((ROOT / name).exists() for name in files), command
        elif words[:2] == ["pip", "wheel"] or "tests.common_checks" in words:
            assert words[-1] == "." or (ROOT / "tests" / "common_checks.py").exists(), command
        elif re.fullmatch(r"(gkc|python -m)( [a-z][\w.-]*)*", command):  # the name of a command
            parse(f"{command} --help")
        else:
            parse(shlex.join(words))


@pytest.fixture(scope="module")
def after_the_documents(place) -> None:
    """Run the documents' commands first, because examples of help texts use their results."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(place)
        for document in DOCUMENTS:
            run_document(document)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", HELPS)
def test_examples_of_help_texts_run(command, place, after_the_documents, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        run([*shlex.split(command), "--help"])
    assert ended.value.code == 0
    run_all(examples_of(capsys.readouterr().out))


def test_segment_with_embeddings_file(place, monkeypatch):
    monkeypatch.chdir(place)
    assert (
        run(shlex.split('gkc embed --labels "red disc; lawn, grass" --templates photo --out words.safetensors')) == 0
    )
    assert run(shlex.split("gkc segment photos/ --vocab words.safetensors")) == 0


def test_every_unrun_command_is_documented():
    typed = [command for document in DOCUMENTS for command in commands_of(document)]
    sources = [path for folder in ("modeling_gkc", "train", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    typed += [command for path in sources for command in examples_of(path.read_text())]
    unused = [start for start in PARSED if not any(starts(command, start) for command in typed)]
    assert unused == []


def test_train_extra_covers_imports_of_training():
    """Also covers packages that a README line needs: adapters and tensorboard."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["install_requires"] + setup["options.extras_require"]["train"]
    brought = {re.match(r"[\w-]+", line)[0] for line in listed.split("\n") if line.strip()}
    brought |= {"PIL", "huggingface_hub", "safetensors", "tqdm", "yaml", "pyarrow", "filelock", "tokenizers", "xxhash"}
    ours = {"modeling_gkc", "configuration", "train", "hub_card", *sys.stdlib_module_names}
    needed = {"peft", "tensorboard"}
    for path in (ROOT / "train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                needed.add(node.module.partition(".")[0])
    assert needed - ours - brought == set()
