"""Every command that README, docs and --help show is run as it is typed, or has its arguments parsed.

They run in one folder, in the order of the text, on stand-ins under the documented names: drawn pictures, the shipped
checkpoint, small random models in the place of those of the Hub. What would take hours or needs a download goes
through the real parser, and `PARSED` has the reason. A command that fails, or that is new and fails, fails the test.
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
    *("gkc", "gkc segment", "gkc vocab", "gkc embed", "gkc export"),
    *("gkc convert", "gkc convert mask2former", "gkc convert clip-resnet"),
    *("python -m train", "python -m train.evaluate", "python -m train.evaluate report", "python -m train.synonyms"),
    *("python -m train.cache", "python -m train.cache teacher", "python -m train.cache synonyms"),
    *("python -m train.cache nouns", "python -m train.data.from_folder", "python -m train.data.prepare"),
    *("python -m train.data.view", "python -m train.data.benchmarks.miniworld", "python -m train.miniworld"),
    *("python -m train.data.drawn_world.examples", "python -m hub_card.publish_mini", "python -m benchmarks"),
]

# Start of a command that is only parsed -> why it does not run here.
PARSED = {
    "make test": "it is this suite",
    "make demo": "its words are tried in tests/test_shipped_checkpoint.py, its command `gkc segment` here",
    "pip install": "it needs the package index",
    "gkc convert": "needs published weights; run on toys in tests/test_cli_convert.py",
    "gkc segment photo.jpg --model mask2former-words": "that checkpoint needs published weights",
    "gkc embed --labels ade20k_847": "the shipped checkpoint knows few of these words, and 16 tokens",
    "gkc export": "takes ten seconds; run in tests/test_cli_export.py",
    "python words-onnx/run.py": "run in tests/test_export.py on the graph that the command before it writes",
    "python -m train coco_": "hours on GPUs, and COCO",
    "python -m train own_folder dataset=data/my-tools": "README runs the same on drawn pictures",
    "gkc segment photo.jpg --model DIR": "README segments with what was trained",
    "python -m train my_recipe.py": "the file is the reader's",
    "accelerate launch": "starts processes on GPUs; several are run in tests/test_distributed.py",
    "torchrun": "starts processes; several are run in tests/test_cache.py",
    "python -m train.cache": "needs COCO and CLIP; run on toys in tests/test_cache.py",
    "python -m train.miniworld": "half an hour to hours; run on toys in tests/test_miniworld_experiment.py",
    "python -m hub_card.publish_mini": "overwrites the shipped checkpoint with that of a finished run",
    "python -m train.data.prepare ade20k_150": "needs ADE20K; run on a miniature in tests/test_prepare_benchmarks.py",
    "python -m train.data.prepare coco_panoptic_133": "needs COCO; a miniature is in tests/test_prepare_benchmarks.py",
    "python -m train.evaluate --model gkc-r50": "hours of training before",
    "python -m train.evaluate --model facebook/": "needs published weights; toys are in tests/test_evaluate_models.py",
    "python -m train.evaluate report results/gkc-mini-miniworld-val.json": "as the three before it",
    "python -m train.evaluate report results/gkc-r50": "hours of training before",
    "python -m train.data.view data/": "needs published data; run on miniatures in tests/test_view.py",
    "python -m train.data.view my_dataset": "the folder is the reader's; run on miniatures in tests/test_view.py",
    "python -m train.synonyms": "needs WordNet; run on a miniature in tests/test_synonyms.py",
    "gkc vocab show my-words.json": "written by the synonyms command before it, which needs WordNet",
    "make bench": "as `python -m benchmarks`",
    "python benchmarks/training_step.py": "a quarter of an hour; run on toys in tests/test_benchmarks_training.py",
    "python -m benchmarks": "minutes to an hour; run on toys in tests/test_benchmarks_inference.py",
    "python -m train.data.from_folder my_pictures": "the folder is the reader's; README's example runs",
    "python -m train.data.benchmarks.miniworld": "draws 800 scenes, a minute; run in tests/test_evaluate.py",
    "python -m train.data.prepare miniworld": "takes the 800 scenes drawn before it; run in tests/test_evaluate.py",
    "python -m train.evaluate --model hub_card/gkc-mini --benchmark miniworld": "as the two before it",
    "gkc segment photos/ --vocab words.safetensors": "run by test_words_encoded_before below",
}
INLINE_PROGRAMS = r"(GKC_\w+=\S+ )?(gkc|python|make|accelerate|torchrun|pip|pytest) "
# Appended so that minutes become seconds; everything else stays as it is typed.
QUICK = {
    "python -m train own_folder": (
        "steps=2 batch_size=2 num_workers=0 save_every=1 evaluate_every=2 log_every=1 train_num_points=64"
    ),
    "python -m train.data.drawn_world.examples --out my-shapes": "--masks 12",
    "python -m train.data.drawn_world.examples --out shapes": "--masks 12",
}


def commands_of(document: str) -> list[str]:
    """The lines of the bash blocks of a document, without comments; commands stand in no block of another kind."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    others = [block for language, block in fenced if language != "bash"]
    assert not any(re.search(r"^(gkc|pip|make|python|accelerate) ", block, flags=re.MULTILINE) for block in others)
    blocks = [block for language, block in fenced if language == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [typed for line in lines if (typed := re.sub(r"(^|\s+)# .*", "", line).strip())]


def examples_of(text: str) -> list[str]:
    """The commands among the examples of a --help, without what is said beside them."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line.strip() for line in lines if re.match(r"\s+(gkc|python -m|accelerate launch|torchrun) ", line)]
    found = [re.split(r" {3,}(?![ -])|\s+# | > ", line)[0].strip() for line in found]
    return [command for command in found if not command.endswith("...")]


class Parsed(Exception):
    """Arguments were parsed, and nothing is to be done with them."""


@contextmanager
def parsing_only():
    """`parse_args` of every parser ends the program once it has understood its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)

            def parsed(self, *args, parse=parse, **kwargs):
                parse(self, *args, **kwargs)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, name, parsed)
        yield


def run(words: list[str]) -> int:
    """Run a program as its name on the command line would, in this process."""
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
    """Have a command's arguments parsed by the real parser, those of a launcher too."""
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
    """A folder in which the documented names are stand-ins."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("hub_card", "examples", "configuration"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("photo.jpg", "cat.jpg", "scene.png", "PICTURE.png", "folder/a.png", "photos/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "examples" / "scene-1.png", folder / name)
    shutil.copytree(ROOT / "hub_card" / "gkc-mini", folder / "my-checkpoint")
    (folder / "my-words.csv").write_text("name,synonyms\ncat,\nsofa,couch|settee\n")
    return folder


def starts(command: str, start: str) -> bool:
    """Whether a command starts so; a word that ends there is a whole one."""
    return re.match(re.escape(start) + (r"(?![\w.])" if start[-1].isalnum() else ""), command) is not None


def inline_commands_of(document: str) -> list[str]:
    """Commands between backticks in the text of a document; "..." and CAPITALS stand for the reader's own."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    found = [code for code in re.findall(r"`([^`]+)`", text) if re.match(INLINE_PROGRAMS, code)]
    return [command for command in found if "..." not in command and not command.startswith("gkc COMMAND")]


def run_all(commands: list[str]) -> None:
    """Each command in order, run or only parsed."""
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
    """Run the commands of a document once, in the folder of `place`."""
    run_all(commands_of(document))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_the_documents(document, place, monkeypatch):
    monkeypatch.chdir(place)
    run_document(document)


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_commands_within_the_text_can_be_parsed(document, place, monkeypatch):
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
    """Run the documents' commands, whose results the examples of the helps take, in whatever order the tests run."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(place)
        for document in DOCUMENTS:
            run_document(document)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", HELPS)
def test_examples_of_the_helps(command, place, after_the_documents, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        run([*shlex.split(command), "--help"])
    assert ended.value.code == 0
    run_all(examples_of(capsys.readouterr().out))


def test_words_encoded_before(place, monkeypatch):
    monkeypatch.chdir(place)
    assert (
        run(shlex.split('gkc embed --labels "red disc; lawn, grass" --templates photo --out words.safetensors')) == 0
    )
    assert run(shlex.split("gkc segment photos/ --vocab words.safetensors")) == 0


def test_every_reason_is_of_a_documented_command():
    typed = [command for document in DOCUMENTS for command in commands_of(document)]
    sources = [path for folder in ("modeling_gkc", "train", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    typed += [command for path in sources for command in examples_of(path.read_text())]
    unused = [start for start in PARSED if not any(starts(command, start) for command in typed)]
    assert unused == []


def test_the_train_extra_brings_what_training_imports():
    """Also what a README line needs beside it: adapters, and the tensorboard/ folder."""
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
